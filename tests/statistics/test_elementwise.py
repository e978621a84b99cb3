from __future__ import annotations

import json
import math
from dataclasses import fields
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from checks.statistics import elementwise
from checks.statistics.elementwise import ElementwiseSums, concatenate, elementwise_sums, pool_centred

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
SIZES = st.sampled_from([1, 2, 3, 17, 1000, 5000])


def normal(n: int, seed: int, mean: float = 0.0, sd: float = 1.0) -> Tensor:
    return mean + sd * torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reference(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Raw and centred cosine by two passes in float64."""
    a, b = a.double().flatten(), b.double().flatten()
    raw = float(a @ b / (a.norm() * b.norm()))
    a, b = a - a.mean(), b - b.mean()
    return raw, float(a @ b / (a.norm() * b.norm()))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elementwise, "CPU_BLOCK", 512)


@given(n=st.sampled_from([3, 17, 1000, 5000]), seed=st.integers(0, 999), dtype=st.sampled_from(DTYPES))
@settings(deadline=None, max_examples=50)
def test_agrees_with_float64_reference(n: int, seed: int, dtype: torch.dtype) -> None:
    a, b = normal(n, seed).to(dtype), (normal(n, seed) + normal(n, seed + 1000)).to(dtype)
    sums = elementwise_sums(a, b)
    raw, centred = reference(a, b)
    difference = a.double() - b.double()
    assert sums.n == n
    assert sums.cosine == pytest.approx(raw, abs=1e-12)
    assert sums.centred_cosine == pytest.approx(centred, abs=1e-12)
    assert sums.equal == int((difference == 0).sum())
    assert sums.max_difference == float(difference.abs().max())
    assert sums.squared_difference == pytest.approx(float(difference.square().sum()), rel=1e-12)
    assert sums.sum_a == pytest.approx(float(a.double().sum()), abs=1e-9)
    assert sums.square_b == pytest.approx(float(b.double().square().sum()), rel=1e-12)
    assert sums.mean_squared_error == pytest.approx(float(difference.square().mean()), rel=1e-12)
    assert sums.l2_distance == pytest.approx(float(difference.norm()), rel=1e-12)
    assert sums.norm_ratio == pytest.approx(float(a.double().norm() / b.double().norm()), rel=1e-12)


@pytest.mark.parametrize(
    ("mean", "sd", "dtype"),
    [
        (1.0, 0.01, torch.float32),
        (1.0, 0.01, torch.bfloat16),
        (1000.0, 1e-3, torch.float32),
        (1000.0, 1e-3, torch.float64),
        (-1e6, 1e-3, torch.float64),
    ],
)
def test_centred_cosine_survives_a_large_mean(mean: float, sd: float, dtype: torch.dtype) -> None:
    shared = normal(5000, 0)
    a, b = [(mean + sd * (shared + normal(5000, seed))).to(dtype) for seed in (1, 2)]
    sums = elementwise_sums(a, b)
    centred = sums.centred_cosine
    assert centred == pytest.approx(reference(a, b)[1], abs=1e-6)
    assert 0.4 < centred < 0.6
    parts = [
        elementwise_sums(a[:7], b[:7]),
        elementwise_sums(a[7:3000], b[7:3000]),
        elementwise_sums(a[3000:], b[3000:]),
    ]
    assert concatenate(parts).centred_cosine == pytest.approx(centred, abs=1e-6)


def test_norm_vectors_are_independent_although_their_raw_cosine_is_high() -> None:
    sums = elementwise_sums(normal(4096, 1, 1.0, 0.01).float(), normal(4096, 2, 1.0, 0.01).float())
    assert sums.cosine == pytest.approx(0.9999, abs=2e-5)
    assert abs(sums.centred_cosine) < 4 / math.sqrt(4096)
    assert sums.relative_mean_squared_error == pytest.approx(2, abs=0.2)


@given(n=SIZES, seed=st.integers(0, 999), exponent=st.integers(-20, 20))
@settings(deadline=None, max_examples=30)
def test_scale_sign_and_permutation(n: int, seed: int, exponent: int) -> None:
    a, b = normal(n, seed, 0.5), normal(n, seed + 1000)
    plain, scale = elementwise_sums(a, b), 2.0**exponent
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    permuted = elementwise_sums(a[order], b[order])
    scaled, flipped = elementwise_sums(scale * a, b), elementwise_sums(-a, b)
    both = elementwise_sums(scale * a, scale * b)
    for field in ("cosine", "centred_cosine"):
        value = getattr(plain, field)
        if value is None:
            assert getattr(scaled, field) is getattr(flipped, field) is None
            continue
        assert getattr(scaled, field) == pytest.approx(value, abs=1e-12)
        assert getattr(permuted, field) == pytest.approx(value, abs=1e-12)
        assert getattr(flipped, field) == pytest.approx(-value, abs=1e-12)
    assert both.relative_mean_squared_error == pytest.approx(plain.relative_mean_squared_error)
    assert (permuted.equal, permuted.max_difference) == (plain.equal, plain.max_difference)
    assert scaled.norm_ratio == pytest.approx(scale * plain.norm_ratio)


@given(cuts=st.lists(st.integers(0, 3000), max_size=5), seed=st.integers(0, 999), mean=st.sampled_from([0.0, 1.0, 1e4]))
@settings(deadline=None, max_examples=40)
def test_concatenation_is_pooling(cuts: list[int], seed: int, mean: float) -> None:
    a, b = normal(3000, seed, mean), normal(3000, seed + 1000, -mean)
    a[::7] = b[::7]
    a[1500:] += 3  # pieces of different means
    a[11] = math.nan
    whole = elementwise_sums(a, b)
    edges = [0, *sorted(cuts), 3000]
    parts = [elementwise_sums(a[i:j], b[i:j]) for i, j in pairwise(edges)]
    summed = ElementwiseSums()
    for part in parts:
        summed = summed + part
    for pooled in (concatenate(parts), summed):
        assert (pooled.n, pooled.equal, pooled.nonfinite) == (whole.n, whole.equal, whole.nonfinite) == (2999, 215, 1)
        assert pooled.max_difference == whole.max_difference
        for field in ("cosine", "centred_cosine", "squared_difference", "square_a", "centred_square_a"):
            assert getattr(pooled, field) == pytest.approx(getattr(whole, field), rel=1e-9, abs=1e-9)


def test_pool_centred_ignores_the_means_of_the_tensors() -> None:
    norms = elementwise_sums(normal(4096, 1, 1.0, 0.01), normal(4096, 2, 1.0, 0.01))
    weights = elementwise_sums(normal(4096, 3, 0.0, 0.01), normal(4096, 4, 0.0, 0.01))
    assert abs(pool_centred([norms, weights]).centred_cosine) < 0.05
    assert concatenate([norms, weights]).centred_cosine > 0.99
    assert pool_centred([norms, weights]).n == 8192
    assert pool_centred([norms]) == norms
    assert pool_centred([]) == concatenate([]) == ElementwiseSums()


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_tensors(dtype: torch.dtype) -> None:
    a = normal(3000, 0).to(dtype)
    sums = elementwise_sums(a, a.clone())
    assert sums.cosine == pytest.approx(1, abs=1e-15)
    assert sums.centred_cosine == pytest.approx(1, abs=1e-15)
    assert (sums.equal, sums.max_difference, sums.relative_mean_squared_error) == (3000, 0.0, 0.0)


def test_relative_mean_squared_error_of_known_relations() -> None:
    a, b = normal(20000, 1), normal(20000, 2, 0.0, 3.0)
    assert elementwise_sums(a, b).relative_mean_squared_error == pytest.approx(2, abs=0.05)
    assert elementwise_sums(a, -a).relative_mean_squared_error == pytest.approx(4, abs=0.01)
    assert elementwise_sums(a, a + 0.01 * b).relative_mean_squared_error == pytest.approx(9e-4, rel=0.05)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2])
def test_nonfinite_positions_are_counted_and_left_out(bad: float, dtype: torch.dtype) -> None:
    a, b = normal(2000, 1).to(dtype), normal(2000, 2).to(dtype)
    keep = torch.ones(2000, dtype=torch.bool)
    keep[[3, 700, 701]] = False
    a, b = a.double(), b.double()
    clean = elementwise_sums(a[keep], b[keep])
    a[3], b[700], a[701], b[701] = bad, bad, bad, bad
    sums = elementwise_sums(a.to(dtype), b.to(dtype))
    assert (sums.n, sums.nonfinite, sums.equal) == (1997, 3, clean.equal)
    assert sums.max_difference == clean.max_difference
    assert sums.cosine == pytest.approx(clean.cosine, abs=1e-12)
    assert sums.centred_cosine == pytest.approx(clean.centred_cosine, abs=1e-12)


def test_nothing_finite() -> None:
    sums = elementwise_sums(torch.full((600,), math.nan), torch.zeros(600))
    assert sums == ElementwiseSums(nonfinite=600)
    assert sums.cosine is sums.centred_cosine is sums.mean_squared_error is sums.relative_mean_squared_error is None
    assert (ElementwiseSums() + sums).nonfinite == 600


@pytest.mark.parametrize("n", [0, 1, 2, 600])
@pytest.mark.parametrize("dtype", DTYPES)
def test_undefined_cosines_are_none(n: int, dtype: torch.dtype) -> None:
    zero, other = torch.zeros(n).to(dtype), normal(n, 1).to(dtype)
    assert elementwise_sums(zero, other).cosine is None
    assert elementwise_sums(other, zero).centred_cosine is None
    assert elementwise_sums(other, zero).norm_ratio is None
    constant = torch.full((n,), 0.1, dtype=torch.float64).to(dtype)
    assert elementwise_sums(constant, other).centred_cosine is None
    if n:
        assert elementwise_sums(constant, constant).relative_mean_squared_error == 0
        assert elementwise_sums(constant, zero).relative_mean_squared_error is None


def test_pooled_constants_stay_constant() -> None:
    parts = [elementwise_sums(torch.full((n,), 0.1, dtype=torch.float64), normal(n, n)) for n in (3, 5, 700, 1, 1234)]
    assert concatenate(parts).centred_cosine is None
    assert pool_centred(parts).centred_cosine is None


def test_one_element() -> None:
    sums = elementwise_sums(torch.tensor(2.0), torch.tensor([-3.0]))
    assert (sums.cosine, sums.centred_cosine, sums.max_difference) == (-1.0, None, 5.0)


@pytest.mark.parametrize("size", [7, 64, 100000])
def test_layout_does_not_matter(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elementwise, "CPU_BLOCK", size)
    a, b = normal(3000, 1).view(10, 30, 10), normal(3000, 2).view(10, 30, 10)
    plain = elementwise_sums(a, b)
    turned = elementwise_sums(a.permute(2, 0, 1), b.permute(2, 0, 1).contiguous())
    assert turned.cosine == pytest.approx(plain.cosine, abs=1e-12)
    assert turned.centred_cosine == pytest.approx(plain.centred_cosine, abs=1e-12)
    assert turned.max_difference == plain.max_difference


def test_mixed_dtypes_and_gradients() -> None:
    a = normal(100, 1).bfloat16().requires_grad_()
    sums = elementwise_sums(a, a.detach().double())
    assert sums.equal == 100


def test_float32_extremes_do_not_overflow() -> None:
    a = torch.tensor([3e38, -3e38, 1e-45, 2e38])
    assert elementwise_sums(a, a).cosine == pytest.approx(1, abs=1e-15)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(5,\)"):
        elementwise_sums(torch.zeros(2, 3), torch.zeros(5))
    for dtype in (torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64):
        with pytest.raises(TypeError, match="dequantise first"):
            elementwise_sums(torch.zeros(3), torch.zeros(3, dtype=dtype))
    packed = torch.zeros(3, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    with pytest.raises(TypeError, match="dequantise first"):
        elementwise_sums(packed, packed)


@given(st.lists(st.floats(), min_size=13, max_size=13), st.lists(st.integers(0, 10**18), min_size=13, max_size=13))
def test_stored_sums_come_back_to_the_last_bit(values: list[float], counts: list[int]) -> None:
    kept = {
        field.name: count if field.type == "int" else value
        for field, value, count in zip(fields(ElementwiseSums), values, counts, strict=True)
    }
    sums = ElementwiseSums(**kept)
    again = ElementwiseSums.from_json(json.loads(json.dumps(sums.as_json(), allow_nan=False)))
    assert repr(again) == repr(sums)


@pytest.mark.parametrize("stored", [{}, {"n": 3}, ElementwiseSums().as_json() | {"dot": "much"}])
def test_what_is_no_stored_sums_is_refused(stored: dict[str, int | str]) -> None:
    with pytest.raises((ValueError, KeyError)):
        ElementwiseSums.from_json(stored)
