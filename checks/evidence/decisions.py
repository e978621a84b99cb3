"""From a measured value to what it means under a threshold. Pure: no pytest, no files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from checks.evidence.record import CONTRADICTS, INCONCLUSIVE, SUPPORTS
from checks.evidence.text import format_value
from checks.evidence.thresholds import Threshold

if TYPE_CHECKING:
    from checks.pair.comparison import CosineSummary
    from checks.statistics.block_matching import MatchingTest
    from checks.statistics.units import UnitTest, UnitTests

# "0.99 to 1.0: practically the same weights" (weight-architecture-qa.md, Q4).
SAME_WEIGHTS_FROM = 0.99


BETWEEN = "lies between the bounds"


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
    critical = corrected_critical_z(limits, tests.tests, calibrated_cases)
    joint, single = tests.strongest_joint, tests.strongest_single
    where = " of MLPs in other places" if joint in tests.mapped else ""
    shown = f"z = {joint.z:.1f}, mean row cosine {joint.effect:.4f}{where}"
    together = [test for test in (*tests.joint, *tests.mapped) if abs(test.z) >= critical]
    if large := [test for test in together if abs(test.effect) >= limits.minimum_effect]:
        found = max(large, key=lambda test: abs(test.z))
        shown = shown if found is joint else f"z = {found.z:.1f}, mean row cosine {found.effect:.4f}"
        return Decision(CONTRADICTS, f"{shown}: |z| reaches the critical {critical:.2f}", True)
    alone = [(name, test) for name, test in tests.single if abs(test.z or 0.0) >= critical]
    if large_alone := [one for one in alone if abs(one[1].effect or 0.0) >= limits.minimum_single_effect]:
        one = _named(*max(large_alone, key=lambda one: abs(one[1].z or 0.0)))
        return Decision(CONTRADICTS, f"{one}: |z| reaches the critical {critical:.2f} (all MLPs: {shown})", True)
    if alone and single is not None:
        one = _named(*single)
        return Decision(
            INCONCLUSIVE, f"{one}, an effect below {limits.minimum_single_effect} (all MLPs: {shown})", True, True
        )
    if together:
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
    if joint.log_p + math.log(tests.joint_tests) < math.log(limits.supports_p_from):
        return Decision(
            INCONCLUSIVE, f"{shown}: p lies between the claim's level and {limits.supports_p_from}", True, True
        )
    return Decision(SUPPORTS, f"{shown}: as expected of independent weights (critical {critical:.2f})", True)


def _named(name: str, test: UnitTest) -> str:
    return f"{name} alone has z = {test.z:.1f}, mean row cosine {test.effect:.4f}"


def corrected_critical_z(limits: Threshold, tests: int, calibrated_cases: int) -> float:
    """The two-sided critical z of each of a case's tests: the claim's level over its calibrated cases and the tests."""
    from checks.statistics.units import critical_z

    assert limits.alpha is not None
    return critical_z(limits.alpha, max(1, calibrated_cases) * max(1, tests))


def decide_by_summary(limits: Threshold, summary: CosineSummary) -> Decision:
    """What does the cosine of a group of tensors mean, and does one tensor of the group stand out?

    A mean hides a single copied matrix: one whose own cosine reaches the band in which the documents call weights
    practically the same contradicts, one at or above `yields_below` keeps the group from supporting.
    """
    return with_strongest(
        limits, summary, decide_by_bands(limits, summary.cosine, summary.null_elements, summary.coverage)
    )


def with_strongest(limits: Threshold, summary: CosineSummary, decision: Decision) -> Decision:
    """The decision on a group of tensors, unless one tensor of it stands out; see `decide_by_summary`."""
    if decision.outcome == CONTRADICTS or summary.strongest is None or limits.yields_below is None:
        return decision
    name, cosine = summary.strongest
    if abs(cosine) >= SAME_WEIGHTS_FROM:
        return Decision(CONTRADICTS, f"{name} alone has {format_value(cosine)} ({decision.reason})", True)
    if abs(cosine) >= limits.yields_below and decision.outcome == SUPPORTS:
        return Decision(INCONCLUSIVE, f"{name} alone has {format_value(cosine)} ({decision.reason})", True, True)
    return decision


@dataclass(frozen=True)
class Score:
    """One exact test of several: its name, standard score, effect, and scale (z / effect, the power of the test)."""

    name: str
    z: float
    effect: float
    scale: float


def decide_scores(
    limits: Threshold,
    scores: Sequence[Score],
    calibrated_cases: int,
    tests: int | None = None,
    scale: float | None = None,
) -> Decision:
    """What do exact tests say, each of which may contradict, at the family-wise level of the whole claim?

    The level is divided by the claim's calibrated cases and by `tests` (default: the scores). A contradiction needs a
    corrected |z| and the minimum effect in one score. Support needs that no |z| is remarkable, and that an effect of
    `detectable_effect_at_most` would have been found at the `scale` that speaks for the whole (default: that of the
    first score).
    """
    assert limits.minimum_effect is not None
    assert limits.supports_p_from is not None
    assert limits.detectable_effect_at_most is not None
    from checks.statistics.units import ONE_SIDED_95, two_sided_log_p

    count = max(1, tests or len(scores))
    critical = corrected_critical_z(limits, count, calibrated_cases)
    reaching = [score for score in scores if abs(score.z) >= critical]
    large = [score for score in reaching if abs(score.effect) >= limits.minimum_effect]
    strongest = max(large or scores, key=lambda score: abs(score.z))
    shown = f"{strongest.name}: z = {strongest.z:.1f}, effect {strongest.effect:.4f}"
    if large:
        return Decision(CONTRADICTS, f"{shown}: |z| reaches the critical {critical:.2f}", True)
    if reaching:
        return Decision(
            INCONCLUSIVE,
            f"{shown}: |z| reaches the critical {critical:.2f}, the effect not {limits.minimum_effect}",
            True,
            True,
        )
    power = scores[0].scale if scale is None else scale
    detectable = (critical + ONE_SIDED_95) / power if power > 0 else math.inf
    if detectable > limits.detectable_effect_at_most:
        return Decision(
            INCONCLUSIVE, f"no power: {shown}, and an effect below {detectable:.2f} could not have been seen"
        )
    if two_sided_log_p(strongest.z) + math.log(count) < math.log(limits.supports_p_from):
        return Decision(
            INCONCLUSIVE, f"{shown}: p lies between the claim's level and {limits.supports_p_from}", True, True
        )
    return Decision(SUPPORTS, f"{shown}: as expected of independent weights (critical {critical:.2f})", True)


def decide_matching(limits: Threshold, test: MatchingTest, calibrated_cases: int) -> Decision:
    """What does a double matching say, whose null is measured in the run itself, at the level of the whole claim?

    The level is divided by the claim's calibrated cases and by every pair of blocks that was searched. A contradiction
    needs an agreement of `minimum_single_effect` in one block or `minimum_effect` in all, and twice that of every
    mismatched block.
    """
    assert limits.minimum_effect is not None
    assert limits.minimum_single_effect is not None
    critical = corrected_critical_z(limits, test.tests, calibrated_cases)
    finding = test.finding(critical, limits.minimum_single_effect, limits.minimum_effect)
    null = (
        f"{test.null.count} mismatched blocks agree on {test.null.largest_agreement:.1%} at most, so that more "
        f"happens by chance in less than {min(1.0, 3 / max(1, test.null.count)):.1%} of such blocks (95 %)"
    )
    if finding.dependent is None:
        return Decision(INCONCLUSIVE, str(finding.reason), keeps_open=False)
    strongest = test.strongest
    assert strongest is not None
    assert test.joint_z is not None
    shown = (
        f"{test.agreement:.1%} of {test.units} neurons find one partner by both matchings (joint z {test.joint_z:.1f})"
    )
    if finding.dependent:
        block = finding.block
        alone = "" if block is None else f", {block.matching.agreement:.1%} in layer {block.candidate[0]}"
        return Decision(CONTRADICTS, f"{shown}{alone}; critical {critical:.2f}; {null}", True)
    highest = max(test.joint_z, test.z_adjusted(strongest) or 0.0)
    if highest >= critical:
        # First layers of independent models agree a little; half of what contradicts is more than that, and stays open.
        is_open = test.agreement >= limits.minimum_effect / 2 or any(
            block.matching.agreement >= limits.minimum_single_effect / 2
            for block in test.blocks
            if (test.z_adjusted(block) or 0.0) >= critical
        )
        return Decision(
            INCONCLUSIVE,
            f"{shown}: z = {highest:.1f} reaches the critical {critical:.2f}, the agreement is small; {null}",
            is_open,
            is_open,
        )
    return Decision(SUPPORTS, f"{shown}: as expected of independent weights (critical {critical:.2f}); {null}", True)
