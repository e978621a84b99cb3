"""From a pytest report to the outcome of a case."""

from __future__ import annotations

import pytest

from checks.checkpoint.errors import CheckpointUnavailable
from checks.evidence.judge import ContradictingEvidence
from checks.evidence.record import CONTRADICTS, DISCLOSED, ERROR, INCONCLUSIVE, UNAVAILABLE, Evidence


def classify(
    report: pytest.TestReport,
    *,
    check: str,
    evidence: Evidence | None,
    raised: BaseException | None,
    allow_missing: bool,
) -> Evidence | None:
    """The evidence of a case after one phase, with the report adjusted to it; None while there is nothing to say.

    A report of phase "call" that failed for any other reason than recorded contradicting evidence becomes a report of
    phase "setup", which pytest, xdist and JUnit all count as an error.
    """
    if report.when == "teardown" and (report.skipped or _has_contradiction(evidence)):
        # What was found stays found; the report of a failing teardown is an error beside it.
        return None
    if isinstance(raised, CheckpointUnavailable):
        return _unavailable(report, check, str(raised), allow_missing)
    if report.failed:
        return _failed(report, check, evidence, raised)
    if report.when != "call":
        # A skip mark or a skipping fixture of the user's own: the case was not measured.
        return None if report.passed else Evidence(check, INCONCLUSIVE, _skip_reason(report))
    if evidence is not None:
        return evidence
    if report.skipped:
        return Evidence(check, INCONCLUSIVE, _skip_reason(report))
    return _as_error(report, check, f"{check} returned without judging its case; a check must call judge")


def _has_contradiction(evidence: Evidence | None) -> bool:
    return evidence is not None and evidence.outcome in (CONTRADICTS, DISCLOSED)


def _failed(report: pytest.TestReport, check: str, evidence: Evidence | None, raised: BaseException | None) -> Evidence:
    if report.when == "call" and isinstance(raised, ContradictingEvidence) and evidence is not None:
        if evidence.outcome == DISCLOSED:
            report.outcome = "skipped"
            report.wasxfail = f"disclosed: {evidence.reason}"
        return evidence
    reason = f"{type(raised).__name__}: {raised}" if raised is not None else "failed without an exception"
    if report.when == "call":
        report.when = "setup"
    return Evidence(check, ERROR, reason)


def _unavailable(report: pytest.TestReport, check: str, reason: str, allow_missing: bool) -> Evidence:
    if allow_missing:
        path, line, _ = report.location
        report.outcome = "skipped"
        report.longrepr = (path, (line or 0) + 1, f"Skipped: {UNAVAILABLE}: {reason}")
        return Evidence(check, UNAVAILABLE, reason)
    if report.when == "call":
        report.when = "setup"
    return Evidence(check, ERROR, f"{UNAVAILABLE}: {reason}")


def _as_error(report: pytest.TestReport, check: str, reason: str) -> Evidence:
    report.outcome = "failed"
    report.longrepr = reason
    if report.when == "call":
        report.when = "setup"
    return Evidence(check, ERROR, reason)


def _skip_reason(report: pytest.TestReport) -> str:
    return str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else str(report.longrepr)
