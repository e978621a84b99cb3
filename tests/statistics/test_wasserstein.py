from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from checks.statistics.wasserstein import element_distance, wasserstein_distance


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(seed=st.integers(0, 999), n=st.integers(1, 40), m=st.integers(1, 40))
@settings(deadline=None, max_examples=40)
def test_agrees_with_scipy(seed: int, n: int, m: int) -> None:
    a, b = normal(seed, n), 2 * normal(seed + 1, m) + 1
    assert wasserstein_distance(a, b) == pytest.approx(float(stats.wasserstein_distance(a, b)), abs=1e-9)
    assert wasserstein_distance(a, b) == pytest.approx(wasserstein_distance(b, a), abs=1e-9)
    assert wasserstein_distance(a, a) == 0


def test_known_distances_on_the_stated_scale() -> None:
    a, b = normal(1, 60_000), normal(2, 60_000)
    assert element_distance(a, b + 0.5).distance == pytest.approx(0.5, abs=0.02)
    spread = element_distance(a, 3 * b)
    assert spread.distance == pytest.approx(math.sqrt(2 / math.pi) * 2 / math.sqrt(5), abs=0.02)
    assert spread.shape < 0.02
    flat = element_distance(a, torch.rand(60_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    assert flat.shape > 0.1


def test_independent_tensors_of_one_recipe_are_at_the_floor() -> None:
    found = element_distance(0.02 * normal(1, 200, 300), 0.02 * normal(2, 200, 300))
    assert found.distance < 0.02
    assert 0.2 * found.floor < found.distance < 5 * found.floor


@given(seed=st.integers(0, 999), scale=st.sampled_from([1e-6, 1.0, 1e6]))
@settings(deadline=None, max_examples=10)
def test_one_factor_and_one_shift_for_both_change_nothing(seed: int, scale: float) -> None:
    a, b = normal(seed, 500), normal(seed + 1, 800) + 1
    plain, changed = element_distance(a, b), element_distance(scale * (a + 3), scale * (b + 3))
    assert changed.distance == pytest.approx(plain.distance)
    assert plain.n == 500


def test_undefined_and_errors() -> None:
    assert element_distance(torch.ones(9), 2 * torch.ones(9)).reason == "both sides are constant"
    assert element_distance(torch.ones(9), normal(1, 9)).shape is None
    assert "0 finite" in element_distance(torch.full((9,), math.nan), normal(1, 9)).reason
    with pytest.raises(TypeError, match="dequantise"):
        element_distance(torch.ones(9, dtype=torch.int8), normal(1, 9))
    with pytest.raises(ValueError, match="empty"):
        wasserstein_distance(torch.zeros(0), normal(1, 3))
    with pytest.raises(ValueError, match="not finite"):
        wasserstein_distance(torch.tensor([math.inf]), normal(1, 3))
