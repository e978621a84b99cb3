from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from checks.statistics.assignment import best_assignment


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(rows=st.integers(1, 5), columns=st.integers(1, 5), seed=st.integers(0, 999), hub=st.booleans())
@settings(deadline=None, max_examples=60)
def test_no_assignment_is_better(rows: int, columns: int, seed: int, hub: bool) -> None:
    scores = normal(seed, rows, columns)
    if hub:
        scores[:, 0] += 5
    found = best_assignment(scores)
    short = min(rows, columns)
    assert len(found.rows) == len(found.columns) == short
    assert len(set(found.rows.tolist())) == len(set(found.columns.tolist())) == short
    assert found.rows.tolist() == sorted(found.rows.tolist())
    if rows <= columns:
        sums = [scores[range(rows), list(order)].sum() for order in itertools.permutations(range(columns), rows)]
    else:
        sums = [scores[list(order), range(columns)].sum() for order in itertools.permutations(range(rows), columns)]
    assert found.score == pytest.approx(float(max(sums)), abs=1e-12)
    assert found.score == pytest.approx(float(scores[found.rows, found.columns].sum()), abs=1e-12)


@given(seed=st.integers(0, 999), wide=st.booleans())
@settings(deadline=None, max_examples=20)
def test_renumbering_columns_renumbers_the_assignment(seed: int, wide: bool) -> None:
    scores = normal(seed, 12, 20 if wide else 9)
    order = normal(seed + 1, scores.shape[1]).argsort()
    plain, moved = best_assignment(scores), best_assignment(scores[:, order])
    assert torch.equal(plain.rows, moved.rows)
    assert torch.equal(plain.columns, order[moved.columns])
    assert best_assignment(3 * scores - 7).columns.tolist() == plain.columns.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_planted_permutation_is_found(dtype: torch.dtype) -> None:
    order = normal(1, 300).argsort()
    rows = torch.nn.functional.normalize(normal(2, 300, 64))
    noisy = rows[order] + 0.1 * normal(3, 300, 64)
    found = best_assignment((noisy @ rows.T).to(dtype))
    assert torch.equal(found.columns, order)


def test_nothing_to_assign() -> None:
    for shape in ((0, 0), (0, 4), (4, 0)):
        found = best_assignment(torch.zeros(*shape))
        assert found.rows.tolist() == found.columns.tolist() == []
        assert found.score == 0


def test_errors() -> None:
    for bad in (math.nan, math.inf, -math.inf):
        scores = normal(1, 3, 4)
        scores[1, 2] = bad
        with pytest.raises(ValueError, match="non-finite"):
            best_assignment(scores)
    with pytest.raises(ValueError, match="matrix"):
        best_assignment(torch.zeros(3))
    with pytest.raises(TypeError, match="floating point"):
        best_assignment(torch.zeros(3, 3, dtype=torch.int64))
