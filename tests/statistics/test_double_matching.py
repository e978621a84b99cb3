from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm, poisson, spearmanr
from torch import Tensor

from checks.statistics.double_matching import (
    agreement_z,
    double_matching,
    nearest_agreement,
    pool,
    row_similarity,
    spearman,
    unit_rows,
)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def readings(seed: int, units: int = 96, noise: float = 0.0) -> tuple[Tensor, Tensor]:
    """Similarities of an MLP with a copy of it whose neurons are renumbered, by two readings."""
    order = normal(seed, units).argsort()
    both = []
    for view in (1, 2):
        rows = normal(seed + view, units, 32)
        both.append(row_similarity(rows, rows[order] + noise * normal(seed + 10 * view, units, 32)))
    return both[0], both[1]


@given(seed=st.integers(0, 999), noise=st.floats(0, 0.5))
@settings(deadline=None, max_examples=15)
def test_a_renumbered_copy_agrees(seed: int, noise: float) -> None:
    found = double_matching(*readings(seed, noise=noise))
    assert found.units == 96
    assert found.agreement > 0.95
    assert found.rho > 0.9
    assert found.z == pytest.approx(found.rho * math.sqrt(95))
    assert found.expected == 1


def test_unrelated_readings_agree_by_chance_only() -> None:
    found = [double_matching(normal(2 * i, 64, 64), normal(2 * i + 1, 64, 64), seed=i) for i in range(300)]
    counts = torch.tensor([float(one.agreements) for one in found])
    zs = torch.tensor([one.z for one in found])
    # Poisson(1) has a standard error of 1/sqrt(300) = .06
    assert abs(float(counts.mean()) - 1) < 0.25
    assert 0.7 < float(counts.var()) < 1.4
    assert abs(float(zs.mean())) < 0.25
    assert 0.85 < float(zs.std()) < 1.15


def test_agreement_shows_what_rho_does_not() -> None:
    """A tenth of the neurons inherited: the count is far above chance, the rank correlation is not."""
    rows = normal(1, 400, 48)
    rho = []
    for seed in range(5):
        first, second = (normal(10 * seed + view, 400, 48) for view in (1, 2))
        first[:40] = second[:40] = rows[:40]
        found = double_matching(row_similarity(rows, first), row_similarity(rows, second), seed=seed)
        assert found.agreements >= 40
        assert agreement_z(found.agreements, found.expected) > 14
        rho.append(found.z)
    assert max(rho) < 6


@given(seed=st.integers(0, 99), rows=st.integers(20, 60), columns=st.integers(20, 60))
@settings(deadline=None, max_examples=15)
def test_sides_may_change_places_and_differ(seed: int, rows: int, columns: int) -> None:
    first, second = normal(seed, rows, columns), normal(seed + 1, rows, columns)
    one, other = double_matching(first, second), double_matching(first.T, second.T)
    assert one.units == other.units == min(rows, columns)
    assert one.expected == pytest.approx(min(rows, columns) / max(rows, columns))
    if rows != columns:
        assert one == other


def test_free_signs() -> None:
    first, second = readings(1)
    flipped = second * normal(5, 96).sign()
    assert double_matching(first, flipped, second_has_sign=False).agreement == 1
    assert double_matching(first, flipped).agreement < 0.8
    assert double_matching(first * normal(6, 96).sign(), second, first_has_sign=False).agreement == 1


def test_ties_do_not_agree_by_position() -> None:
    same = torch.ones(200, 200)
    assert double_matching(same, same).agreements < 10


def test_too_few_neurons() -> None:
    for shape in ((0, 5), (1, 5), (5, 1)):
        found = double_matching(torch.zeros(shape), torch.zeros(shape))
        assert found.z is found.rho is None
        assert "cannot be matched" in found.reason
        assert found.agreement == 0
    with pytest.raises(ValueError, match="same"):
        double_matching(torch.zeros(3, 3), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="non-finite"):
        double_matching(torch.full((3, 3), math.nan), torch.zeros(3, 3))


def test_pooling() -> None:
    parts = [double_matching(*readings(seed, 40)) for seed in (1, 2)]
    whole = pool(parts)
    assert (whole.units, whole.agreements, whole.expected) == (80, 80, 2)
    assert whole.z == pytest.approx(sum(one.z for one in parts) / math.sqrt(2))
    assert whole.rho == pytest.approx(whole.z / math.sqrt(79))
    nothing = double_matching(torch.zeros(1, 5), torch.zeros(1, 5))
    assert pool([nothing, nothing]) == nothing
    assert pool([nothing, parts[0]]).units == 40
    with pytest.raises(ValueError, match="no matchings"):
        pool([])


@given(seed=st.integers(0, 999), count=st.integers(2, 50))
@settings(deadline=None, max_examples=30)
def test_spearman(seed: int, count: int) -> None:
    one, other = normal(seed, count), normal(seed + 1, count)
    assert spearman(one, other) == pytest.approx(spearmanr(one, other).statistic, abs=1e-12)
    assert spearman(one.exp(), other) == spearman(one, other)


def test_spearman_needs_two() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        spearman(torch.zeros(1), torch.zeros(1))


@given(expected=st.floats(0.1, 50), count=st.integers(0, 300))
@settings(deadline=None)
def test_score_is_just_below_that_of_the_poisson_tail(expected: float, count: int) -> None:
    z = agreement_z(count, expected)
    tail = poisson.sf(count - 1, expected)
    if 1e-300 < tail < 0.5:
        assert norm.isf(tail) - 0.45 < z < norm.isf(tail)
    assert agreement_z(count + 1, expected) > z or count == 0
    assert agreement_z(count, expected, 4.0) == pytest.approx(z / 2, abs=1e-9)


def test_score_errors() -> None:
    for bad in ((-1, 1.0, 1.0), (1, 0.0, 1.0), (1, 1.0, 0.5), (1, math.nan, 1.0)):
        with pytest.raises(ValueError, match="need counts"):
            agreement_z(*bad)


def test_similarity_is_a_correlation() -> None:
    a, b = normal(1, 7, 30), normal(2, 9, 30)
    expected = torch.corrcoef(torch.cat([a, b]))[:7, 7:]
    assert torch.allclose(row_similarity(a, b), expected, atol=1e-6)
    assert torch.allclose(row_similarity(5 * a + 3, b), expected, atol=1e-5)
    constant = row_similarity(torch.full((1, 30), 0.1), b)
    assert constant.abs().max() == 0
    assert unit_rows(torch.zeros(2, 3)).abs().max() == 0


def test_nearest_agreement() -> None:
    rows = [normal(seed, 200, 32) for seed in (1, 2)]
    near = [one @ (one + 0.1 * normal(9, 200, 32)).T for one in rows]
    assert nearest_agreement(*near) > 0.9
    assert nearest_agreement(near[0], -near[1]) > 0.9
    assert nearest_agreement(normal(3, 200, 200), normal(4, 200, 200)) < 0.05
    assert nearest_agreement(torch.zeros(0, 4), torch.zeros(0, 4)) == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
def test_a_row_that_is_not_finite_changes_no_other(value: float) -> None:
    rows = normal(1, 6, 4)
    rows[4] = 0
    expected = unit_rows(rows)
    rows[2, 1] = value
    found = unit_rows(rows)
    assert torch.equal(found[[0, 1, 3, 4, 5]], expected[[0, 1, 3, 4, 5]])
    assert bool(found[2].isnan().any()) == (value != 3e38)
    if value == 3e38:  # finite, but not its norm
        assert found[2].abs().max() == 0


@given(seed=st.integers(0, 999), dtype=st.sampled_from([torch.float32, torch.float64]))
def test_unit_rows_have_norm_one_or_are_zero(seed: int, dtype: torch.dtype) -> None:
    rows = normal(seed, 8, 5).to(dtype) * 10.0 ** torch.linspace(-6, 6, 8, dtype=dtype)[:, None]
    rows[0], rows[1] = 0, 1e-30
    found = unit_rows(rows)
    assert found.dtype == dtype
    assert found[:2].abs().max() == 0
    used = rows.norm(dim=1) > torch.finfo(dtype).eps * rows.norm(dim=1).max()
    assert torch.allclose(found.norm(dim=1), used.to(dtype), atol=1e-6)
    assert torch.allclose(found[used], torch.nn.functional.normalize(rows[used], dim=1), rtol=1e-6)
