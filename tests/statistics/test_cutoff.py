"""Knowledge over time: exact chances, and cutoffs of simulated models."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from checks.statistics.cutoff import (
    DatedAnswer,
    at_least,
    estimate_cutoff,
    knowledge,
    month_name,
    month_number,
)

START = month_number("2022-01")


def model(cutoff: int | None, known: float = 0.8, chance: float = 0.1, seed: int = 0) -> list[DatedAnswer]:
    """Two questions a month for four years, answered by a model that knows until the month number `cutoff`."""
    generator = np.random.default_rng(seed)
    months = [START + index // 2 for index in range(96)]
    return [
        DatedAnswer(
            month, bool(generator.random() < (known if cutoff is not None and month <= cutoff else chance)), chance
        )
        for month in months
    ]


@pytest.mark.parametrize(
    ("date", "name"), [("2025-05-31", "2025-05"), ("2025-05", "2025-05"), ("2025", "2025-12"), ("0001-01", "0001-01")]
)
def test_months(date: str, name: str) -> None:
    assert month_name(month_number(date)) == name


@pytest.mark.parametrize("date", ["2025-13", "2025-00", "May 2025", ""])
def test_no_months(date: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        month_number(date)


@given(st.integers(1, 30), st.floats(0, 1), st.integers(0, 30))
def test_equal_chances_are_binomial(trials: int, chance: float, successes: int) -> None:
    expected = stats.binom.sf(successes - 1, trials, chance)
    assert at_least(successes, [chance] * trials) == pytest.approx(expected, abs=1e-12)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.integers(0, 12))
def test_order_does_not_matter(chances: list[float], successes: int) -> None:
    assert at_least(successes, chances) == pytest.approx(at_least(successes, chances[::-1]), abs=1e-12)


def test_no_probability() -> None:
    with pytest.raises(ValueError, match="no probability"):
        at_least(1, [1.5])


def test_knowledge() -> None:
    found = knowledge([DatedAnswer(START, True, 0.2), DatedAnswer(START, False, 0.4)])
    assert (found.questions, found.right, found.share) == (2, 1, 0.5)
    assert found.by_chance == pytest.approx(0.3)
    assert found.p == pytest.approx(1 - 0.8 * 0.6)
    assert found.above_chance == pytest.approx(0.2 / 0.7)
    assert knowledge([]).p == 1.0
    assert knowledge([DatedAnswer(START, False, 0.4)]).above_chance == 0.0


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("months", [10, 24, 40])
def test_the_cutoff_of_a_simulated_model(months: int, seed: int) -> None:
    found = estimate_cutoff(model(START + months, seed=seed))
    assert found is not None
    assert found.earliest <= found.month <= found.latest
    assert abs(found.month - (START + months)) <= 5
    assert found.earliest - 1 <= START + months <= found.latest + 1


def test_a_model_that_knows_all_has_its_cutoff_at_the_end() -> None:
    found = estimate_cutoff(model(START + 47, known=1.0))
    assert found is not None
    assert found.latest == START + 47


@pytest.mark.parametrize("chance", [0.0001, 0.1, 0.3])
def test_a_model_that_guesses_has_none(chance: float) -> None:
    assert all(estimate_cutoff(model(None, chance=chance, seed=seed)) is None for seed in range(20))
    assert estimate_cutoff([]) is None
