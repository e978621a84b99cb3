"""The controller's side of a run: reports in, verdicts out. The same with and without xdist."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest

from checks.claim.cases import expand
from checks.claim.collector import claim_files, shown_path
from checks.claim.load import load_claim
from checks.claim.model import Claim
from checks.claim.source import ClaimError
from checks.claim.verdict import CaseResult, Verdict, decide, overall_exit_status
from checks.evidence.record import ERROR, Evidence, evidence_from_json
from checks.report.files import write_report
from checks.report.terminal import write_verdicts


class ClaimSession:
    """Collects the reports of claim cases and computes verdicts from them and its own expansion of the claims.

    xdist's controller collects nothing and never sees a deselected case: hence the expansion of its own.
    """

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.claims: dict[Path, Claim] = {}
        self.invalid: list[ClaimError] = []
        self.evidence: dict[tuple[Path, str], Evidence] = {}
        self.other_failures = False
        self.verdicts: list[Verdict] = []

    @pytest.hookimpl(trylast=True)
    def pytest_sessionstart(self) -> None:
        """Read the claims of this run. Raises pytest.UsageError when two claims have one name."""
        places: dict[str, Path] = {}
        for path in claim_files(self.config):
            try:
                claim = load_claim(path)
            except ClaimError as error:
                self.invalid.append(error)
                continue
            if claim.name in places:
                raise pytest.UsageError(
                    f"{self._shown(path)}:{claim.line}: the claim {claim.name!r} stands in "
                    f"{self._shown(places[claim.name])} "
                    "too; give one of them another name"
                )
            places[claim.name] = path
            self.claims[path.resolve()] = claim

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the evidence of a case; a later phase of the same case can only make it worse."""
        path, _, case_id = report.nodeid.partition("::")
        claim_path = (self.config.rootpath / path).resolve()
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
        path = (self.config.rootpath / report.nodeid.partition("::")[0]).resolve()
        is_claim = path in self.claims or path in {error.path.resolve() for error in self.invalid}
        if report.failed and not is_claim:
            self.other_failures = True

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> Generator[None, None, None]:
        """Decide, write the report files, and set the exit status of the contract."""
        if self.evidence and not self.config.getoption("collectonly"):
            self.verdicts = [self._verdict(path, claim) for path, claim in self.claims.items() if self._was_run(path)]
            directory = self.config.getoption("report")
            if directory:
                write_report(self.config.invocation_params.dir / directory, self.verdicts, self._shown)
        yield
        if self.verdicts and exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            session.exitstatus = self._exit_status()

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """What a person reads at a glance."""
        if self.verdicts:
            write_verdicts(terminalreporter, self.verdicts, self._shown)

    def _exit_status(self) -> int:
        if self.invalid:
            return pytest.ExitCode.INTERRUPTED
        if self.other_failures:
            return pytest.ExitCode.TESTS_FAILED
        return overall_exit_status(self.verdicts)

    def _was_run(self, path: Path) -> bool:
        return any(claim_path == path for claim_path, _ in self.evidence)

    def _verdict(self, path: Path, claim: Claim) -> Verdict:
        results = [CaseResult(case, self.evidence.get((path, case.id))) for case in expand(claim)]
        return decide(claim, results)

    def _shown(self, path: Path) -> str:
        return shown_path(path, self.config.invocation_params.dir)
