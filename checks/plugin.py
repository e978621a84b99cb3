"""The pytest plugin `from_scratch`: options, fixtures and hooks. An entry point, so claims may lie anywhere."""

from __future__ import annotations

import argparse
import re
import secrets
from collections.abc import Generator, Iterator
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

from checks.checkpoint.device import choose_device
from checks.checkpoint.errors import CheckpointUnavailable
from checks.claim.cases import CandidateParameter, PairParameter
from checks.claim.collector import (
    CASE,
    CLAIM,
    ClaimModule,
    claim_files,
    claim_module,
    in_pair_order,
    parametrize,
    shown_path,
)
from checks.claim.outcome import classify
from checks.evidence.judge import ContradictingEvidence, Judge, JudgeContext
from checks.evidence.record import UNAVAILABLE
from checks.evidence.store import NullStore, ResultStore, Store, StoreError
from checks.evidence.thresholds import STRENGTHS, families, thresholds
from checks.pair.asked import ask_for_fingerprints, ask_for_neurons, layer_visitors_for
from checks.pair.reading import Reading
from checks.report.session import REVISIONS, REVISIONS_INPUT, ClaimSession
from checks.streaming.planned_source import NotPlanned
from checks.streaming.read_plan import MODES

if TYPE_CHECKING:
    from checks.checkpoint.hub_access import HubAccess

SUITE = "from scratch"
HUB: pytest.StashKey[HubAccess] = pytest.StashKey()
JUDGE = pytest.StashKey[Judge]()
STORE: pytest.StashKey[ResultStore] = pytest.StashKey()
SEED = pytest.StashKey[int]()
EVIDENCE_PROPERTY = "evidence"

BUDGET_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
NO_STORE = "none"
DRAWN = "drawn"
# Where a seed that was drawn is kept, and how workers of xdist are handed it.
SEED_KEY = ("seed", "1")
SEED_INPUT = "from_scratch_seed"


def pytest_addoption(parser: pytest.Parser) -> None:
    """The suite's options."""
    group = parser.getgroup(SUITE, "claims that a model was trained from scratch")

    def add(option: str, **attributes: Any) -> None:
        # Other plugins may keep a value called `offline` too.
        group.addoption(f"--{option}", dest=f"from_scratch_{option.replace('-', '_')}", **attributes)

    add("report", metavar="DIR", default=None, help="write verdict.json and evidence.jsonl into DIR")
    add(
        "allow-missing",
        action="store_true",
        help="skip a case whose weights cannot be had as 'unavailable' instead of making it an error",
    )
    add(
        "offline",
        action="store_true",
        help="use no network: models on the hub are read from its local cache or are missing (implies --allow-missing)",
    )
    add(
        "torch-device",
        metavar="DEVICE",
        default="auto",
        help="where statistics are computed: auto (a GPU for each worker, else the CPU), cpu, cuda or cuda:N",
    )
    add(
        "read",
        choices=MODES,
        default=None,
        help="how much of the weights to read: screen (may refute, never support), sample (10 to 20 %%) or full; "
        "default: full for pairs on this disk, screen where a model is streamed from the hub",
    )
    add(
        "budget",
        metavar="BYTES",
        type=parse_budget,
        default=None,
        help="bytes to read of both models of a pair at most, such as 500MB or 5GB "
        "(default: 5GB for screen, a fifth of both for sample)",
    )
    add(
        "seed",
        metavar="N",
        type=parse_seed,
        default=0,
        help="draws what screen and sample read (default: 0); drawn: a number that nobody knows beforehand, kept with "
        "the store so that a run resumes with it",
    )
    add(
        "store",
        metavar="DIR",
        default=None,
        help="keep measured layers in DIR, so that a killed run resumes and a second one is instant "
        "(default: in pytest's cache; none: keep nothing)",
    )


def parse_seed(text: str) -> int | None:
    """A whole number; None for `drawn`. Raises argparse.ArgumentTypeError."""
    if text == DRAWN:
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no seed: expected a whole number, or {DRAWN}") from None


def parse_budget(text: str) -> int:
    """Bytes of `5GB`, `500 MB`, `1.5G` or `1000000`, in powers of ten. Raises argparse.ArgumentTypeError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", text, re.IGNORECASE)
    budget = round(float(found[1]) * BUDGET_UNITS[found[2].upper()]) if found else 0
    if budget <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of bytes: expected such as 5GB, 500MB or 1000000")
    return budget


def pytest_configure(config: pytest.Config) -> None:
    """Marks for `-m`, and on the controller the collector of verdicts."""
    for family in families():
        config.addinivalue_line("markers", f"{family}: checks of the family {family}")
    for strength in STRENGTHS:
        config.addinivalue_line("markers", f"{strength}: checks whose evidence is {strength}")
    if config.getoption("from_scratch_store") is not None:
        store_of(config)
    if not is_worker(config):
        config.pluginmanager.register(ClaimSession(config), "from_scratch_session")


def is_worker(config: pytest.Config) -> bool:
    """Is this process a worker of xdist?"""
    return hasattr(config, "workerinput")


# Collection


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> ClaimModule | None:
    """Claim files become modules."""
    return claim_module(file_path, parent)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Checks get the cases of their claim."""
    module = metafunc.definition.getparent(ClaimModule)
    if module is not None:
        parametrize(metafunc, module)


def pytest_itemcollected(item: pytest.Item) -> None:
    """Marks for `-m`, and the claim file with its YAML line as the location that reports and JUnit name."""
    if CASE in item.stash:
        case, claim = item.stash[CASE], item.stash[CLAIM]
        for mark in _marks()[case.check]:
            item.add_marker(mark)
        item.location = (item.nodeid.partition("::")[0], case.line - 1, f"{claim.name}: {case.id}")


@cache
def _marks() -> dict[str, tuple[pytest.MarkDecorator, pytest.MarkDecorator]]:
    """Family and strength of every check as marks."""
    return {
        check: (getattr(pytest.mark, one.family), getattr(pytest.mark, one.strength))
        for check, one in thresholds().items()
    }


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Generator[None, None, None]:
    """The order in which each pair is opened once, whatever other plugins shuffled."""
    yield
    items[:] = in_pair_order(items)


# Fixtures


def device_of(config: pytest.Config) -> str:
    """The torch device of this worker.

    The CPU is used with one thread: sums then have the same last digits on every machine, with and without workers, and
    workers do not fight for cores. More cores are used with `-n`.
    """
    import torch

    worker_id = str(getattr(config, "workerinput", {}).get("workerid", "gw0"))
    device = choose_device(str(config.getoption("from_scratch_torch_device")), int(worker_id.removeprefix("gw")))
    if device == "cpu":
        torch.set_num_threads(1)
    return device


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> str:
    """The torch device of this worker, as text."""
    return device_of(pytestconfig)


def hub_of(config: pytest.Config) -> HubAccess:
    """The hub as this run sees it, with the commits that the controller resolved; every repository is opened once."""
    from checks.checkpoint.hub_access import HubAccess, Revisions

    if HUB not in config.stash:
        handed = getattr(config, "workerinput", {}).get(REVISIONS_INPUT)
        revisions = config.stash.get(REVISIONS, None) if handed is None else Revisions.from_plain(handed)
        config.stash[HUB] = HubAccess(bool(config.getoption("from_scratch_offline")), revisions)
    return config.stash[HUB]


def store_of(config: pytest.Config) -> ResultStore:
    """What keeps measured layers: of the directory that was named, else in pytest's cache if that is on.

    All workers share it. Raises pytest.UsageError for a directory that cannot be made.
    """
    if STORE not in config.stash:
        named = config.getoption("from_scratch_store")
        directory: Path | None = None
        if named is not None and named != NO_STORE:
            directory = config.invocation_params.dir / named
        elif named is None and (cache_of_run := getattr(config, "cache", None)) is not None:
            directory = cache_of_run.mkdir("from_scratch_store")
        try:
            config.stash[STORE] = NullStore() if directory is None else Store(directory)
        except StoreError as error:
            raise pytest.UsageError(f"--store: {error}") from error
    return config.stash[STORE]


def seed_of(config: pytest.Config) -> int:
    """What draws the part that is read: `--seed`, or the number that was drawn for this store, else for this run.

    Workers of xdist get the controller's.
    """
    stated: int | None = config.getoption("from_scratch_seed")
    if stated is not None:
        return stated
    if SEED not in config.stash:
        handed = getattr(config, "workerinput", {}).get(SEED_INPUT)
        kept = store_of(config).measure(SEED_KEY, lambda: secrets.randbits(32)) if handed is None else handed
        config.stash[SEED] = int(kept)
    return config.stash[SEED]


def checks_of(session: pytest.Session, parameter: PairParameter) -> set[str]:
    """The checks of all selected cases of this pair: one pass over the weights serves them all."""
    return {
        item.stash[CASE].check
        for item in session.items
        if CASE in item.stash
        and getattr(item, "callspec", None) is not None
        and item.callspec.params.get("pair") == parameter  # type: ignore[attr-defined]
    }


@pytest.fixture(scope="session")
def candidate(request: pytest.FixtureRequest) -> Any:
    """The model that the claim is about, or one component of it."""
    from checks.checkpoint.model import Model
    from checks.pair.candidate import Candidate

    parameter: CandidateParameter = _parameter(request)
    hub = hub_of(request.config)
    return Candidate(
        parameter.candidate,
        parameter.component,
        parameter.prefixes,
        parameter.training,
        parameter.panel,
        hub,
        references=tuple(Model(one.source, parameter.component, one.prefixes, hub) for one in parameter.references),
        disclosed=parameter.disclosed,
        behavior=parameter.behavior,
        device=partial(device_of, request.config),
        offline=bool(request.config.getoption("from_scratch_offline")),
        read=request.config.getoption("from_scratch_read"),
    )


@pytest.fixture(scope="session")
def pair(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The candidate and one reference, opened when a check first asks for weights; shared by all checks of the pair."""
    from checks.checkpoint.model import Model
    from checks.pair.pair import Pair

    parameter: PairParameter = _parameter(request)
    hub = hub_of(request.config)
    asked = checks_of(request.session, parameter)
    opened = Pair(
        Model(parameter.candidate, parameter.component, parameter.candidate_prefixes, hub),
        Model(parameter.reference, parameter.component, parameter.reference_prefixes, hub),
        # Chosen when weights are about to be read: choosing imports torch.
        partial(device_of, request.config),
        parameter.claimed_prefixes,
        tests_neurons=ask_for_neurons(asked),
        takes_fingerprints=ask_for_fingerprints(asked),
        layer_visitors=layer_visitors_for(asked),
        store=store_of(request.config),
        initial=parameter.initial,
        reading=Reading(
            request.config.getoption("from_scratch_read"),
            request.config.getoption("from_scratch_budget"),
            seed_of(request.config),
        ),
    )
    yield opened
    opened.close()


def _parameter(request: pytest.FixtureRequest) -> Any:
    if not hasattr(request, "param"):
        raise pytest.UsageError(f"the fixture {request.fixturename!r} of from-scratch belongs to the cases of claims")
    return request.param


@pytest.fixture
def judge(request: pytest.FixtureRequest) -> Judge:
    """Knows the case's threshold, records the evidence, and passes, fails or skips."""
    item = request.node
    if CASE not in item.stash:
        raise pytest.UsageError("the fixture 'judge' of from-scratch belongs to the cases of claims")
    case, claim = item.stash[CASE], item.stash[CLAIM]
    module = item.getparent(ClaimModule)
    path = shown_path(item.path, request.config.invocation_params.dir)
    context = JudgeContext(
        case_id=case.id,
        claim=claim.name,
        place=f"{path}:{case.line}",
        reference=case.reference,
        disclosed=case.reference in claim.component(case.component).disclosed,
        calibrated_cases=module.calibrated,
        overrides={check: override.values for check, override in claim.overrides.items()},
    )
    made = Judge(case.check, context)
    item.stash[JUDGE] = made
    return made


# Outcomes


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """A contradiction and missing weights explain themselves: pytest shows their message without a traceback.

    A check that needs weights which this run does not read leaves its question open.
    """
    try:
        return (yield)
    except NotPlanned as error:
        _leave_open(pyfuncitem, error)
    except (ContradictingEvidence, CheckpointUnavailable) as error:
        if CASE not in pyfuncitem.stash:
            raise
        if isinstance(error, CheckpointUnavailable) and allows_missing(pyfuncitem.config):
            raise _explained(pytest.skip.Exception(f"{UNAVAILABLE}: {error}"), error) from None
        raise _explained(pytest.fail.Exception(str(error), pytrace=False), error) from None


def _leave_open(item: pytest.Function, error: NotPlanned) -> NoReturn:
    """Record that a case could not be decided from what was read. Raises pytest's skip, or the error itself."""
    judge: Judge | None = item.stash.get(JUDGE, None)
    pair: Any = item.funcargs.get("pair")
    if judge is None or judge.evidence is not None or pair is None or pair.plan is None:
        raise error
    # Without the place of the bytes: the same evidence is to have the same words on every machine.
    judge.inconclusive(
        f"read only in part: this needs weights that --read {pair.plan.request.mode} does not read; read more with a "
        "larger --budget, or all with --read full",
        read=pair.read(),
    )


def allows_missing(config: pytest.Config) -> bool:
    """Are weights that cannot be had a skip instead of an error?"""
    return bool(config.getoption("from_scratch_allow_missing") or config.getoption("from_scratch_offline"))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Only recorded contradicting evidence is a failure; every other exception, in any phase, is an error."""
    report = yield
    if CASE not in item.stash:
        return report
    case = item.stash[CASE]
    evidence = classify(
        report,
        check=case.check,
        evidence=item.stash[JUDGE].evidence if JUDGE in item.stash else None,
        raised=_cause(call.excinfo.value) if call.excinfo else None,
        allow_missing=allows_missing(item.config),
    )
    if evidence is not None:
        properties: list[tuple[str, object]] = [(EVIDENCE_PROPERTY, evidence.as_json()), *evidence.headline()]
        item.user_properties[:] = [one for one in item.user_properties if one[0] not in dict(properties)] + properties
        report.user_properties = list(item.user_properties)
    return report


def _explained(replacement: BaseException, original: BaseException) -> BaseException:
    """One of pytest's own outcomes in place of an exception of the suite, which it remembers."""
    replacement.from_scratch_original = original  # type: ignore[attr-defined]
    return replacement


def _cause(raised: BaseException) -> BaseException:
    """The exception that `pytest_pyfunc_call` replaced, or the one that was raised."""
    original = getattr(raised, "from_scratch_original", None)
    return original if isinstance(original, ContradictingEvidence | CheckpointUnavailable) else raised


# xdist


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Hand a drawn seed to a worker, so that all of them read the same."""
    if claim_files(node.config) and node.config.getoption("from_scratch_seed") is None:
        node.workerinput[SEED_INPUT] = seed_of(node.config)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Cases of one claim, component and reference go to one worker (`--dist loadgroup` is broken on pytest 9.2)."""
    if not claim_files(config):
        return None
    from xdist.scheduler import LoadScopeScheduling

    class PairScheduling(LoadScopeScheduling):  # type: ignore[misc]
        """Load scheduling with the pair as the unit of work."""

        def _split_scope(self, nodeid: str) -> str:
            return pair_group(nodeid)

        def remove_node(self, node: Any) -> str | None:
            """A case that killed its worker is not handed to the next one, as xdist would; the rest of its pair is."""
            units = self.assigned_work[node].values()
            pending = next(((unit, case) for unit in units for case, done in unit.items() if not done), None)
            if pending is not None:
                unit, crashed = pending
                unit[crashed] = True
            super().remove_node(node)
            # xdist puts finished units back too: a worker that is given one waits for work that never comes.
            for scope in [scope for scope, unit in self.workqueue.items() if all(unit.values())]:
                del self.workqueue[scope]
            if self.collection is not None:
                self.schedule()
            return pending[1] if pending is not None else None

        def schedule(self) -> None:
            """After a worker was replaced, hand out as much as at first.

            A worker runs its last case only once it has another, or knows that there is none; one unit may be one case.
            """
            rounds = 1 if self.collection is None else len(self.workqueue) + 1
            for _ in range(rounds):
                super().schedule()

    return PairScheduling(config, log)


def pair_group(nodeid: str) -> str:
    """The unit of work of a node id: claim file, component and reference; the node id itself for other tests.

    The controller has nothing but node ids, so the group is a function of the id alone.
    """
    path, _, rest = nodeid.partition("::")
    if not path.endswith((".yaml", ".yml")):
        return nodeid
    found = re.search(r"\[([^\]]*)\]$", rest)
    parameters = re.sub(r"-\d+$", "", found.group(1)) if found else ""
    return f"{path}::{parameters}"
