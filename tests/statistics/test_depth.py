from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checks.statistics.depth import depth_pattern

COSINES = st.lists(st.one_of(st.none(), st.floats(-1, 1)), max_size=60)


@pytest.mark.parametrize(
    ("cosines", "name"),
    [
        ([], "no layers"),
        ([None, None], "no layers"),
        ([0.01] * 32, "uniformly low"),
        ([0.29], "uniformly low"),
        ([0.99] * 32, "uniformly high"),
        ([0.99 - 0.002 * i for i in range(32)], "uniformly high"),
        ([0.98] * 6 + [0.9] * 15 + [0.75] * 9, "high early, falling with depth"),
        ([0.99 - 0.01 * i for i in range(30)], "high early, falling with depth"),
        ([0.99] * 10 + [0.01] * 20, "some layers high"),
        ([0.01] * 20 + [0.99] * 10, "some layers high"),
        ([0.01, None, 0.99, 0.01], "some layers high"),
        ([0.6] * 30, "unclear"),
        ([0.75] * 15 + [0.98] * 15, "unclear"),
        ([0.3], "unclear"),
        ([None] * 5 + [0.95] * 10 + [0.7] * 15, "unclear"),
    ],
)
def test_names(cosines: list[float | None], name: str) -> None:
    assert depth_pattern(cosines).name == name


def test_figures() -> None:
    pattern = depth_pattern([0.95, 0.9, None, 0.8, 0.75, 0.7])
    assert pattern.slope == pytest.approx(-0.25)
    assert (pattern.early, pattern.late, pattern.high_layers) == (0.95, 0.7, (0, 1))
    wide = depth_pattern([0.95, 0.9, None, 0.8, 0.75, 0.7], early_layers=3)
    assert wide.early == pytest.approx(0.925)
    assert wide.late == pytest.approx(0.75)
    assert depth_pattern([None, 0.5]).slope is None
    assert depth_pattern([0.98] * 5 + [0.5] * 25).early == pytest.approx(0.98)  # "Layer 1-5" of 30


def test_thresholds_are_arguments() -> None:
    assert depth_pattern([0.4] * 6, low=0.5).name == "uniformly low"
    assert depth_pattern([0.8] * 6, high=0.8).name == "uniformly high"
    falling = [0.92 - 0.01 * i for i in range(6)]
    assert depth_pattern(falling, fall=0.05).name == "high early, falling with depth"
    assert depth_pattern(falling, fall=0.06).name == "unclear"


@given(cosines=COSINES)
@settings(deadline=None)
def test_names_keep_their_promise(cosines: list[float | None]) -> None:
    pattern = depth_pattern(cosines)
    measured = [cosine for cosine in cosines if cosine is not None]
    assert (pattern.name == "no layers") == (not measured)
    assert list(pattern.high_layers) == [i for i, cosine in enumerate(cosines) if cosine is not None and cosine >= 0.9]
    if measured:
        assert (pattern.name == "uniformly low") == (max(measured) < 0.3)
        assert (pattern.name == "uniformly high") == (min(measured) >= 0.9)
    if pattern.name == "high early, falling with depth":
        assert pattern.slope < 0 < pattern.early - pattern.late
        assert min(measured) >= 0.3


@given(cosines=COSINES.filter(lambda cosines: sum(cosine is not None for cosine in cosines) > 1))
@settings(deadline=None)
def test_reversed_depth_turns_the_slope(cosines: list[float | None]) -> None:
    forward, backward = depth_pattern(cosines), depth_pattern(cosines[::-1])
    assert backward.slope == pytest.approx(-forward.slope, abs=1e-9)
    assert (forward.early, forward.late) == (pytest.approx(backward.late), pytest.approx(backward.early))


def test_errors() -> None:
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="finite"):
            depth_pattern([0.5, value])
    with pytest.raises(ValueError, match="low <= high"):
        depth_pattern([0.5], low=0.9, high=0.3)
    with pytest.raises(ValueError, match="early_layers"):
        depth_pattern([0.5], early_layers=0)
