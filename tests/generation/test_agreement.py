"""What agreements mean: accusations need certainty, an effect, and more than unrelated models show."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from checks.evidence.decisions import Decision
from checks.evidence.record import CONTRADICTS, INCONCLUSIVE, SUPPORTS
from checks.evidence.thresholds import threshold
from checks.generation.agreement import decide_agreement
from checks.statistics.agreement import ControlledAgreement, equal_answers

LIMITS = threshold("behavior.next_token")
PROMPTS = 200

FOUND = ControlledAgreement(
    reference="r1",
    agreement=0.7,
    best_control="r2",
    control_agreement=0.4,
    excess=0.3,
    spread=0.1,
    controls=3,
    p=1e-8,
    detectable=0.15,
)
ORDINARY = replace(FOUND, reference="r2", agreement=0.4, excess=-0.3, p=0.9)


def decided(*found: ControlledAgreement) -> Decision:
    return decide_agreement(LIMITS, found, "next words")


def test_a_certain_and_large_excess_contradicts() -> None:
    decision = decided(ORDINARY, FOUND)
    assert decision.outcome == CONTRADICTS
    assert "70% equal next words with r1, 40% with r2" in decision.reason


@pytest.mark.parametrize(
    "changes",
    [
        {"p": 0.001},  # corrected by two references
        {"excess": 0.09},
        {"spread": 0.31},
        {"p": 0.01},
    ],
)
def test_a_remarkable_one_alone_is_left_open(changes: dict[str, float]) -> None:
    decision = decided(ORDINARY, replace(FOUND, **changes))
    assert decision.outcome == INCONCLUSIVE
    assert "remarkable" in decision.reason


def test_one_with_the_effect_decides_behind_a_more_certain_one_without() -> None:
    certain = replace(FOUND, reference="r3", p=1e-12, spread=0.5)
    assert decided(certain, FOUND).outcome == CONTRADICTS


def test_a_pass_needs_power() -> None:
    assert decided(ORDINARY).outcome == INCONCLUSIVE
    assert "no power" in decided(ORDINARY).reason
    assert decided(replace(ORDINARY, detectable=0.05)).outcome == SUPPORTS


def answers(seed: int, common: float) -> list[str]:
    shared = np.random.default_rng(0).random(PROMPTS) < common
    own = np.random.default_rng(seed).integers(0, 80, PROMPTS)
    return ["the" if one else f"w{word}" for one, word in zip(shared, own, strict=True)]


def mixed(base: list[str], own: list[str], kept: float, seed: int) -> list[str]:
    keep = np.random.default_rng(seed).random(PROMPTS) < kept
    return [one if stays else other for one, other, stays in zip(base, own, keep, strict=True)]


@pytest.mark.parametrize(("common", "outcome"), [(0.35, INCONCLUSIVE), (0.0, SUPPORTS)])
def test_unrelated_models(common: float, outcome: str) -> None:
    """With words that all say, 200 prompts lack power; without any, an unrelated model passes."""
    references = {f"r{seed}": answers(seed, common) for seed in range(1, 5)}
    assert decided(*equal_answers(answers(9, common), references, 2.5e-4)).outcome == outcome


def test_agreement_that_unrelated_models_show_too_does_not_contradict() -> None:
    """Equal training text: nearer to one reference, and the controls differ by as much among themselves."""
    first = answers(1, 0.35)
    references = {
        "r1": first,
        "r2": mixed(first, answers(2, 0.35), 0.5, 7),
        "r3": answers(3, 0.0),
        "r4": answers(4, 0.35),
    }
    found = equal_answers(mixed(first, answers(9, 0.35), 0.9, 8), references, 2.5e-4)
    assert min(one.corrected_p(4) for one in found) < 1e-3
    decision = decided(*found)
    assert decision.outcome == INCONCLUSIVE
    assert "controls differ" in decision.reason
