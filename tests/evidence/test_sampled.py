from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checks.evidence.decisions import decide_by_summary
from checks.evidence.sampled import decide_summary
from checks.evidence.thresholds import threshold
from checks.pair.comparison import CosineSummary
from checks.statistics.sampling import CosineEstimate

LIMITS = threshold("similarity.mean")  # supports below 0.1, contradicts from 0.8, in size


def estimated(cosine: float | None, error: float = 0.01, **changes: Any) -> CosineEstimate:
    """Of a tensor of 100 blocks of 32,768 elements, 20 of which were read."""
    values: dict[str, Any] = {
        "cosine": cosine,
        "variance": error**2,
        "third": 0.0,
        "freedom": 17.0,
        "blocks": 100,
        "blocks_read": 20,
        "drawn": 18,
        "elements": 100 << 15,
        "elements_read": 20 << 15,
        "drawn_equal": False,
        "drawn_share": 18 / 98,
        "block": 1 << 15,
        "unseen_elements": 14 << 15,
        "strongest_block": None if cosine is None else abs(cosine),
    }
    return CosineEstimate(**{**values, **changes})


def summary(estimate: CosineEstimate | None, **changes: Any) -> CosineSummary:
    values: dict[str, Any] = {
        "cosine": estimate.cosine if estimate else None,
        "raw_cosine": None,
        "elements": estimate.elements if estimate else 0,
        "candidate_elements": 100 << 15,
        "null_elements": estimate.elements_read - 1 if estimate else 0,
        "tensors": int(estimate is not None and estimate.cosine is not None),
        "counterparts": 1,
        "estimate": estimate,
    }
    return CosineSummary(**{**values, **changes})


@pytest.mark.parametrize("sign", [1, -1])
def test_the_whole_interval_has_to_lie_beyond_a_bound(sign: int) -> None:
    def outcome(cosine: float, error: float) -> str:
        return decide_summary(LIMITS, summary(estimated(sign * cosine, error))).outcome

    assert outcome(0.9, 0.01) == "contradicts"
    assert outcome(0.9, 0.1) == "inconclusive"  # the interval reaches below 0.8
    assert outcome(0.01, 0.01) == "supports"
    assert outcome(0.01, 0.1) == "inconclusive"  # the interval reaches above 0.1
    assert outcome(0.5, 0.01) == "inconclusive"


def test_support_says_what_was_not_seen() -> None:
    decision = decide_summary(LIMITS, summary(estimated(0.0)))
    assert decision.powered
    assert f"confined to {14 << 15} elements would not be seen" in decision.reason
    assert "95 % confidence" in decision.reason


def test_equal_random_blocks_contradict_and_are_never_called_identical() -> None:
    decision = decide_summary(LIMITS, summary(estimated(1.0, 0.0, drawn_equal=True)))
    assert decision.outcome == "contradicts"
    assert "all 18 random blocks are equal" in decision.reason
    assert "identical" not in decision.reason


def test_equal_random_blocks_of_some_tensors_beside_others_leave_it_open() -> None:
    decision = decide_summary(LIMITS, summary(estimated(0.4, 0.0, drawn_equal=True)))
    assert decision.outcome == "inconclusive"
    assert decision.keeps_open


def test_one_block_that_stands_out_keeps_a_sample_from_supporting() -> None:
    confined = summary(estimated(0.02, strongest_block=0.97))
    decision = decide_summary(LIMITS, confined)
    assert decision.outcome == "inconclusive"
    assert decision.keeps_open
    assert "one block alone" in decision.reason
    # Blocks of tables of tokens resemble each other anyway.
    assert decide_summary(LIMITS, confined, strongest_block_counts=False).outcome == "supports"


def test_one_tensor_that_stands_out_decides() -> None:
    independent = estimated(0.02)
    assert decide_summary(LIMITS, summary(independent, strongest=("w", 0.995))).outcome == "contradicts"
    assert decide_summary(LIMITS, summary(independent, strongest=("w", 0.5))).outcome == "inconclusive"
    assert decide_summary(LIMITS, summary(independent, strongest=("w", 0.05))).outcome == "supports"


def test_without_an_interval_nothing_is_decided() -> None:
    for cosine in (0.0, 0.99):
        decision = decide_summary(LIMITS, summary(estimated(cosine, drawn=3)))
        assert decision.outcome == "inconclusive"
        assert "expected 6 or more" in decision.reason
    assert decide_summary(LIMITS, summary(estimated(None))).outcome == "inconclusive"


def test_few_elements_have_no_power() -> None:
    few = summary(estimated(0.0), null_elements=100)
    assert decide_summary(LIMITS, few).outcome == "inconclusive"
    assert decide_summary(LIMITS, replace(few, null_elements=10**6)).outcome == "supports"


def test_little_coverage_supports_nothing() -> None:
    assert decide_summary(LIMITS, summary(estimated(0.0), candidate_elements=10**9)).outcome == "inconclusive"


@given(st.floats(-1, 1))
def test_a_screening_never_supports(cosine: float) -> None:
    exact = estimated(cosine, 0.0, blocks_read=100, elements_read=100 << 15)
    assert exact.is_complete
    full, screened = (decide_summary(LIMITS, summary(exact, may_support=may)) for may in (True, False))
    assert screened.outcome != "supports"
    assert (screened.outcome == "contradicts") == (full.outcome == "contradicts") == (abs(cosine) >= 0.8)


def test_a_screening_that_read_nothing_says_so() -> None:
    decision = decide_summary(LIMITS, summary(None, may_support=False))
    assert decision.outcome == "inconclusive"
    assert "none of it is read" in decision.reason


@given(st.floats(-1, 1))
def test_what_was_read_in_full_is_decided_as_ever(cosine: float) -> None:
    complete = estimated(cosine, 0.0, blocks_read=100, elements_read=100 << 15)
    exact = replace(summary(complete), estimate=None)
    as_ever = decide_by_summary(LIMITS, exact)
    assert decide_summary(LIMITS, exact) == as_ever
    assert decide_summary(LIMITS, summary(complete)) == as_ever
