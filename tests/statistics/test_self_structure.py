from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from checks.statistics.self_structure import RepeatedRun, repeated_runs, search_duplicates

ALPHA = math.log(1e-6)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mlp(seed: int, m: int = 96, d: int = 40) -> list[Tensor]:
    """Views of one MLP, with a direction that all layers of the model read and write."""
    return [normal(3 * seed + i, m, d) + normal(9000 + i, 1, d) for i in range(3)]


def tuned(views: list[Tensor], seed: int, noise: float = 1.0) -> list[Tensor]:
    return [view + noise * normal(seed + i, *view.shape) for i, view in enumerate(views)]


def test_layers_of_one_model_are_no_duplicates() -> None:
    for start in range(0, 60, 20):
        found = search_duplicates(20, lambda i, start=start: mlp(start + i))  # type: ignore[misc]
        assert found.searched == 190
        assert len(found.pairs) < 41
        assert found.duplicates(ALPHA, 0.0) == ()
        assert abs(found.strongest.test.z) < 5


def test_depth_up_scaling_is_found() -> None:
    sources = [*range(9), *range(3, 12)]
    members = [tuned(mlp(source), 500 + 9 * number) for number, source in enumerate(sources)]
    calls: list[int] = []

    def views(number: int) -> list[Tensor]:
        calls.append(number)
        return members[number]

    found = search_duplicates(18, views)
    pairs = {(pair.first, pair.second) for pair in found.duplicates(ALPHA, 0.1)}
    assert pairs == {(layer, layer + 6) for layer in range(3, 9)}
    assert repeated_runs(pairs) == (RepeatedRun(3, 9, 6),)
    # Exact tests grow with the members, not with the pairs.
    assert len(found.pairs) <= 36
    assert calls == list(range(18))
    assert found.pairs[0].log_p <= ALPHA


def test_upcycled_experts_are_found_and_independent_ones_not() -> None:
    dense = mlp(1)
    copies = search_duplicates(8, lambda i: tuned(dense, 100 + 9 * i, 2.0))
    assert len(copies.duplicates(ALPHA, 0.05)) >= 8
    assert not search_duplicates(8, lambda i: mlp(50 + i)).duplicates(ALPHA, 0.0)


def test_columns_are_sampled_in_wide_models() -> None:
    base = mlp(1, 64, 700)
    found = search_duplicates(3, lambda i: tuned(base, 100) if i == 2 else mlp(i + 1, 64, 700))
    assert {(pair.first, pair.second) for pair in found.duplicates(ALPHA, 0.1)} == {(0, 2)}


def test_members_without_a_screen() -> None:
    members = [mlp(1), [torch.zeros(96, 40)] * 3, mlp(2), [torch.full((96, 40), math.nan)] * 3]
    found = search_duplicates(4, members.__getitem__)
    assert found.unusable == (1, 3)
    assert found.searched == 1
    assert [(pair.first, pair.second) for pair in found.pairs] == [(0, 2)]
    assert search_duplicates(1, members.__getitem__).pairs == ()
    assert search_duplicates(0, members.__getitem__).strongest is None
    with pytest.raises(ValueError, match="member 1 has views"):
        search_duplicates(2, lambda i: mlp(1, 96 + i))


def test_runs() -> None:
    assert repeated_runs([]) == ()
    assert repeated_runs([(5, 1), (6, 2), (0, 9), (3, 7)]) == (RepeatedRun(1, 5, 3), RepeatedRun(0, 9, 1))
