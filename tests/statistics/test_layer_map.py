from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from checks.statistics.layer_map import expert_pairs, layer_map, mismatched_pairs


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


MAPS = {
    "equal": list(range(8)),
    "layers dropped": [0, 1, 3, 5, 6, 7],
    "depth up-scaled": [0, 1, 2, 3, 4, 5, 2, 3, 4, 5, 6, 7],
    "layers repeated": [0, 0, 1, 1, 2, 2, 3, 4, 5, 6, 7],
}


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("seed", range(5))
def test_planted_maps_are_found(name: str, seed: int) -> None:
    expected = MAPS[name]
    scores = 0.3 * normal(seed, len(expected), 8) + 2 * normal(99, 8)
    scores[range(len(expected)), expected] += 2
    assert layer_map(scores) == expected
    assert layer_map(5 * scores + normal(seed, len(expected), 1)) == expected


@given(seed=st.integers(0, 999), rows=st.integers(1, 5), columns=st.integers(1, 5), jump=st.floats(0, 3))
@settings(deadline=None, max_examples=30)
def test_no_path_is_better(seed: int, rows: int, columns: int, jump: float) -> None:
    import itertools

    scores = normal(seed, rows, columns)
    values = scores - scores.mean(1, keepdim=True) - scores.mean(0) + scores.mean()
    spread = float(values.std(correction=0))
    values = values / spread if spread > 1e-12 else torch.zeros_like(values)

    def worth(path: tuple[int, ...]) -> float:
        jumps = sum(after != before + 1 for before, after in itertools.pairwise(path))
        return float(values[range(rows), list(path)].sum()) - jump * jumps

    best = max(itertools.product(range(columns), repeat=rows), key=worth)
    assert worth(tuple(layer_map(scores, jump))) == pytest.approx(worth(best), abs=1e-4)


def test_equal_scores_give_the_diagonal() -> None:
    assert layer_map(torch.zeros(5, 5)) == [0, 1, 2, 3, 4]
    assert layer_map(torch.ones(1, 1)) == [0]


def test_map_errors() -> None:
    for bad in (torch.zeros(3), torch.zeros(0, 3), torch.zeros(3, 0)):
        with pytest.raises(ValueError, match="layers, layers"):
            layer_map(bad)
    with pytest.raises(ValueError, match="non-finite"):
        layer_map(torch.full((2, 2), math.nan))


@given(seed=st.integers(0, 999))
@settings(deadline=None, max_examples=20)
def test_renumbered_experts_are_found(seed: int) -> None:
    experts = normal(seed, 16, 30) * normal(1, 30).exp()
    order = normal(seed + 1, 16).argsort()
    pairs, searched = expert_pairs(experts[order], experts + 0.05 * normal(seed + 2, 16, 30), 6)
    assert searched == 256
    assert len(pairs) == 6
    assert all(int(order[pair.candidate]) == pair.reference for pair in pairs)
    assert [pair.distance for pair in pairs] == sorted(pair.distance for pair in pairs)


def test_many_experts_may_come_from_one() -> None:
    dense = normal(1, 1, 30)
    experts = torch.cat([dense + 0.1 * normal(i, 1, 30) for i in range(4)])
    pairs, searched = expert_pairs(experts, dense, 9)
    assert [pair.reference for pair in pairs] == [0, 0, 0, 0]
    assert searched == 4
    assert expert_pairs(dense, experts, 9)[0][0].candidate == 0


def test_expert_pair_errors_and_constant_features() -> None:
    assert expert_pairs(torch.zeros(0, 3), torch.zeros(2, 3), 4) == ([], 0)
    same, _ = expert_pairs(torch.ones(2, 3), torch.ones(2, 3), 4)
    assert [pair.distance for pair in same] == [0, 0]
    with pytest.raises(ValueError, match="features"):
        expert_pairs(torch.zeros(2, 3), torch.zeros(2, 4), 4)
    with pytest.raises(ValueError, match="not finite"):
        expert_pairs(torch.full((2, 3), math.inf), torch.zeros(2, 3), 4)


def alone(layer: int) -> set[int]:
    return {layer}


def test_neighbours_of_the_map_are_mismatched() -> None:
    mapped = [(i, i) for i in range(6)]
    pairs = mismatched_pairs(mapped, range(6), range(6), alone, alone, 16)
    assert len(pairs) == len(set(pairs)) == 16
    assert {abs(i - j) for i, j in pairs[:10]} == {1}
    assert {abs(i - j) for i, j in pairs[10:]} == {2}
    assert len(mismatched_pairs(mapped, range(6), range(6), alone, alone, 99)) == 30


def test_copies_of_partners_are_no_null() -> None:
    """Layers 2 and 3 of the candidate repeat 0 and 1: none of them may meet the layers that they were copied from."""
    mapped = list(enumerate([0, 1, 0, 1, 2, 3]))
    repeated = {0: {0, 2}, 2: {0, 2}, 1: {1, 3}, 3: {1, 3}}
    pairs = mismatched_pairs(mapped, range(6), range(4), lambda i: repeated.get(i, {i}), alone, 99)
    assert not {(0, 0), (2, 0), (1, 1), (3, 1)} & set(pairs)
    assert (0, 1) in pairs
    # The map missed the copy: still no null.
    missed = mismatched_pairs([(0, 0), (1, 1), (2, 5)], range(3), range(6), lambda i: repeated.get(i, {i}), alone, 99)
    assert (2, 0) not in missed
    assert (0, 5) not in missed
