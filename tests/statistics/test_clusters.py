from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from checks.statistics.clusters import centroid_similarity, k_means


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def table(seed: int, n: int = 500, d: int = 32) -> Tensor:
    """Rows around a few centres."""
    centres = normal(seed, 12, d)
    return centres[torch.arange(n) % 12] + 0.7 * normal(seed + 1, n, d)


def test_k_means_finds_separate_clusters() -> None:
    centres = 10 * normal(3, 5, 8)
    points = centres.repeat(40, 1) + 0.1 * normal(4, 200, 8)
    found = k_means(points, 5, seed=1)
    assert float(torch.cdist(found, centres).amin(1).max()) < 0.2
    assert float(torch.cdist(found, centres).amin(0).max()) < 0.2
    assert torch.equal(found, k_means(points, 5, seed=1))


@given(seed=st.integers(0, 99), n=st.integers(1, 30))
@settings(deadline=None, max_examples=20)
def test_centroids_are_the_means_of_their_points(seed: int, n: int) -> None:
    points = normal(seed, n, 3)
    centroids = k_means(points, min(4, n), seed)
    nearest = torch.cdist(points, centroids).argmin(1)
    for number in range(len(centroids)):
        mine = points[nearest == number]
        if len(mine):
            assert torch.allclose(mine.mean(0), centroids[number], atol=1e-5)


def test_derived_and_independent_tables() -> None:
    a = table(1)
    derived = centroid_similarity(a, a[:450] + 0.3 * normal(9, 450, 32))
    assert derived.cosine > 0.9
    assert derived.z > 6
    scores = [centroid_similarity(table(10 * s), table(10 * s + 5), permutations=20) for s in range(12)]
    assert max(one.z for one in scores) < 5
    assert abs(math.fsum(one.z for one in scores) / 12) < 1
    assert max(one.cosine for one in scores) < 0.8
    permuted = centroid_similarity(a, a[:, torch.randperm(32, generator=torch.Generator().manual_seed(1))])
    assert permuted.z < 4.5


@given(scale=st.sampled_from([1e-25, 0.5, 1e20]))
@settings(deadline=None, max_examples=3)
def test_one_factor_changes_nothing(scale: float) -> None:
    a, b = table(1), table(1) + 0.3 * normal(9, 500, 32)
    plain, scaled = (centroid_similarity(a, factor * b, permutations=5) for factor in (1.0, scale))
    assert scaled.cosine == pytest.approx(plain.cosine, abs=1e-3)


def test_undefined_and_errors() -> None:
    assert "a has 20 rows" in centroid_similarity(normal(1, 20, 4), normal(2, 90, 4)).reason
    assert "rows of b are equal" in centroid_similarity(normal(1, 90, 4), torch.ones(90, 4)).reason
    with pytest.raises(ValueError, match="no common channels"):
        centroid_similarity(normal(1, 90, 4), normal(2, 90, 5))
    bad = normal(1, 90, 4)
    bad[3, 3] = math.nan
    with pytest.raises(ValueError, match="non-finite"):
        centroid_similarity(bad, normal(2, 90, 4))
    with pytest.raises(ValueError, match="non-finite"):
        k_means(bad, 3)
    with pytest.raises(ValueError, match="cannot make"):
        k_means(normal(1, 3, 2), 4)
