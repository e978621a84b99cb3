"""From a measured value to an outcome. `decide_*` are pure; `Judge` records the evidence and tells pytest."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn, Protocol

import pytest

from checks.evidence.record import CONTRADICTS, DISCLOSED, INCONCLUSIVE, NOT_APPLICABLE, SUPPORTS, Evidence
from checks.evidence.thresholds import Threshold, threshold


class ContradictingEvidence(AssertionError):
    """A case's recorded evidence contradicts the claim: the only exception that is a failure and not an error."""


@dataclass(frozen=True)
class Decision:
    """What a value means under a threshold, and why."""

    outcome: str
    reason: str
    powered: bool = False


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
    spread = 5 / math.sqrt(null_elements) if null_elements else None
    supports_below, contradicts_from = limits.supports_below, limits.contradicts_from
    if contradicts_from is not None and value >= contradicts_from:
        if spread is not None and spread >= contradicts_from:
            return Decision(
                INCONCLUSIVE, f"{shown}, but {null_elements} elements allow {format_value(spread)} by chance"
            )
        return Decision(CONTRADICTS, f"{shown} reaches the contradicting bound {format_value(contradicts_from)}", True)
    if supports_below is None or value >= supports_below:
        return Decision(INCONCLUSIVE, f"{shown} lies between the bounds", True)
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


class CalibratedTest(Protocol):
    """What a calibrated test reports; statistics.units.CombinedUnitTest is one."""

    @property
    def z(self) -> float:
        """Standard normal under the null."""

    @property
    def log_p(self) -> float:
        """Natural logarithm of the two-sided p-value."""

    @property
    def effect(self) -> float:
        """Mean row cosine, -1 to 1."""

    def detectable_effect(self, critical_z: float) -> float:
        """The smallest effect that would have reached `critical_z`."""


def decide_calibrated(limits: Threshold, test: CalibratedTest, calibrated_cases: int) -> Decision:
    """What does a calibrated test say, at the family-wise level of a claim with so many calibrated cases?

    It contradicts with |z| at or above the corrected critical value and an effect of at least the minimum; supports
    when its two-sided p-value is unremarkable and an effect of `detectable_effect_at_most` would have been found;
    otherwise it is inconclusive.
    """
    critical = corrected_critical_z(limits, calibrated_cases)
    assert limits.minimum_effect is not None
    assert limits.supports_p_from is not None
    assert limits.detectable_effect_at_most is not None
    shown = f"z = {test.z:.1f}, mean row cosine {test.effect:.4f}"
    if abs(test.z) >= critical:
        if abs(test.effect) >= limits.minimum_effect:
            return Decision(CONTRADICTS, f"{shown}: |z| reaches the critical {critical:.2f}", True)
        return Decision(
            INCONCLUSIVE,
            f"{shown}: |z| reaches the critical {critical:.2f}, but the effect stays below {limits.minimum_effect}",
            True,
        )
    detectable = test.detectable_effect(critical)
    if detectable > limits.detectable_effect_at_most:
        return Decision(
            INCONCLUSIVE, f"no power: {shown}, and a mean row cosine below {detectable:.2f} could not have been seen"
        )
    if test.log_p < math.log(limits.supports_p_from):
        return Decision(INCONCLUSIVE, f"{shown}: p lies between the claim's level and {limits.supports_p_from}", True)
    return Decision(SUPPORTS, f"{shown}: as expected of independent weights (critical {critical:.2f})", True)


def corrected_critical_z(limits: Threshold, calibrated_cases: int) -> float:
    """The two-sided critical z of one case, the claim's level divided by its calibrated cases (Bonferroni)."""
    from checks.statistics.units import critical_z

    assert limits.alpha is not None
    return critical_z(limits.alpha, max(1, calibrated_cases))


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
        decision = decide_by_bands(self.threshold, value, null_elements, coverage)
        if coverage is not None:
            details["coverage"] = coverage
        self.finish(decision, value, read=read, **details)

    def calibrated(self, test: CalibratedTest, *, read: Mapping[str, Any] | None = None, **details: Any) -> None:
        """Judge a calibrated test at the level of the whole claim; see `decide_calibrated`."""
        cases = self.context.calibrated_cases
        critical = corrected_critical_z(self.threshold, cases)
        self.finish(
            decide_calibrated(self.threshold, test, cases),
            test.z,
            read=read,
            critical_z=critical,
            log_p=test.log_p,
            effect=test.effect,
            detectable_effect=test.detectable_effect(critical),
            calibrated_cases=cases,
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
    return "\n".join(lines)


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
