from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from checks.statistics.pca import cloud_overlap


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cloud(seed: int, axes: int, n: int = 1500, d: int = 64) -> Tensor:
    """Points that spread along a few axes of a basis of their own."""
    basis = torch.linalg.qr(normal(axes, d, d)).Q
    return normal(seed, n, d) * torch.linspace(4, 0.5, d, dtype=torch.float64) @ basis


def test_one_space_overlaps_and_another_does_not() -> None:
    a = cloud(1, 5)
    same = cloud_overlap(a, cloud(2, 5)[:1200])
    assert same.overlap > 0.8
    assert same.distance < 0.1
    assert same.null_highest_overlap < 0.6
    assert same.projection_a.shape == (1500, 2)
    assert same.projection_b.shape == (1200, 2)
    for seed in range(4):
        apart = cloud_overlap(a, cloud(2, 70 + seed), seed=seed, permutations=5)
        assert apart.overlap < 0.6
        assert apart.overlap == pytest.approx(apart.null_overlap, abs=0.1)


def test_overlap_of_two_known_clouds() -> None:
    """Two axes with variances (1, s²) and (s², 1): |Σ| = s² for both, and (1 + s²)/2 squared between them."""
    s = 0.25
    a = torch.cat([normal(1, 40_000, 2) * torch.tensor([1.0, s]), torch.zeros(40_000, 2)], 1)
    b = torch.cat([normal(2, 40_000, 2) * torch.tensor([s, 1.0]), torch.zeros(40_000, 2)], 1)
    # A long constant side keeps the scaling of rows to norm 1 from bending the clouds.
    a[:, 3] = b[:, 3] = 1e3
    found = cloud_overlap(a, b, components=2, permutations=0)
    assert found.overlap == pytest.approx(2 * s / (1 + s * s), rel=0.02)
    assert found.null_overlap is None


def test_flat_spectra_have_no_power_and_the_null_says_so() -> None:
    found = cloud_overlap(normal(1, 4000, 24), normal(2, 4000, 24), permutations=5)
    assert found.overlap > 0.9
    assert found.null_overlap > 0.9


@given(seed=st.integers(0, 99))
@settings(deadline=None, max_examples=5)
def test_scale_order_and_a_common_rotation_change_nothing(seed: int) -> None:
    a, b = cloud(seed, seed), cloud(seed + 1, seed + 1)
    plain = cloud_overlap(a, b, permutations=0)
    turn = torch.linalg.qr(normal(seed + 5, 64, 64)).Q
    shuffled = torch.randperm(1500, generator=torch.Generator().manual_seed(seed))
    for left, right in ((3 * a, 1e-20 * b), (a[shuffled], b), (a @ turn, b @ turn), (b, a)):
        assert cloud_overlap(left, right, permutations=0).overlap == pytest.approx(plain.overlap, abs=0.02)


def test_undefined_and_errors() -> None:
    for a in (torch.zeros(50, 8), torch.ones(50, 8), normal(1, 2, 8)):
        found = cloud_overlap(a, cloud(1, 2)[:, :8])
        assert found.overlap is None
        assert "do not span" in found.reason
    with pytest.raises(ValueError, match="no common channels"):
        cloud_overlap(normal(1, 50, 8), normal(2, 50, 9))
    bad = normal(1, 50, 8)
    bad[3, 3] = math.inf
    with pytest.raises(ValueError, match="points of b hold non-finite"):
        cloud_overlap(normal(2, 50, 8), bad)
