"""Values → decisions, decisions → pytest outcomes."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import NormalDist

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checks.evidence.decisions import corrected_critical_z, decide_by_bands, decide_calibrated
from checks.evidence.judge import ContradictingEvidence, Judge, JudgeContext
from checks.evidence.record import CONTRADICTS, INCONCLUSIVE, SUPPORTS
from checks.evidence.text import format_value, printable
from checks.evidence.thresholds import threshold
from checks.statistics.units import CombinedUnitTest, UnitTest, UnitTests, two_sided_log_p

MEAN = threshold("similarity.mean")
UNITS = threshold("independence.units")


def measured(
    z: float, effect: float = 0.5, detectable: float = 0.02, coverage: float = 1.0, alone: float = 0.0
) -> UnitTests:
    """A joint test with chosen numbers, and one MLP with the score `alone` at an effect of a tenth of it."""
    # detectable_effect(critical) = critical / total_scale for one test, at a critical z of about 5.4.
    joint = CombinedUnitTest(z, two_sided_log_p(z), effect, tests=1, total_scale=5.4 / detectable)
    return UnitTests((joint,), (("layer 0", UnitTest(alone, alone / 100, 100.0, 64)),), coverage)


def judge_of(check: str = "similarity.mean", disclosed: bool = False) -> Judge:
    return Judge(check, JudgeContext("case[base]", "claim", "claims/x.yaml:7", "base", disclosed, 3))


@pytest.mark.parametrize(
    ("value", "outcome"),
    [
        (-1.0, CONTRADICTS),
        (-0.5, INCONCLUSIVE),
        (-0.05, SUPPORTS),
        (0.0, SUPPORTS),
        (0.0999, SUPPORTS),
        (0.1, INCONCLUSIVE),
        (0.7999, INCONCLUSIVE),
        (0.8, CONTRADICTS),
        (1.0, CONTRADICTS),
        (None, INCONCLUSIVE),
        (math.nan, INCONCLUSIVE),
        (math.inf, INCONCLUSIVE),
    ],
)
def test_the_bands_include_their_lower_bound(value: float | None, outcome: str) -> None:
    assert decide_by_bands(MEAN, value, null_elements=10**6, coverage=1.0).outcome == outcome


def test_a_band_decides_only_where_the_null_spread_allows_it() -> None:
    assert decide_by_bands(MEAN, 0.01, null_elements=2500, coverage=1.0).outcome == INCONCLUSIVE
    assert decide_by_bands(MEAN, 0.01, null_elements=2501, coverage=1.0).outcome == SUPPORTS
    assert decide_by_bands(MEAN, 0.99, null_elements=39, coverage=1.0).outcome == INCONCLUSIVE
    assert decide_by_bands(MEAN, 0.99, null_elements=40, coverage=1.0).outcome == CONTRADICTS


def test_a_small_part_may_contradict_but_not_support() -> None:
    assert decide_by_bands(MEAN, 0.0, null_elements=10**6, coverage=0.49).outcome == INCONCLUSIVE
    assert decide_by_bands(MEAN, 0.0, null_elements=10**6, coverage=0.5).outcome == SUPPORTS
    assert decide_by_bands(MEAN, 0.99, null_elements=10**6, coverage=0.01).outcome == CONTRADICTS


@given(st.floats(allow_nan=True, allow_infinity=True) | st.none(), st.integers(1, 10**12), st.floats(0, 1))
def test_only_powered_decisions_support_or_contradict(value: float | None, elements: int, coverage: float) -> None:
    decision = decide_by_bands(MEAN, value, elements, coverage)
    if decision.outcome in (SUPPORTS, CONTRADICTS):
        assert decision.powered
        assert value is not None
        assert math.isfinite(value)


@pytest.mark.parametrize(
    ("tests", "outcome"),
    [
        (measured(0.5), SUPPORTS),
        (measured(-2.9), SUPPORTS),
        (measured(3.5), INCONCLUSIVE),
        (measured(500.0), CONTRADICTS),
        (measured(-500.0, effect=-0.5), CONTRADICTS),
        (measured(8.0, effect=0.001), INCONCLUSIVE),
        (measured(0.5, detectable=0.3), INCONCLUSIVE),
        (measured(500.0, detectable=0.3), CONTRADICTS),
        (measured(0.5, coverage=0.49), INCONCLUSIVE),
        (measured(500.0, coverage=0.01), CONTRADICTS),
        (measured(0.5, alone=20.0), CONTRADICTS),
        (measured(0.5, alone=-20.0), CONTRADICTS),
        (measured(0.5, alone=8.0), INCONCLUSIVE),
        (measured(0.5, alone=4.0), SUPPORTS),
    ],
)
def test_a_calibrated_test_needs_level_effect_power_and_coverage(tests: UnitTests, outcome: str) -> None:
    assert decide_calibrated(UNITS, tests, calibrated_cases=4).outcome == outcome


def test_a_test_that_meets_level_and_effect_is_not_hidden_by_a_larger_score() -> None:
    tests = measured(20.0, effect=0.009)
    gates = replace(tests.joint[0], z=19.0, effect=0.013)
    assert decide_calibrated(UNITS, tests, 1).outcome == INCONCLUSIVE
    assert decide_calibrated(UNITS, replace(tests, joint=(*tests.joint, gates)), 1).outcome == CONTRADICTS
    singles = measured(0.5, alone=40.0).single
    small, large = (replace(singles[0][1], z=z, effect=effect) for z, effect in ((40.0, 0.05), (30.0, 0.5)))
    hidden = replace(measured(0.5), single=(("one", small), ("other", large)))
    assert decide_calibrated(UNITS, hidden, 1).outcome == CONTRADICTS


def test_the_level_is_shared_by_the_calibrated_cases_of_the_claim_and_the_tests_of_each() -> None:
    for cases in (1, 52):
        expected = -NormalDist().inv_cdf(1e-6 / (cases * 2) / 2)
        assert corrected_critical_z(UNITS, measured(0.0).tests, cases) == pytest.approx(expected, rel=1e-9)


def test_support_returns_and_is_recorded() -> None:
    judge = judge_of()
    judge(0.01, null_elements=10**6, coverage=1.0, read={"a": 1}, extra=2)
    assert judge.evidence is not None
    assert judge.evidence.outcome == SUPPORTS
    assert judge.evidence.powered
    assert judge.evidence.details == {"extra": 2, "coverage": 1.0}
    assert judge.evidence.documented == MEAN.documented


def test_a_failure_tells_value_threshold_source_reference_and_line() -> None:
    with pytest.raises(ContradictingEvidence) as caught:
        judge_of()(0.97, null_elements=10**6)
    text = str(caught.value)
    for part in ("claims/x.yaml:7", "base", "0.97", "contradicts_from 0.8", "weight-analysis.md", "almost certainly"):
        assert part in text


def test_what_is_between_the_bands_is_skipped_and_never_passed() -> None:
    with pytest.raises(pytest.skip.Exception, match="inconclusive: "):
        judge_of()(0.5, null_elements=10**6)
    with pytest.raises(pytest.skip.Exception, match="not applicable: no MLP"):
        judge_of().not_applicable("no MLP")


def test_a_case_is_judged_once() -> None:
    judge = judge_of()
    judge(0.0, null_elements=10**6)
    with pytest.raises(RuntimeError, match="judged its case twice"):
        judge(0.0, null_elements=10**6)


def test_disclosure_changes_a_contradiction_and_nothing_else() -> None:
    judge = judge_of(disclosed=True)
    with pytest.raises(ContradictingEvidence):
        judge(0.97, null_elements=10**6)
    assert judge.evidence is not None
    assert judge.evidence.outcome == "disclosed"
    supported = judge_of(disclosed=True)
    supported(0.0, null_elements=10**6)
    assert supported.evidence is not None
    assert supported.evidence.outcome == SUPPORTS


def test_a_claims_own_threshold_may_be_stricter_and_does_not_refute_alone() -> None:
    context = JudgeContext("c", "claim", "p:1", "base", False, 3, {"similarity.mean": {"contradicts_from": 0.4}})
    judge = Judge("similarity.mean", context)
    with pytest.raises(pytest.skip.Exception, match="by the claim's own threshold alone"):
        judge(0.5, null_elements=10**6)
    assert judge.evidence is not None
    assert judge.evidence.keeps_open
    with pytest.raises(ContradictingEvidence):
        Judge("similarity.mean", context)(0.9, null_elements=10**6)


def test_control_characters_of_a_checkpoint_do_not_reach_a_terminal() -> None:
    assert printable("a\x1b[2Jb\n") == "a\\x1b[2Jb\\n"


@pytest.mark.parametrize(("value", "text"), [(3, "3"), (3.0, "3"), (0.12345, "0.1235"), (None, "undefined")])
def test_values_are_written_for_people(value: float | None, text: str) -> None:
    assert format_value(value) == text
