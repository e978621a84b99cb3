from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from checks.statistics.moments import compare_moments, row_moments


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(seed=st.integers(0, 999), n=st.integers(1, 40), d=st.integers(1, 9))
@settings(deadline=None, max_examples=20)
def test_moments_agree_with_their_definition(seed: int, n: int, d: int) -> None:
    rows = normal(seed, n, d) + 0.3
    norms = [math.sqrt(math.fsum(x * x for x in row)) for row in rows.tolist()]
    mean = math.fsum(norms) / n
    found = row_moments(torch.cat([rows, torch.zeros(3, d)]))
    assert (found.rows, found.zero_rows) == (n, 3)
    assert found.mean_norm == pytest.approx(mean)
    assert found.sd_norm == pytest.approx(math.sqrt(math.fsum((x - mean) ** 2 for x in norms) / n), abs=1e-12)
    values = rows.flatten().tolist()
    centre = math.fsum(values) / len(values)
    assert found.variance == pytest.approx(math.fsum((x - centre) ** 2 for x in values) / len(values), abs=1e-12)


def test_comparison() -> None:
    a, frequency = normal(1, 500, 16), torch.linspace(0.5, 2, 500)[:, None]
    scaled = compare_moments(a, 2 * a, paired=True)
    assert scaled.norm_difference == pytest.approx(2 / 3)
    assert scaled.variance_difference == pytest.approx(6 / 5)
    assert scaled.norm_correlation == pytest.approx(1)
    assert scaled.pairs == 500
    # Independent tables whose row lengths follow the frequency of the tokens agree in all of it.
    apart = compare_moments(a * frequency, normal(2, 500, 24) * frequency, paired=True)
    assert apart.norm_correlation > 0.8
    assert compare_moments(a, normal(3, 500, 16), paired=True).norm_correlation == pytest.approx(0, abs=0.2)
    assert compare_moments(a, a[:7]).norm_correlation is None


def test_undefined_and_errors() -> None:
    empty = compare_moments(torch.zeros(3, 2), torch.zeros(3, 2), paired=True)
    assert empty.a.mean_norm is empty.norm_difference is empty.norm_correlation is None
    assert compare_moments(torch.ones(9, 2), normal(1, 9, 2), paired=True).norm_correlation is None
    with pytest.raises(ValueError, match="cannot be paired"):
        compare_moments(normal(1, 4, 2), normal(1, 5, 2), paired=True)
    with pytest.raises(ValueError, match="non-finite"):
        row_moments(torch.tensor([[1.0, math.nan]]))
    with pytest.raises(ValueError, match="need \\[rows"):
        row_moments(normal(1, 4))
    with pytest.raises(TypeError, match="dequantise"):
        row_moments(torch.ones(2, 2, dtype=torch.int32))
