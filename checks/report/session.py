"""The controller's side of a run: reports in, verdicts out. The same with and without xdist."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from checks.claim.cases import expand
from checks.claim.collector import CLAIM, claims_of_run, named_files, shown_path
from checks.claim.model import Claim, ModelSource
from checks.claim.source import ClaimError
from checks.claim.verdict import EXIT_ERRORS, EXIT_REFUTED, CaseResult, Verdict, decide, overall_exit_status
from checks.evidence.record import ERROR, Evidence, evidence_from_json
from checks.report.files import write_report
from checks.report.terminal import write_verdicts

if TYPE_CHECKING:
    from checks.checkpoint.hub_access import Revisions

# Under this name workers of xdist find the commits that the controller resolved.
REVISIONS_INPUT = "from_scratch_revisions"
REVISIONS: pytest.StashKey[Revisions] = pytest.StashKey()


class UnpinnedRevision(pytest.PytestWarning):
    """A model of a claim names a branch, or nothing, where a commit sha would name the same weights for ever."""


class ClaimSession:
    """Collects the reports of claim cases and computes verdicts from them and its own expansion of the claims.

    xdist's controller collects nothing and never sees a deselected case: hence the expansion of its own.
    """

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.claims: dict[Path, Claim] = {}
        self.invalid: set[Path] = set()
        self.evidence: dict[tuple[Path, str], Evidence] = {}
        self.failed = 0
        self.other_failures = False
        self.report_error: OSError | None = None
        self.verdicts: list[Verdict] = []
        self._paths: dict[str, Path] = {}

    @pytest.hookimpl(trylast=True)
    def pytest_sessionstart(self) -> None:
        """Make the report directory, and on xdist's controller read the claims. Raises pytest.UsageError."""
        directory = self._report_directory()
        if directory is not None:
            try:
                directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise pytest.UsageError(f"--report {directory}: cannot be made a directory: {error}") from error
        self._read_claims()

    def pytest_collection_finish(self) -> None:
        """Read the claims that this process collected. Raises pytest.UsageError when two claims have one name."""
        self._read_claims()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> None:
        """Before the first case, find out which commits the models of the selected cases are. Returns nothing."""
        items = getattr(session, "items", ())  # xdist's controller has none, and did it for its workers
        asked = {item.stash[CLAIM].path: item.stash[CLAIM] for item in items if CLAIM in item.stash}
        if asked and not self.config.getoption("collectonly"):
            self._resolve_revisions(asked)

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Hand the commits to a worker of xdist, which starts before anything is collected."""
        self._read_claims()
        if self.claims:
            node.workerinput[REVISIONS_INPUT] = self._resolve_revisions(self.claims).as_plain()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the evidence of a case."""
        self.failed += report.failed
        if not self.claims:
            return
        path, _, case_id = report.nodeid.partition("::")
        claim_path = self._resolved(path)
        if claim_path not in self.claims:
            self.other_failures = self.other_failures or report.failed
            return
        key = (claim_path, case_id)
        recorded = [text for name, text in report.user_properties if name == "evidence"]
        if recorded:
            self.evidence[key] = evidence_from_json(str(recorded[-1]))
        elif report.failed:
            check = case_id.partition("[")[0]
            self.evidence[key] = Evidence(check, ERROR, "the worker that ran this case crashed")

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A module of ordinary tests that cannot be collected is a failure of its own."""
        if report.failed and self._resolved(report.nodeid.partition("::")[0]) not in {*self.claims, *self.invalid}:
            self.other_failures = True

    @pytest.hookimpl(optionalhook=True)
    def pytest_handlecrashitem(self, crashitem: str, report: pytest.TestReport) -> None:
        """xdist reports the case that a worker died on as failed; a dead worker accuses nobody."""
        if self._resolved(crashitem.partition("::")[0]) in self.claims:
            report.when = "setup"

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> Generator[None, None, None]:
        """Decide, write the report files, and set the exit status of the contract."""
        if self.evidence and not self.config.getoption("collectonly"):
            self.verdicts = [self._verdict(path, claim) for path, claim in self.claims.items() if self._was_asked(path)]
            directory = self._report_directory()
            if directory is not None:
                try:
                    write_report(directory, self.verdicts, self._shown, self._where)
                except OSError as error:
                    self.report_error = error
        yield
        if self.verdicts:
            session.exitstatus = self._exit_status(exitstatus)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """What a person reads at a glance."""
        if self.verdicts:
            write_verdicts(terminalreporter, self.verdicts, self._shown)
        if self.report_error is not None:
            terminalreporter.write_line(f"the report could not be written: {self.report_error}", red=True)

    def _read_claims(self) -> None:
        names = {claim.name: path for path, claim in self.claims.items()}
        for path, claim in claims_of_run(self.config).items():
            if isinstance(claim, ClaimError):
                self.invalid.add(path)
                continue
            if path in self.claims:
                continue
            if claim.name in names:
                raise pytest.UsageError(
                    f"{self._shown(path)}:{claim.line}: the claim {claim.name!r} stands in "
                    f"{self._shown(names[claim.name])} too; give one of them another name"
                )
            names[claim.name] = path
            self.claims[path] = claim

    def _resolve_revisions(self, claims: Mapping[Path, Claim]) -> Revisions:
        """Which commits do the branches that these claims name mean in this run? Asked once, with a warning."""
        from checks.checkpoint.hub_access import resolve_revisions

        if REVISIONS not in self.config.stash:
            sources = [source for claim in claims.values() for source in _sources(claim)]
            found = resolve_revisions(sources, bool(self.config.getoption("from_scratch_offline")))
            self.config.stash[REVISIONS] = found
            pinned = dict.fromkeys(_pinned(source, found) for source in sources)
            if any(pinned):
                self._warn(
                    "these models name no commit sha; this run reads the commits that they stand for now. Written into "
                    "the claim, they name the same weights for ever:\n" + "\n".join(filter(None, pinned))
                )
        return self.config.stash[REVISIONS]

    def _warn(self, text: str) -> None:
        try:
            self.config.issue_config_time_warning(UnpinnedRevision(text), 2)
        except UnpinnedRevision as error:  # the user's filters make an error of it
            raise pytest.UsageError(str(error)) from None

    def _where(self, source: ModelSource) -> str:
        """Where a model's weights are, with the commit that its branch names in this run."""
        return self.config.stash[REVISIONS].where(source) if REVISIONS in self.config.stash else source.where

    def _exit_status(self, exitstatus: int) -> int:
        ours = overall_exit_status(self.verdicts)
        stopped = bool(self.config.getoption("maxfail")) and self.failed >= self.config.getoption("maxfail")
        ordinary = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
        if ours == EXIT_REFUTED and exitstatus <= pytest.ExitCode.INTERRUPTED:
            # What was found stays found, whatever interrupted the rest.
            return EXIT_REFUTED
        if not ordinary and not (stopped and exitstatus == pytest.ExitCode.INTERRUPTED):
            return exitstatus
        if self.invalid:
            return pytest.ExitCode.INTERRUPTED
        if self.other_failures:
            return pytest.ExitCode.TESTS_FAILED
        return EXIT_ERRORS if self.report_error is not None else ours

    def _was_asked(self, path: Path) -> bool:
        """Was the claim named on the command line, or did any of its cases run?"""
        return path in named_files(self.config) or any(claim_path == path for claim_path, _ in self.evidence)

    def _verdict(self, path: Path, claim: Claim) -> Verdict:
        results = [CaseResult(case, self.evidence.get((path, case.id))) for case in expand(claim)]
        return decide(claim, results)

    def _report_directory(self) -> Path | None:
        directory = self.config.getoption("from_scratch_report")
        return self.config.invocation_params.dir / directory if directory else None

    def _resolved(self, path: str) -> Path:
        """The file that the first part of a node id names."""
        if path not in self._paths:
            self._paths[path] = (self.config.rootpath / path).resolve()
        return self._paths[path]

    def _shown(self, path: Path) -> str:
        return shown_path(path, self.config.invocation_params.dir)


def _sources(claim: Claim) -> Iterator[ModelSource]:
    """The candidate and every reference of a claim."""
    yield claim.model
    for component in claim.components:
        for reference in component.panel:
            yield reference.source


def _pinned(source: ModelSource, revisions: Revisions) -> str | None:
    """How a claim names the commit of a model; None if it does already, or the commit could not be found out."""
    commit = None if source.path is not None else revisions.commits.get(source.where)
    return commit and f"  {{name: {source.name}, repo: {source.repo}, revision: {commit}}}"
