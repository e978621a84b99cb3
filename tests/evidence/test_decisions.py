"""Exact scores and double matchings under a threshold: what contradicts, what supports, what decides nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import math

import pytest

from checks.evidence.decisions import Decision, Score, decide_matching, decide_scores
from checks.evidence.judge import ContradictingEvidence, Judge, JudgeContext
from checks.evidence.record import CONTRADICTS, INCONCLUSIVE, SUPPORTS, Evidence
from checks.evidence.thresholds import threshold
from checks.statistics.block_matching import BlockPair, MatchingNull, MatchingTest, why_abstain
from checks.statistics.double_matching import DoubleMatching
from checks.statistics.units import critical_z

SCORES = threshold("independence.channels")
MATCHING = threshold("independence.anchored")


# Exact scores


def score(z: float, effect: float | None = None, scale: float = 200.0, name: str = "whole") -> Score:
    """A score of a test in which an effect of 1 has z = 200."""
    return Score(name, z, z / scale if effect is None else effect, scale)


def decided(*scores: Score, cases: int = 1, tests: int | None = None) -> Decision:
    return decide_scores(SCORES, scores, cases, tests)


@pytest.mark.parametrize("z", [20.0, -20.0])
def test_a_score_with_effect_contradicts_whatever_its_sign(z: float) -> None:
    decision = decided(score(z))
    assert (decision.outcome, decision.powered) == (CONTRADICTS, True)


def test_any_of_several_scores_contradicts_and_is_named() -> None:
    decision = decided(score(0.3), score(30.0, name="norms"))
    assert decision.outcome == CONTRADICTS
    assert decision.reason.startswith("norms: z = 30.0")


def test_scores_of_independent_weights_support() -> None:
    decision = decided(score(1.1), score(-1.9, name="norms"))
    assert (decision.outcome, decision.powered, decision.keeps_open) == (SUPPORTS, True, False)


def test_a_large_score_without_effect_keeps_it_open() -> None:
    decision = decided(score(20.0, effect=0.9 * float(SCORES.minimum_effect or 0)))
    assert (decision.outcome, decision.keeps_open) == (INCONCLUSIVE, True)


def test_a_score_with_effect_is_not_hidden_by_a_larger_one_without() -> None:
    assert decided(score(50.0, effect=0.001), score(20.0, effect=0.5, name="norms")).outcome == CONTRADICTS


def test_a_large_score_is_not_hidden_by_a_chance_effect() -> None:
    """Few columns give large effects by chance; many give large scores at small effects."""
    decision = decided(score(30.0, effect=0.015), score(1.3, effect=0.04, name="norms"))
    assert (decision.outcome, decision.keeps_open) == (INCONCLUSIVE, True)
    assert decision.reason.startswith("whole: z = 30.0")


def test_power_may_be_stated_apart_from_the_scores() -> None:
    assert decide_scores(SCORES, [score(0.5, scale=5.0)], 1, scale=200.0).outcome == SUPPORTS
    assert decide_scores(SCORES, [score(0.5)], 1, scale=5.0).outcome == INCONCLUSIVE


def test_a_score_between_the_levels_keeps_it_open() -> None:
    decision = decided(score(4.5))
    assert critical_z(1e-6, 1) > 4.5
    assert (decision.outcome, decision.powered, decision.keeps_open) == (INCONCLUSIVE, True, True)


def test_without_power_it_does_not_support() -> None:
    decision = decided(score(0.5, effect=0.1, scale=5.0))
    assert (decision.outcome, decision.powered) == (INCONCLUSIVE, False)
    assert "no power" in decision.reason
    assert decided(score(0.0, effect=0.0, scale=0.0)).outcome == INCONCLUSIVE


def test_power_is_that_of_the_first_score() -> None:
    """Norms have few columns; the whole model speaks for the model."""
    weak = score(0.5, scale=5.0, name="norms")
    assert decided(score(0.5), weak).outcome == SUPPORTS
    assert decided(weak, score(0.5)).outcome == INCONCLUSIVE


def test_the_level_is_divided_by_cases_and_by_tests() -> None:
    z = critical_z(1e-6, 1) + 0.01
    assert decided(score(z)).outcome == CONTRADICTS
    assert decided(score(z), cases=10).outcome == INCONCLUSIVE
    assert decided(score(z), tests=10).outcome == INCONCLUSIVE
    assert decided(score(z), score(0.0, name="norms")).outcome == INCONCLUSIVE
    assert decided(score(critical_z(1e-6, 100) + 0.01), cases=10, tests=10).outcome == CONTRADICTS


def test_many_tests_excuse_one_small_p_value() -> None:
    assert decided(score(3.5)).outcome == INCONCLUSIVE
    assert decided(score(3.5), tests=1000).outcome == SUPPORTS


# Double matchings


def matching(agreements: int, units: int = 352, z: float | None = None) -> DoubleMatching:
    """A matching with the z that so many agreements have where the numbering adds no noise."""
    z = agreements / units * math.sqrt(units - 1) if z is None else z
    return DoubleMatching(units, agreements, 1.0, z / math.sqrt(units - 1), z)


AGREEMENTS = [0, 1, 2, 1, 0, 3, 1, 0, 2, 1]
SPREAD = [-1.2, 0.4, 1.1, -0.3, 0.8, -0.9, 0.2, 1.5, -0.6, 0.1]
NULL = MatchingNull(tuple(matching(count, z=z) for count, z in zip(AGREEMENTS, SPREAD, strict=True)))


def blocks(counts: list[int], null: MatchingNull = NULL, units: int = 352) -> MatchingTest:
    """One block for each layer, with so many agreeing neurons."""
    pairs = tuple(BlockPair((i, None), (i, None), matching(count, units)) for i, count in enumerate(counts))
    layer_map = {i: i for i in range(len(counts))}
    return MatchingTest(pairs, null, len(counts) ** 2, layer_map, 512, 0, why_abstain(pairs, null, layer_map))


def matched(test: MatchingTest, cases: int = 1) -> Decision:
    return decide_matching(MATCHING, test, cases)


def test_matchings_that_agree_contradict() -> None:
    decision = matched(blocks([352] * 6))
    assert (decision.outcome, decision.powered) == (CONTRADICTS, True)
    assert "100.0% of 2112 neurons" in decision.reason


def test_one_inherited_layer_contradicts_and_is_named() -> None:
    decision = matched(blocks([1, 0, 250, 2, 1, 0]))
    assert decision.outcome == CONTRADICTS
    assert "layer 2" in decision.reason


def test_a_little_of_every_layer_contradicts() -> None:
    assert matched(blocks([70] * 6)).outcome == CONTRADICTS


def test_matchings_of_independent_models_support_with_the_null_in_words() -> None:
    decision = matched(blocks([1, 0, 3, 2, 1, 0]))
    assert (decision.outcome, decision.powered) == (SUPPORTS, True)
    assert "10 mismatched blocks" in decision.reason


def test_mismatched_blocks_that_agree_as_much_clear_and_accuse_nobody() -> None:
    """Layers that repeat each other: agreement of any two blocks shows nothing."""
    null = MatchingNull(tuple(matching(count, z=z) for count, z in zip([200] * 10, [10.0, 11.0] * 5, strict=True)))
    assert matched(blocks([210] * 6, null)).outcome == INCONCLUSIVE


def test_too_few_neurons_or_mismatched_blocks_decide_nothing() -> None:
    few = blocks([8] * 6, units=8)
    assert (matched(few).outcome, matched(few).powered) == (INCONCLUSIVE, False)
    assert "no power" in matched(few).reason
    no_null = blocks([352] * 6, MatchingNull(()))
    assert (matched(no_null).outcome, matched(no_null).powered) == (INCONCLUSIVE, False)


def test_no_blocks_decide_nothing() -> None:
    assert matched(blocks([])).outcome == INCONCLUSIVE


def test_an_agreement_that_is_significant_and_small_does_not_accuse() -> None:
    pairs = tuple(BlockPair((i, None), (i, None), matching(20, z=9.0)) for i in range(6))
    test = dataclasses.replace(blocks([0] * 6), blocks=pairs)
    decision = matched(test)
    assert decision.outcome == INCONCLUSIVE
    assert "reaches the critical" in decision.reason


@pytest.mark.parametrize(("agreements", "is_open"), [(15, False), (33, True)])
def test_half_of_what_contradicts_is_left_open(agreements: int, is_open: bool) -> None:
    """15 of 352 neurons is what first layers of independent models may share; 33 is more than any of them."""
    pairs = tuple(BlockPair((i, None), (i, None), matching(agreements, z=9.0)) for i in range(6))
    decision = matched(dataclasses.replace(blocks([0] * 6), blocks=pairs))
    assert (decision.outcome, decision.keeps_open) == (INCONCLUSIVE, is_open)


def test_a_block_that_agrees_is_not_hidden_by_a_larger_score() -> None:
    counts_and_scores = [(51, 18.2), (151, 12.0), *[(0, 0.0)] * 4]
    pairs = tuple(
        BlockPair((i, None), (i, None), matching(count, z=z)) for i, (count, z) in enumerate(counts_and_scores)
    )
    decision = matched(dataclasses.replace(blocks([0] * 6), blocks=pairs))
    assert decision.outcome == CONTRADICTS
    assert "42.9% in layer 1" in decision.reason


def test_the_level_of_a_matching_is_that_of_the_whole_claim() -> None:
    """A quarter of one block has a z that one case in ten thousand million still calls remarkable, and no more."""
    test = blocks([0, 0, 95, 0, 0, 0])
    assert matched(test).outcome == CONTRADICTS
    assert matched(test, cases=10**9).outcome != CONTRADICTS


# The judge


def judge_of(check: str, cases: int = 1, overrides: dict[str, dict[str, float]] | None = None) -> Judge:
    return Judge(check, JudgeContext(check, "test", "claims/test.yaml:1", "reference", False, cases, overrides or {}))


def recorded(judge: Judge) -> Evidence:
    assert judge.evidence is not None
    return judge.evidence


def test_the_judge_records_every_score() -> None:
    judge = judge_of("independence.channels", cases=3)
    with pytest.raises(ContradictingEvidence, match=r"norms: z = 30\.0"):
        judge.scores([score(0.5), score(30.0, name="norms")], note="a note")
    evidence = recorded(judge)
    assert evidence.outcome == CONTRADICTS
    assert evidence.value == 0.5
    assert evidence.details["tests"]["norms"]["z"] == 30
    assert evidence.details["calibrated_cases"] == 3


def test_the_judge_uses_the_cases_of_its_claim() -> None:
    z = critical_z(1e-6, 1) + 0.01
    alone, many = judge_of("independence.channels"), judge_of("independence.channels", cases=100)
    with pytest.raises(ContradictingEvidence):
        alone.scores([score(z)])
    with pytest.raises(pytest.skip.Exception):
        many.scores([score(z)])


def test_a_claim_may_not_make_scores_refute() -> None:
    """Its own threshold may loosen what supports; what the default would not call a contradiction stays open."""
    judge = judge_of("independence.channels", overrides={"independence.channels": {"minimum_effect": 0.001}})
    with pytest.raises(pytest.skip.Exception):
        judge.scores([score(20.0, effect=0.01)])
    assert recorded(judge).outcome == INCONCLUSIVE
    assert recorded(judge).keeps_open


def test_the_judge_records_a_matching_with_its_null() -> None:
    judge = judge_of("independence.anchored")
    judge.matching(blocks([1, 0, 3, 2, 1, 0]))
    evidence = recorded(judge)
    assert evidence.outcome == SUPPORTS
    assert evidence.value == pytest.approx(7 / 2112)
    assert evidence.details["null"]["blocks"] == 10
    assert evidence.details["null"]["largest_agreement"] == pytest.approx(3 / 352)
    assert len(evidence.details["blocks"]) == 6
    assert evidence.details["layer_map"] == {i: i for i in range(6)}


def test_a_matching_of_nothing_has_no_value() -> None:
    judge = judge_of("independence.anchored")
    with contextlib.suppress(pytest.skip.Exception):
        judge.matching(blocks([]))
    assert recorded(judge).outcome == INCONCLUSIVE
    assert recorded(judge).value is None


def test_the_critical_z_of_another_check_is_corrected_for_the_claim() -> None:
    judge = judge_of("initialization.origin", cases=7)
    assert judge.critical_z("independence.units", 4) == critical_z(1e-6, 28)
    assert judge.critical_z("independence.units", 0) == critical_z(1e-6, 7)
