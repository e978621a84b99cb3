from __future__ import annotations

import math

import pytest

from checks.statistics.block_matching import (
    LEAST_AGREEMENT,
    LEAST_JOINT_AGREEMENT,
    BlockPair,
    MatchingNull,
    MatchingTest,
    why_abstain,
)
from checks.statistics.double_matching import DoubleMatching, agreement_z
from checks.statistics.units import critical_z


def matching(agreements: int, z: float | None = None, units: int = 352) -> DoubleMatching:
    """A matching whose z is what so many agreements make it, unless it is given."""
    z = agreements / units * math.sqrt(units - 1) if z is None else z
    return DoubleMatching(units, agreements, 1.0, z / math.sqrt(units - 1), z)


def make(counts: list[int], null: list[int], units: int = 352) -> MatchingTest:
    blocks = tuple(BlockPair((i, None), (i, None), matching(k, units=units)) for i, k in enumerate(counts))
    spread = (-1.2, 0.4, 1.1, -0.3, 0.8, -0.9, 0.2, 1.5, -0.6, 0.1)
    against = MatchingNull(tuple(matching(k, z, units) for k, z in zip(null, spread, strict=False)))
    layer_map = {i: i for i in range(len(counts))}
    reason = why_abstain(blocks, against, layer_map)
    return MatchingTest(blocks, against, len(counts) ** 2, layer_map, 512, 0, reason)


CHANCE = [0, 1, 2, 1, 0, 3, 1, 0, 2, 1]
CRITICAL = critical_z(1e-3, 2000)


def test_null_of_its_own() -> None:
    null = MatchingNull(tuple(matching(k, z) for k, z in zip([4, 8, 0, 12], [1.0, 2.0, 0.0, 3.0], strict=True)))
    assert (null.count, null.rate, null.mean, null.maximum) == (4, 6.0, 1.5, 3.0)
    assert null.sd == pytest.approx(math.sqrt(5 / 3))
    assert null.dispersion == pytest.approx((4 + 4 + 36 + 36) / 6 / 3)
    assert null.largest_agreement == pytest.approx(12 / 352)
    assert null.adjusted(matching(0, 18.0)) == pytest.approx((18 - 1.5) / math.sqrt(5 / 3))
    nothing = DoubleMatching(1, 0, 0.0, None, None, reason="one neuron")
    assert null.adjusted(nothing) is None


def test_a_calm_null_makes_no_score_larger() -> None:
    null = MatchingNull(tuple(matching(k, -1.0) for k in (0, 1, 1, 0, 1, 1, 1, 0, 1, 1)))
    assert (null.rate, null.dispersion) == (1, 1)
    assert null.adjusted(matching(0, 5.0)) == 5
    empty = MatchingNull(())
    assert (empty.rate, empty.dispersion, empty.mean, empty.sd, empty.count) == (1, 1, 0, 1, 0)
    assert empty.maximum == -math.inf


def test_dependent_in_every_block_and_in_one() -> None:
    assert make([352] * 6, CHANCE).finding(CRITICAL).dependent is True
    once = make([1, 0, 200, 2, 1, 0], CHANCE).finding(CRITICAL)
    assert once.dependent is True
    assert once.block.candidate == (2, None)
    thinly = make([60, 50, 55, 60, 45, 62], CHANCE)
    assert thinly.finding(CRITICAL).dependent is True
    assert thinly.finding(CRITICAL).block is None
    assert thinly.joint_z > CRITICAL > max(thinly.z_adjusted(block) for block in thinly.blocks)


def test_independent() -> None:
    test = make([1, 0, 3, 2, 1, 0], CHANCE)
    assert test.finding(CRITICAL).dependent is False
    assert test.log_p == 0


def test_significance_without_effect_and_effect_without_significance_accuse_nobody() -> None:
    blocks = tuple(BlockPair((i, None), (i, None), matching(28, 9.0)) for i in range(6))
    null = make([1] * 6, CHANCE).null
    small = MatchingTest(blocks, null, 36, {i: i for i in range(6)}, 512, 0)
    assert small.joint_z > CRITICAL
    assert small.finding(CRITICAL).dependent is False
    tiny = make([10, 0, 1, 0, 0, 0], CHANCE, units=36)
    assert tiny.strongest.matching.agreement > LEAST_AGREEMENT
    assert tiny.finding(CRITICAL).dependent is not True


def test_effect_must_be_outside_the_null_of_the_run() -> None:
    inflated = [100, 90, 95, 85, 98, 92, 99, 91]
    finding = make([150, 140, 145, 150, 160, 130], inflated).finding(CRITICAL)
    assert finding.dependent is None
    assert "28% of agreeing neurons" in finding.reason
    assert make([352] * 6, inflated).finding(CRITICAL).dependent is True


def test_a_null_that_passes_the_critical_value_abstains() -> None:
    calm = make([1, 0, 3, 2, 1, 0], CHANCE)
    null = MatchingNull((*calm.null.matchings, matching(30, CRITICAL + 1)))
    finding = MatchingTest(calm.blocks, null, 36, calm.layer_map, 512, 0).finding(CRITICAL)
    assert finding.dependent is None
    assert "mismatched blocks reach z" in finding.reason


def test_too_few_layers_borrow_the_null_of_the_panel() -> None:
    test = make([352] * 4, CHANCE)
    assert "borrow" in test.finding(CRITICAL).reason
    lent = test.with_borrowed([matching(1, 0.3)] * 5)
    assert (lent.null.borrowed, lent.null.count) == (5, 15)
    assert lent.finding(CRITICAL).dependent is True
    assert "8 are needed" in make([352] * 6, [1, 2]).finding(CRITICAL).reason
    assert make([352] * 6, [1, 2]).with_borrowed([matching(1, 0.1)] * 8).finding(CRITICAL).dependent is True


def test_no_power() -> None:
    tiny = make([1] * 6, CHANCE, units=16)
    assert "32 are needed" in tiny.finding(CRITICAL).reason
    assert tiny.finding(CRITICAL).dependent is None
    small = make([1] * 5, CHANCE, units=36).finding(CRITICAL)
    assert small.dependent is None
    assert "no power" in small.reason
    assert make([], []).finding(CRITICAL).dependent is None


@pytest.mark.parametrize("units", [100, 352, 2048])
def test_detectable_agreement_is_where_all_blocks_become_critical(units: int) -> None:
    test = make([1] * 6, CHANCE, units=units)
    share = test.detectable_agreement(CRITICAL)
    # A standard deviation of 1 above what is needed, on average of the 95 of 100 cases.
    count = math.ceil(share * units)
    assert make([count] * 6, CHANCE, units=units).joint_z > CRITICAL + 1.6
    if share > LEAST_JOINT_AGREEMENT:
        fewer = make([math.floor(0.9 * share * units)] * 6, CHANCE, units=units)
        assert fewer.joint_z < CRITICAL + 1.645
    assert share >= LEAST_JOINT_AGREEMENT


def test_what_it_reports() -> None:
    test = make([352, 0, 352, 0, 352, 352], CHANCE)
    ceiling = math.sqrt(351)
    assert test.units == 6 * 352
    assert test.agreement == pytest.approx(4 / 6)
    assert test.z == pytest.approx(ceiling * 4 / 6)
    assert test.rho == pytest.approx(4 / 6)
    null = test.null
    assert test.joint_z == pytest.approx(6**0.5 * (test.z - max(0, null.mean)) / max(1, null.sd))
    assert test.tests == 37
    assert test.log_p < -300
    assert test.agreement_score == pytest.approx(agreement_z(4 * 352, 6 * null.rate, null.dispersion))
    nothing = make([], [])
    assert nothing.z is nothing.rho is nothing.joint_z is nothing.agreement_score is None
    assert nothing.log_p is nothing.strongest is None
