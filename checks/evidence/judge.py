"""From a measured value to an outcome. `decide_*` are pure; `Judge` records the evidence and tells pytest."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

from checks.evidence.record import CONTRADICTS, DISCLOSED, INCONCLUSIVE, NOT_APPLICABLE, SUPPORTS, Evidence
from checks.evidence.thresholds import Threshold, threshold

if TYPE_CHECKING:
    from checks.checkpoint.comparison import Comparison, CosineSummary
    from checks.statistics.units import UnitTests


# "0.99 to 1.0: practically the same weights" (weight-architecture-qa.md, Q4).
SAME_WEIGHTS_FROM = 0.99


BETWEEN = "lies between the bounds"


class ContradictingEvidence(AssertionError):
    """A case's recorded evidence contradicts the claim: the only exception that is a failure and not an error."""


@dataclass(frozen=True)
class Decision:
    """What a value means under a threshold, and why.

    `powered`: a contrary finding was possible. `keeps_open`: inconclusive in a way that no other check's pass excuses.
    """

    outcome: str
    reason: str
    powered: bool = False
    keeps_open: bool = False


def decide_by_bands(
    limits: Threshold, value: float | None, null_elements: int | None = None, coverage: float | None = None
) -> Decision:
    """Where does `value` lie between the documented bands?

    `null_elements` is the n of a cosine: a band decides only when 5/sqrt(n), five standard deviations of the cosine of
    independent weights, lies below it. `coverage` is the share of the parameters in question that was compared: a value
    of a small part may contradict, but not support.
    """
    if value is None or not math.isfinite(value):
        return Decision(INCONCLUSIVE, "the value is undefined (constant tensors, or no finite values)")
    shown = format_value(value)
    value = abs(value) if limits.two_sided else value
    spread = 5 / math.sqrt(null_elements) if null_elements else None
    supports_below, contradicts_from = limits.supports_below, limits.contradicts_from
    if contradicts_from is not None and value >= contradicts_from:
        if spread is not None and spread >= contradicts_from:
            return Decision(
                INCONCLUSIVE, f"{shown}, but {null_elements} elements allow {format_value(spread)} by chance"
            )
        return Decision(CONTRADICTS, f"{shown} reaches the contradicting bound {format_value(contradicts_from)}", True)
    if supports_below is None or value >= supports_below:
        powered = spread is None or spread < value
        keeps_open = powered and limits.yields_below is not None and value >= limits.yields_below
        return Decision(INCONCLUSIVE, f"{shown} {BETWEEN}", powered, keeps_open)
    if spread is not None and spread >= supports_below:
        return Decision(
            INCONCLUSIVE,
            f"no power: {null_elements} elements allow {format_value(spread)} by chance, and the supporting bound is "
            f"{format_value(supports_below)}",
        )
    if coverage is not None and limits.coverage_from is not None and coverage < limits.coverage_from:
        return Decision(
            INCONCLUSIVE,
            f"no power: only {coverage:.1%} of the candidate's parameters in question have a counterpart of equal name "
            f"and shape, and {limits.coverage_from:.0%} are needed",
        )
    return Decision(SUPPORTS, f"{shown} is below the supporting bound {format_value(supports_below)}", True)


def decide_calibrated(limits: Threshold, tests: UnitTests, calibrated_cases: int) -> Decision:
    """What do calibrated tests say, at the family-wise level of a claim with so many calibrated cases?

    The level is divided by the cases and by the tests of this case: the joint ones and those of each MLP. They
    contradict with a joint |z| at or above the corrected critical value and at least the minimum effect, or with a
    single MLP's and the larger minimum for one alone. They support when no test is remarkable, an effect of
    `detectable_effect_at_most` would have been found, and enough of the MLPs was tested. Otherwise inconclusive.
    """
    assert limits.minimum_effect is not None
    assert limits.minimum_single_effect is not None
    assert limits.supports_p_from is not None
    assert limits.detectable_effect_at_most is not None
    assert limits.coverage_from is not None
    critical = corrected_critical_z(limits, tests, calibrated_cases)
    joint, single = tests.strongest_joint, tests.strongest_single
    shown = f"z = {joint.z:.1f}, mean row cosine {joint.effect:.4f}"
    if abs(joint.z) >= critical and abs(joint.effect) >= limits.minimum_effect:
        return Decision(CONTRADICTS, f"{shown}: |z| reaches the critical {critical:.2f}", True)
    if single is not None and abs(single[1].z or 0.0) >= critical:
        name, test = single
        one = f"{name} alone has z = {test.z:.1f}, mean row cosine {test.effect:.4f}"
        if abs(test.effect or 0.0) >= limits.minimum_single_effect:
            return Decision(CONTRADICTS, f"{one}: |z| reaches the critical {critical:.2f} (all MLPs: {shown})", True)
        return Decision(
            INCONCLUSIVE, f"{one}, an effect below {limits.minimum_single_effect} (all MLPs: {shown})", True, True
        )
    if abs(joint.z) >= critical:
        return Decision(
            INCONCLUSIVE,
            f"{shown}: |z| reaches the critical {critical:.2f}, the effect not {limits.minimum_effect}",
            True,
            True,
        )
    detectable = max(test.detectable_effect(critical) for test in tests.joint)
    if detectable > limits.detectable_effect_at_most:
        return Decision(
            INCONCLUSIVE, f"no power: {shown}, and a mean row cosine below {detectable:.2f} could not have been seen"
        )
    if tests.coverage < limits.coverage_from:
        return Decision(
            INCONCLUSIVE,
            f"no power: {shown}, of only {tests.coverage:.1%} of the candidate's MLP weights; "
            f"{limits.coverage_from:.0%} are needed",
        )
    if joint.log_p + math.log(len(tests.joint)) < math.log(limits.supports_p_from):
        return Decision(
            INCONCLUSIVE, f"{shown}: p lies between the claim's level and {limits.supports_p_from}", True, True
        )
    return Decision(SUPPORTS, f"{shown}: as expected of independent weights (critical {critical:.2f})", True)


def corrected_critical_z(limits: Threshold, tests: UnitTests, calibrated_cases: int) -> float:
    """The two-sided critical z of one test: the claim's level over its calibrated cases and the case's tests."""
    from checks.statistics.units import critical_z

    assert limits.alpha is not None
    return critical_z(limits.alpha, max(1, calibrated_cases) * max(1, tests.tests))


def decide_by_summary(limits: Threshold, summary: CosineSummary) -> Decision:
    """What does the cosine of a group of tensors mean, and does one tensor of the group stand out?

    A mean hides a single copied matrix: one whose own cosine reaches the band in which the documents call weights
    practically the same contradicts, one at or above `yields_below` keeps the group from supporting.
    """
    decision = decide_by_bands(limits, summary.cosine, summary.null_elements, summary.coverage)
    if decision.outcome == CONTRADICTS or summary.strongest is None or limits.yields_below is None:
        return decision
    name, cosine = summary.strongest
    if abs(cosine) >= SAME_WEIGHTS_FROM:
        return Decision(CONTRADICTS, f"{name} alone has {format_value(cosine)} ({decision.reason})", True)
    if abs(cosine) >= limits.yields_below and decision.outcome == SUPPORTS:
        return Decision(INCONCLUSIVE, f"{name} alone has {format_value(cosine)} ({decision.reason})", True, True)
    return decision


def decide_category(limits: Threshold, comparison: Comparison) -> tuple[str, Decision] | None:
    """The category with the largest cosine among those that have enough elements to decide, and what it means.

    The embedding has a check of its own. None when no tensor of any other category could be compared.
    """
    summaries = {name: comparison.category(name) for name in comparison.categories() if name != "embedding"}
    decisions = {name: decide_by_summary(limits, one) for name, one in summaries.items() if one.counterparts}
    if not decisions:
        return None
    severity = {CONTRADICTS: 2, INCONCLUSIVE: 1}

    def rank(name: str) -> tuple[int, bool, float]:
        decision = decisions[name]
        worth = severity.get(decision.outcome, 0) if decision.powered else 0
        return worth, decision.powered, abs(summaries[name].cosine or 0.0)

    highest = max(decisions, key=rank)
    return highest, decisions[highest]


@dataclass(frozen=True)
class JudgeContext:
    """What a judge knows of its case beside the threshold."""

    case_id: str
    claim: str
    place: str  # claims/solar.yaml:7
    reference: str | None
    disclosed: bool
    calibrated_cases: int
    overrides: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


class Judge:
    """Judges one case, once: records its evidence, then passes, fails or skips."""

    def __init__(self, check: str, context: JudgeContext) -> None:
        self.context = context
        self.check = check
        self.threshold = self.threshold_of(check)
        self.evidence: Evidence | None = None

    def threshold_of(self, check: str) -> Threshold:
        """The threshold of a check, with the claim's override."""
        return threshold(check).overridden(self.context.overrides.get(check, {}))

    def decide(self, decide_by: Callable[[Threshold], Decision], check: str | None = None) -> Decision:
        """The decision under this claim's threshold, which may not refute where the suite's own would not."""
        check = check or self.check
        decision = decide_by(self.threshold_of(check))
        if decision.outcome == CONTRADICTS and self.context.overrides.get(check):
            default = decide_by(threshold(check))
            if default.outcome != CONTRADICTS:
                reason = (
                    f"contradicts by the claim's own threshold alone ({decision.reason}; by default {default.reason})"
                )
                return Decision(INCONCLUSIVE, reason, decision.powered, keeps_open=True)
        return decision

    def __call__(
        self,
        value: float | None,
        *,
        null_elements: int | None = None,
        coverage: float | None = None,
        read: Mapping[str, Any] | None = None,
        **details: Any,
    ) -> None:
        """Judge a value by the bands of this check; see `decide_by_bands`. Details go into the record."""
        decision = self.decide(lambda limits: decide_by_bands(limits, value, null_elements, coverage))
        if coverage is not None:
            details["coverage"] = coverage
        self.finish(decision, value, read=read, **details)

    def summary(self, summary: CosineSummary, *, read: Mapping[str, Any] | None = None, **details: Any) -> None:
        """Judge the cosine of a group of tensors; see `decide_by_summary`."""
        strongest = summary.strongest
        self.finish(
            self.decide(lambda limits: decide_by_summary(limits, summary)),
            summary.cosine,
            read=read,
            raw_cosine=summary.raw_cosine,
            coverage=summary.coverage,
            elements=summary.elements,
            compared_tensors=summary.tensors,
            strongest_tensor=None if strongest is None else {"name": strongest[0], "cosine": strongest[1]},
            **details,
        )

    def calibrated(self, tests: UnitTests, *, read: Mapping[str, Any] | None = None, **details: Any) -> None:
        """Judge calibrated tests at the level of the whole claim; see `decide_calibrated`."""
        cases = self.context.calibrated_cases
        critical = corrected_critical_z(self.threshold, tests, cases)
        joint, single = tests.strongest_joint, tests.strongest_single
        self.finish(
            self.decide(lambda limits: decide_calibrated(limits, tests, cases)),
            joint.z,
            read=read,
            critical_z=critical,
            log_p=joint.log_p,
            effect=joint.effect,
            detectable_effect=max(test.detectable_effect(critical) for test in tests.joint),
            coverage=tests.coverage,
            calibrated_cases=cases,
            tests=tests.tests,
            strongest_single=None
            if single is None
            else {"name": single[0], "z": single[1].z, "effect": single[1].effect},
            **details,
        )

    def not_applicable(self, reason: str, **details: Any) -> NoReturn:
        """The question does not arise for this pair. Never evidence of scratch."""
        self.finish(Decision(NOT_APPLICABLE, reason), None, **details)
        raise AssertionError("unreachable: an outcome that is not applicable skips")

    def inconclusive(self, reason: str, value: float | None = None, **details: Any) -> NoReturn:
        """The question arises and could not be decided."""
        self.finish(Decision(INCONCLUSIVE, reason), value, **details)
        raise AssertionError("unreachable: an inconclusive outcome skips")

    def finish(
        self, decision: Decision, value: float | None, *, read: Mapping[str, Any] | None = None, **details: Any
    ) -> None:
        """Record a decision and tell pytest. A case is judged once; a second time is an error of the check."""
        if self.evidence is not None:
            raise RuntimeError(f"{self.check} judged its case twice; a case has one outcome")
        outcome = decision.outcome
        if outcome == CONTRADICTS and self.context.disclosed:
            outcome = DISCLOSED
        self.evidence = Evidence(
            check=self.check,
            outcome=outcome,
            reason=decision.reason,
            value=value,
            band=self.threshold.band(value),
            threshold=self.threshold.as_evidence(),
            documented=self.threshold.documented,
            powered=decision.powered,
            keeps_open=decision.keeps_open,
            details=details,
            read=read or {},
        )
        if outcome in (CONTRADICTS, DISCLOSED):
            raise ContradictingEvidence(failure_message(self.evidence, self.context))
        if outcome != SUPPORTS:
            pytest.skip(f"{outcome}: {decision.reason}")


def failure_message(evidence: Evidence, context: JudgeContext) -> str:
    """What a reader of a failed case must know: value, threshold and its source, the reference, the YAML line."""
    lines = [
        f"{context.place}: {context.case_id} contradicts the claim {context.claim!r}",
        f"  {evidence.reason}",
    ]
    if context.reference:
        lines.append(f"  reference:  {context.reference}")
    lines.append(f"  value:      {format_value(evidence.value)} ({threshold(evidence.check).unit})")
    if evidence.band:
        lines.append(f"  reading:    {evidence.band}")
    limits = ", ".join(f"{name} {format_value(limit)}" for name, limit in evidence.threshold.items())
    lines.append(f"  threshold:  {limits}")
    lines.append(f"  documented: {evidence.documented}")
    for name in ("tensors", "note"):
        if evidence.details.get(name):
            lines.append(f"  {name + ':':<11} {_shown(evidence.details[name])}")
    return "\n".join(printable(line) for line in lines)


def printable(text: str) -> str:
    """`text` with control characters written out: names and statements come from files that nobody vouches for."""
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in text)


def format_value(value: float | int | None) -> str:
    """A number for people: whole numbers whole, others with four significant digits."""
    if value is None:
        return "undefined"
    if isinstance(value, int) or (math.isfinite(value) and value == int(value) and abs(value) < 1e6):
        return str(int(value))
    return f"{value:.4g}"


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(str(one) for one in value[:5]) + (f" and {len(value) - 5} more" if len(value) > 5 else "")
    return str(value)
