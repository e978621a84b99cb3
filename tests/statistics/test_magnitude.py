from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from torch import Tensor

from checks.statistics.elementwise import elementwise_sums
from checks.statistics.magnitude import Magnitude, magnitude, robust_cosine


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of(a: Tensor, b: Tensor) -> Magnitude:
    return magnitude(elementwise_sums(a, b))


def test_the_documented_error_accuses_small_weights_and_the_scale_free_one_does_not() -> None:
    a, b = 0.002 * normal(1, 50_000), 0.002 * normal(2, 50_000)
    apart = of(a, b)
    assert apart.below_documented
    assert apart.relative_mse == pytest.approx(2, abs=0.05)
    assert apart.relative_distance == pytest.approx(1, abs=0.02)
    tuned = of(a, a + 0.0002 * normal(3, 50_000))
    assert tuned.relative_mse == pytest.approx(0.01, abs=0.001)
    assert not of(100 * a, 100 * a + 0.02 * normal(3, 50_000)).below_documented


@given(seed=st.integers(0, 999), scale=st.sampled_from([1e-6, 1.0, 1e6]))
@settings(deadline=None, max_examples=15)
def test_distances_agree_with_float64(seed: int, scale: float) -> None:
    a, b = scale * normal(seed, 100), scale * (normal(seed + 1, 100) + 0.3)
    found = of(a, b)
    assert found.distance == pytest.approx(float((a - b).norm()))
    assert found.relative_distance == pytest.approx(float((a - b).norm() / torch.cat([a, b]).norm()))
    assert (found.norm_a, found.norm_b) == pytest.approx((float(a.norm()), float(b.norm())))
    assert found.mse == pytest.approx(float((a - b).square().mean()))


def test_zero_and_constant_tensors_are_defined() -> None:
    zero = torch.zeros(9)
    both = of(zero, zero)
    assert (both.mse, both.distance, both.relative_distance, both.relative_mse) == (0, 0, None, 0)
    assert both.reason == "both tensors are zero"
    one = of(zero, normal(1, 9))
    assert one.relative_distance == pytest.approx(1)
    assert one.reason is None
    assert of(torch.ones(9), 2 * torch.ones(9)).reason == "both tensors are constant"
    assert of(torch.zeros(0), torch.zeros(0)).reason == "no finite positions"


@given(seed=st.integers(0, 999), ties=st.booleans())
@settings(deadline=None, max_examples=20)
def test_spearman_agrees_with_its_definition(seed: int, ties: bool) -> None:
    a, b = normal(seed, 300), normal(seed, 300) + normal(seed + 1, 300)
    if ties:
        a = a.round()
    found = robust_cosine(a, b)
    assert found.spearman == pytest.approx(float(spearmanr(a, b).statistic))
    cubed = robust_cosine(a**3, 5 * b - 2)
    assert cubed.spearman == pytest.approx(found.spearman)


def test_outliers_do_not_move_it() -> None:
    a, b = normal(1, 10_000), normal(2, 10_000)
    a[5] = b[5] = 1e4
    assert elementwise_sums(a, b).centred_cosine > 0.99
    found = robust_cosine(a, b)
    assert abs(found.spearman) < 5 * found.null_sd
    assert abs(found.winsorized) < 0.05
    related = normal(3, 10_000)
    hidden = related.clone()
    hidden[7] = -1e6
    assert abs(elementwise_sums(related, hidden).centred_cosine) < 0.05
    assert robust_cosine(related, hidden).spearman > 0.99
    assert robust_cosine(related, hidden).winsorized > 0.99


def test_sampling_dtypes_and_shapes() -> None:
    a = normal(1, 400, 300)
    b = a + normal(2, 400, 300)
    found = robust_cosine(a, b, positions=20_000, seed=4)
    assert found.positions == 20_000
    assert found.spearman == pytest.approx(robust_cosine(a, b).spearman, abs=0.03)
    assert robust_cosine(a.bfloat16(), b.half(), 20_000, 4).spearman == pytest.approx(found.spearman, abs=0.01)
    a[0, 0] = math.nan
    assert robust_cosine(a, b).positions == 120_000 - 1


def test_undefined_and_errors() -> None:
    x = normal(1, 50)
    for side, words in ((torch.zeros(50), "b is zero"), (torch.ones(50), "b is constant")):
        found = robust_cosine(x, side)
        assert found.spearman is found.winsorized is None
        assert words in found.reason
    assert "finite positions" in robust_cosine(torch.full((9,), math.nan), x[:9]).reason
    with pytest.raises(ValueError, match="no common positions"):
        robust_cosine(x, x[:3])
    with pytest.raises(TypeError, match="dequantise"):
        robust_cosine(x, x.long())
