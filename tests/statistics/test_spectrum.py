from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from checks.statistics.spectrum import (
    attention_spectrum,
    compare_spectra,
    product_singular_values,
    spectrum_features,
)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(d: int, seed: int) -> Tensor:
    return torch.linalg.qr(normal(seed, d, d)).Q


@given(seed=st.integers(0, 99), r=st.integers(1, 6), m=st.integers(1, 9), n=st.integers(1, 9))
@settings(deadline=None, max_examples=30)
def test_singular_values_of_the_product(seed: int, r: int, m: int, n: int) -> None:
    left, right = normal(seed, r, m), normal(seed + 1, r, n)
    expected = torch.linalg.svdvals(left.T @ right)[: min(r, m, n)]
    assert torch.allclose(product_singular_values(left, right), expected, atol=1e-10)


def test_no_change_of_basis_or_order_of_heads_matters() -> None:
    q, k = normal(1, 32, 24), normal(2, 16, 24)
    plain = attention_spectrum(q, k, heads=8, kv_heads=4)
    assert len(plain) == 8 * 4
    turn = rotation(24, 3)
    assert torch.allclose(attention_spectrum(q @ turn, k @ turn, 8, 4), plain)
    # Groups of two query heads and their key head together, and the two within a group.
    groups = [2, 0, 3, 1]
    heads = [2 * g + s for g in groups for s in (1, 0)]
    moved = (q.reshape(8, 4, 24)[heads].reshape(32, 24), k.reshape(4, 4, 24)[groups].reshape(16, 24))
    assert torch.allclose(attention_spectrum(*moved, 8, 4), plain)
    assert not torch.allclose(attention_spectrum(q, k.flip(0), 8, 4), plain)
    assert torch.allclose(spectrum_features(5 * plain), spectrum_features(plain))


def layers(seed: int, count: int, noise: float = 0.0, other: int = 0) -> list[Tensor]:
    """Features with a common smooth trend, an own part per layer, and some noise."""
    depth = torch.linspace(0, 1, count, dtype=torch.float64)[:, None]
    trend = depth * normal(7, 1, 64) + depth.square() * normal(8, 1, 64)
    own = normal(seed, count, 64)
    return list(5 * trend + own + noise * normal(other, count, 64))


def test_derived_and_independent_depth_profiles() -> None:
    a = layers(1, 24)
    derived = compare_spectra(a, layers(1, 24, 0.5, 99))
    assert derived.similarity > 0.7
    assert derived.z > 5
    assert derived.rank == 1 / 24
    assert derived.ratio < 0.5
    independent = [compare_spectra(layers(10 + s, 24), layers(60 + s, 24)) for s in range(30)]
    assert min(one.ratio for one in independent) > 0.8
    # The trend that all share brings layers of equal depth nearer, and gives no similarity.
    assert max(abs(one.similarity) for one in independent) < 0.2
    assert max(one.z for one in independent) < 4
    assert sum(one.rank <= 1 / 24 for one in independent) < 6


def test_other_depths_are_aligned() -> None:
    a = layers(1, 24)
    kept = [layer for number, layer in enumerate(a) if number not in (5, 6, 11, 17)]
    found = compare_spectra(kept, a)
    assert found.layer_map == tuple(number for number in range(24) if number not in (5, 6, 11, 17))
    assert found.similarity > 0.6
    assert found.rank == 1 / 24
    up_scaled = compare_spectra(a[:16] + a[8:], a)
    assert up_scaled.layers == (32, 24)
    assert up_scaled.similarity > 0.3
    apart = compare_spectra(layers(5, 20), a)
    assert apart.similarity < 0.45
    assert apart.z < 3


def test_undefined_and_errors() -> None:
    few = compare_spectra(layers(1, 7), layers(2, 9))
    assert "need 8" in few.reason
    assert few.similarity is None
    assert few.ratio > 0.8
    assert compare_spectra(layers(1, 7), layers(1, 7)).ratio == 0
    assert "need 2" in compare_spectra(layers(1, 1), layers(2, 9)).reason
    assert compare_spectra([torch.zeros(4)] * 3, [torch.zeros(4)] * 3).ratio is None
    smooth = [torch.full((4,), float(i)) for i in range(10)]
    assert "smooth trend" in compare_spectra(smooth, smooth).reason
    assert float(spectrum_features(torch.zeros(5)).abs().sum()) == 0
    with pytest.raises(ValueError, match="are not 3 and 2 heads"):
        attention_spectrum(normal(1, 6, 4), normal(2, 6, 4), 3, 2)
    with pytest.raises(ValueError, match="no product"):
        product_singular_values(normal(1, 3, 4), normal(2, 4, 4))
    bad = normal(1, 3, 4)
    bad[0, 0] = math.nan
    with pytest.raises(ValueError, match="non-finite"):
        product_singular_values(bad, bad)
    with pytest.raises(ValueError, match="not finite"):
        compare_spectra([torch.full((4,), math.nan)] * 9, layers(1, 9))
