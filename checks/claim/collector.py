"""Claim files as pytest modules: their cases are ordinary parametrized test functions."""

from __future__ import annotations

import fnmatch
import os
import re
import types
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from checks.claim.cases import (
    Case,
    calibrated_cases,
    candidate_parameter,
    cases_of_check,
    pair_parameter,
    selected_checks,
)
from checks.claim.discovery import discovered_checks
from checks.claim.load import load_claim
from checks.claim.model import Claim
from checks.claim.source import ClaimError

CLAIM_SUFFIXES = (".yaml", ".yml")
CLAIMS_DIRECTORY = "claims"

# A file that nobody named is a claim only if it says so: other projects keep other YAML in directories called claims.
_SAYS_CLAIM = re.compile(r"^(?:claim|statement|model)\s*:", re.MULTILINE)

# Claims that this process collected, or why one of them could not be used.
COLLECTED: pytest.StashKey[dict[Path, Claim | ClaimError]] = pytest.StashKey()
CASE = pytest.StashKey[Case]()
CLAIM = pytest.StashKey[Claim]()
ORDER = pytest.StashKey[tuple[int, int]]()  # the pair's place in the claim, then the case's place in its expansion


class ClaimModule(pytest.Module):
    """A claim file. Its attributes are the selected checks, each parametrized with the cases of this claim."""

    claim: Claim
    calibrated: int

    def collect(self) -> Iterable[pytest.Item | pytest.Collector]:
        """The cases, through pytest's own function collection, so that fixtures, marks and ids are all pytest's."""
        collected = self.config.stash.setdefault(COLLECTED, {})
        try:
            self.claim = collected[self.path.resolve()] = load_claim(self.path.resolve())
        except ClaimError as error:
            collected[self.path.resolve()] = error
            # Located lines without a traceback, relative to where the user stands.
            here = self.config.invocation_params.dir
            shown = shown_path(error.path, here)
            lines = [problem.render(Path(shown)) for problem in error.problems]
            raise self.CollectError("\n".join(lines)) from error
        self.calibrated = calibrated_cases(self.claim)
        self._pairs: dict[tuple[str | None, str | None], int] = {}
        self._collected = 0
        selected = {check.id: check.function for check in selected_checks(self.claim)}
        module = types.ModuleType(self.claim.name, self.claim.statement)
        vars(module).update(selected)
        self.obj = module
        for name, function in selected.items():
            # A check without a case (no layers, no panel) would become one unparametrized, broken item.
            if next(cases_of_check(self.claim, discovered_checks()[name]), None) is not None:
                yield from self._items(name, function)

    def istestfunction(self, obj: object, name: str) -> bool:
        """Checks are named by the question, not `test_…`."""
        return name in vars(self.obj)

    def _items(self, name: str, function: object) -> Iterator[pytest.Item]:
        made = self.ihook.pytest_pycollect_makeitem(collector=self, name=name, obj=function)
        for item, case in zip(made, cases_of_check(self.claim, discovered_checks()[name]), strict=True):
            pair = self._pairs.setdefault((case.component, case.reference), len(self._pairs))
            self._collected += 1
            item.stash[CASE] = case
            item.stash[CLAIM] = self.claim
            item.stash[ORDER] = (pair, self._collected)
            yield item


def parametrize(metafunc: pytest.Metafunc, module: ClaimModule) -> None:
    """Give a check its cases: the pair (or the candidate) first and session-scoped, then the layer."""
    claim = module.claim
    check = discovered_checks()[metafunc.definition.name]
    cases = list(cases_of_check(claim, check))
    ids = [case.parameters for case in cases]
    if not check.takes_pair:
        values = [candidate_parameter(claim, claim.component(case.component)) for case in cases]
        # An undivided candidate needs no brackets: its only parameter has no id.
        shown = ids if any(ids) else [pytest.HIDDEN_PARAM]
        metafunc.parametrize("candidate", values, ids=shown, indirect=True, scope="session")
        return
    parameters = {
        (component.name, reference.source.name): pair_parameter(claim, component, reference)
        for component in claim.components
        for reference in component.panel
    }
    pairs = [parameters[case.component, str(case.reference)] for case in cases]
    if check.takes_layer:
        both = [(pair, case.layer) for pair, case in zip(pairs, cases, strict=True)]
        metafunc.parametrize(("pair", "layer"), both, ids=ids, indirect=["pair"], scope="session")
    else:
        metafunc.parametrize("pair", pairs, ids=ids, indirect=True, scope="session")


def in_pair_order(items: list[pytest.Item]) -> list[pytest.Item]:
    """Cases of one claim side by side by pair, so that a session opens each pair once; other tests keep their place.

    pytest's own reordering of session-scoped parameters treats the layer like the pair and scatters both.
    """
    claims: dict[Path, int] = {}
    for item in items:
        if CASE in item.stash:
            claims.setdefault(item.path, len(claims))
    cases = (item for item in items if CASE in item.stash)
    in_order = iter(sorted(cases, key=lambda item: (claims[item.path], item.stash[ORDER])))
    return [next(in_order) if CASE in item.stash else item for item in items]


def claim_module(path: Path, parent: pytest.Collector) -> ClaimModule | None:
    """The module of a YAML file that is a claim of this run; None for any other file."""
    if not is_claim_file(path, named_files(parent.config)):
        return None
    config = parent.config
    # Outside the root directory pytest leaves the path out of node ids, which must tell claims apart.
    outside = not path.is_relative_to(config.rootpath)
    named: dict[str, Any] = {"nodeid": Path(os.path.relpath(path, config.rootpath)).as_posix()} if outside else {}
    module: ClaimModule = ClaimModule.from_parent(parent, path=path, **named)
    return module


def is_claim_file(path: Path, named: frozenset[Path]) -> bool:
    """Is this YAML file a claim: named on the command line, or directly in a directory `claims/` and saying so?"""
    if path.suffix not in CLAIM_SUFFIXES:
        return False
    if path.resolve() in named:
        return True
    return path.parent.name == CLAIMS_DIRECTORY and _says_claim(path)


def _says_claim(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return _SAYS_CLAIM.search(file.read(100_000)) is not None
    except OSError:
        return False


def named_paths(config: pytest.Config) -> list[Path]:
    """The paths of the command line, without `::…`."""
    return [config.invocation_params.dir / argument.partition("::")[0] for argument in config.args]


def named_files(config: pytest.Config) -> frozenset[Path]:
    """The claim files that the command line names."""
    return frozenset(path.resolve() for path in named_paths(config) if path.suffix in CLAIM_SUFFIXES and path.is_file())


def claims_of_run(config: pytest.Config) -> dict[Path, Claim | ClaimError]:
    """The claims of this run, and why one of them cannot be used.

    A process that collects knows them from its collection. xdist's controller collects nothing and looks for itself.
    """
    if config.getoption("dist", "no") == "no":
        return config.stash.get(COLLECTED, {})
    found: dict[Path, Claim | ClaimError] = {}
    for path in claim_files(config):
        try:
            found[path] = load_claim(path)
        except ClaimError as error:
            found[path] = error
    return found


def claim_files(config: pytest.Config) -> list[Path]:
    """The claim files that the command line leads to, found without collecting."""
    found: dict[Path, None] = {}
    for path in named_paths(config):
        if path.is_dir():
            found.update(dict.fromkeys(_claims_below(path, config)))
        elif path.resolve() in named_files(config):
            found[path.resolve()] = None
    return list(found)


def _claims_below(directory: Path, config: pytest.Config) -> Iterator[Path]:
    ignored = {Path(one).resolve() for one in (config.getoption("ignore") or ())}
    patterns = config.getini("norecursedirs")
    named = named_files(config)
    for entry in sorted(directory.iterdir()):
        if entry.resolve() in ignored:
            continue
        if entry.is_dir():
            if not any(fnmatch.fnmatch(entry.name, pattern) for pattern in patterns) and not entry.is_symlink():
                yield from _claims_below(entry, config)
        elif is_claim_file(entry, named):
            yield entry.resolve()


def shown_path(path: Path, directory: Path) -> str:
    """A path as a person standing in `directory` would type it."""
    try:
        return path.resolve().relative_to(directory.resolve()).as_posix()
    except ValueError:
        return str(path)
