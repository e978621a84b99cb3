"""The pytest plugin `from_scratch`: options, fixtures and hooks. An entry point, so claims may lie anywhere."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest

from checks.checkpoint.device import choose_device
from checks.checkpoint.errors import CheckpointUnavailable
from checks.claim.cases import CandidateParameter, PairParameter
from checks.claim.collector import (
    CASE,
    CLAIM,
    ClaimModule,
    claim_files,
    in_pair_order,
    is_claim_file,
    parametrize,
    shown_path,
)
from checks.claim.outcome import classify
from checks.evidence.judge import ContradictingEvidence, Judge, JudgeContext
from checks.evidence.record import UNAVAILABLE
from checks.evidence.thresholds import STRENGTHS, families, thresholds
from checks.report.session import ClaimSession

SUITE = "from scratch"
JUDGE = pytest.StashKey[Judge]()
EVIDENCE_PROPERTY = "evidence"


def pytest_addoption(parser: pytest.Parser) -> None:
    """The suite's options."""
    group = parser.getgroup(SUITE, "claims that a model was trained from scratch")
    group.addoption("--report", metavar="DIR", default=None, help="write verdict.json and evidence.jsonl into DIR")
    group.addoption(
        "--allow-missing",
        action="store_true",
        help="skip a case whose weights cannot be had as 'unavailable' instead of making it an error",
    )
    group.addoption("--offline", action="store_true", help="use no network (implies --allow-missing)")
    group.addoption(
        "--torch-device",
        metavar="DEVICE",
        default="auto",
        help="where statistics are computed: auto (a GPU for each worker, else the CPU), cpu, cuda or cuda:N",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Marks for `-m`, and on the controller the collector of verdicts."""
    for family in families():
        config.addinivalue_line("markers", f"{family}: checks of the family {family}")
    for strength in STRENGTHS:
        config.addinivalue_line("markers", f"{strength}: checks whose evidence is {strength}")
    if not is_worker(config):
        config.pluginmanager.register(ClaimSession(config), "from_scratch_session")


def is_worker(config: pytest.Config) -> bool:
    """Is this process a worker of xdist?"""
    return hasattr(config, "workerinput")


# Collection


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> ClaimModule | None:
    """Claim files become modules."""
    if is_claim_file(file_path, parent.config):
        module: ClaimModule = ClaimModule.from_parent(parent, path=file_path)
        return module
    return None


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


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The order in which each pair is opened once."""
    items[:] = in_pair_order(items)


# Fixtures


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> Callable[[], str]:
    """Chooses the torch device of this worker, once weights are about to be read: choosing imports torch."""
    worker_id = str(getattr(pytestconfig, "workerinput", {}).get("workerid", "gw0"))
    return partial(choose_device, str(pytestconfig.getoption("torch_device")), int(worker_id.removeprefix("gw")))


@pytest.fixture(scope="session")
def candidate(request: pytest.FixtureRequest) -> Any:
    """The model that the claim is about, or one component of it."""
    from checks.checkpoint.candidate import Candidate

    parameter: CandidateParameter = request.param
    return Candidate(
        parameter.candidate,
        parameter.component,
        parameter.prefixes,
        parameter.stated_total,
        parameter.stated_active,
        parameter.panel,
    )


@pytest.fixture(scope="session")
def pair(request: pytest.FixtureRequest, device: Callable[[], str]) -> Any:
    """The candidate and one reference, opened when a check first asks for weights; shared by all checks of the pair."""
    from checks.checkpoint.model import Model
    from checks.checkpoint.pair import Pair

    parameter: PairParameter = request.param
    return Pair(
        Model(parameter.candidate, parameter.component, parameter.candidate_prefixes),
        Model(parameter.reference, parameter.component, parameter.reference_prefixes),
        device,
    )


@pytest.fixture
def judge(request: pytest.FixtureRequest) -> Judge:
    """Knows the case's threshold, records the evidence, and passes, fails or skips."""
    item = request.node
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
    """A contradiction and missing weights explain themselves: pytest shows their message without a traceback."""
    try:
        return (yield)
    except (ContradictingEvidence, CheckpointUnavailable) as error:
        if CASE not in pyfuncitem.stash:
            raise
        if isinstance(error, CheckpointUnavailable) and allows_missing(pyfuncitem.config):
            raise pytest.skip.Exception(f"{UNAVAILABLE}: {error}") from None
        raise pytest.fail.Exception(str(error), pytrace=False) from None


def allows_missing(config: pytest.Config) -> bool:
    """Are weights that cannot be had a skip instead of an error?"""
    return bool(config.getoption("allow_missing") or config.getoption("offline"))


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


def _cause(raised: BaseException) -> BaseException:
    """What `pytest_pyfunc_call` replaced by an outcome of pytest's."""
    context = raised.__context__
    return context if isinstance(context, ContradictingEvidence | CheckpointUnavailable) else raised


@pytest.hookimpl(optionalhook=True)
def pytest_handlecrashitem(crashitem: str, report: pytest.TestReport) -> None:
    """xdist reports the case that a worker died on as failed; a dead worker accuses nobody."""
    if "::" in crashitem and crashitem.partition("::")[0].endswith((".yaml", ".yml")):
        report.when = "setup"


# xdist


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
            return pending[1] if pending is not None else None

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
