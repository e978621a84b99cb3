from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from checks.statistics.common_sequence import (
    LEVEL,
    bartels_p,
    common_sequences,
    may_repeat_a_sequence,
    repeats_a_smooth_sequence,
)

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def states(seed: int, rows: int = 128, count: int = 64, deviation: float = 0.1) -> Tensor:
    """A_log of a state-space model after training."""
    return torch.arange(1.0, count + 1, dtype=torch.float64).log() + deviation * normal(seed, rows, count)


def decays(seed: int, heads: int = 40, width: int = 64) -> Tensor:
    """RWKV's, from end to end of all heads."""
    ramp = torch.linspace(0, 1, heads * width, dtype=torch.float64).reshape(heads, width)
    return -6 + 5 * ramp**0.9 + 0.2 * normal(seed, heads, width)


def faded(seed: int, size: int = 64) -> Tensor:
    """The transition matrix of HiPPO-LegS, and a little noise."""
    number = torch.arange(size, dtype=torch.float64)
    below = (2 * number + 1).sqrt()[:, None] * (2 * number + 1).sqrt()
    return -(below.tril(-1) + torch.diag(number + 1)) + 0.5 * normal(seed, size, size)


def relative_positions(seed: int, heads: int = 32) -> Tensor:
    """Biases of 2 * 24 + 1 distances that every head learns in its own strength."""
    distance = (torch.arange(49, dtype=torch.float64) - 24).abs()
    return -distance[:, None] * (1 + 0.5 * normal(seed, heads)) / 8 + 0.3 * normal(seed + 1, 49, heads)


@pytest.mark.parametrize("family", [states, decays, faded, relative_positions])
@pytest.mark.parametrize("dtype", DTYPES)
def test_tables_that_a_rule_filled(family: object, dtype: torch.dtype) -> None:
    for seed in range(5):
        one, other = (family(10 * seed + side).to(dtype) for side in (0, 5))  # type: ignore[operator]
        # Alike, though nothing is shared but the rule.
        assert float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]).double())[0, 1]) > 0.3
        for table in (one, one.T, one.flip(0), one.flip(1), -3 * one + 1):
            assert repeats_a_smooth_sequence(table) is not None
            assert may_repeat_a_sequence(table[:20], len(table))


def mean_row(seed: int) -> Tensor:
    """A head or embedding whose rows share far more than they differ."""
    return 5 * normal(seed, 1, 256) + normal(seed + 1, 500, 256)


def outliers(seed: int) -> Tensor:
    """A few channels of every row are huge, neighbours among them."""
    row = normal(seed, 256)
    row[[0, 100, 101, 255]] = 50
    return row + normal(seed + 1, 500, 256)


def low_rank(seed: int) -> Tensor:
    return normal(seed, 300, 2).abs() @ normal(seed + 1, 2, 96) + 1e-3 * normal(seed + 2, 300, 96)


def low_variance(seed: int) -> Tensor:
    return 1 + 1e-3 * normal(seed, 300, 96)


def by_frequency(seed: int) -> Tensor:
    """An embedding whose tokens shrink with their number, and whose rare ones are all alike."""
    size = torch.linspace(2, 0.1, 800, dtype=torch.float64)[:, None]
    return size * normal(seed, 800, 128) + (2 - size) * normal(seed + 1, 1, 128)


def positions(seed: int) -> Tensor:
    """Learned, smooth along the positions in channels without order, some of them huge."""
    time = torch.linspace(0, 1, 512, dtype=torch.float64)[:, None]
    waves = torch.sin(2 * math.pi * (normal(seed, 128).abs() * time + normal(seed + 1, 128)))
    waves[:, 7] *= 30
    return waves + 0.05 * normal(seed + 2, 512, 128)


def walk(seed: int) -> Tensor:
    return normal(seed, 64, 64).cumsum(0)


def sorted_rows(seed: int) -> Tensor:
    """Neurons in the order of their size, as after pruning."""
    rows = normal(seed, 300, 96)
    return rows * torch.linspace(3, 0.1, 300, dtype=torch.float64)[:, None]


def doubled(seed: int) -> Tensor:
    """Every channel twice, side by side, with a large mean row."""
    return mean_row(seed).repeat_interleave(2, 1)


WEIGHTS = [mean_row, outliers, low_rank, low_variance, by_frequency, positions, walk, sorted_rows, doubled]


@pytest.mark.parametrize("family", WEIGHTS)
def test_weights_keep_deciding(family: object) -> None:
    for seed in range(20):
        table = family(1000 * seed)  # type: ignore[operator]
        assert repeats_a_smooth_sequence(table) is None
        assert repeats_a_smooth_sequence(table.T.bfloat16()) is None


@given(
    rows=st.integers(1, 80), columns=st.integers(1, 80), seed=st.integers(0, 10**6), mean=st.sampled_from([0.0, 3.0])
)
@settings(deadline=None, max_examples=60)
def test_random_matrices_never_do(rows: int, columns: int, seed: int, mean: float) -> None:
    table = normal(seed, rows, columns) + mean * normal(seed + 1, columns)
    assert repeats_a_smooth_sequence(table) is None


@given(seed=st.integers(0, 999), factor=st.floats(1e-3, 1e3), shift=st.floats(-10, 10))
@settings(deadline=None, max_examples=20)
def test_shares_steps_and_order_do_not_depend_on_scale_shift_and_order_of_the_lines(
    seed: int, factor: float, shift: float
) -> None:
    table = states(seed, deviation=0.5)
    order = normal(seed, len(table)).argsort()
    for changed in (factor * table + shift, -table, table[order], table.flip(1), table.float()):
        (plain, _), (one, _) = common_sequences(table), common_sequences(changed)
        assert (one.axis, one.length) == (plain.axis, plain.length) == (1, 64)
        assert one.share == pytest.approx(plain.share, rel=1e-5)
        assert one.steps == pytest.approx(plain.steps, rel=1e-4)
        assert one.p == pytest.approx(plain.p, rel=1e-6)
    assert common_sequences(table.T)[1].share == pytest.approx(plain.share, rel=1e-9)


@given(seed=st.integers(0, 999), rows=st.integers(8, 40), columns=st.integers(32, 60))
@settings(deadline=None, max_examples=20)
def test_the_share_is_that_of_the_variance_between_the_lines(seed: int, rows: int, columns: int) -> None:
    table = normal(seed, rows, columns) + normal(seed + 1, columns) + 100
    found = common_sequences(table)[0]
    total = float((table - table.mean()).square().sum())
    within = float((table - table.mean(0)).square().sum())
    assert found.share == pytest.approx(1 - within / total, rel=1e-6)


@pytest.mark.parametrize("count", [7, 8])
def test_the_variance_of_the_ratio_is_exact(count: int) -> None:
    """Over all orders of the ranks, against the beta distribution's: 4²/(4(2q + 1))."""
    orders = torch.tensor(list(itertools.permutations(range(count))), dtype=torch.float64)
    ratios = orders.diff(dim=1).square().sum(1) / (orders[0] - orders[0].mean()).square().sum()
    n = count
    q = 5 * n * (n + 1) * (n - 1) ** 2 / (2 * (n - 2) * (5 * n * n - 2 * n - 9)) - 0.5
    assert float(ratios.mean()) == pytest.approx(2)
    assert float(ratios.var(correction=0)) == pytest.approx(16 / (4 * (2 * q + 1)))


@pytest.mark.parametrize("count", [32, 100])
def test_p_is_that_of_random_orders(count: int) -> None:
    orders = torch.rand(100_000, count, generator=torch.Generator().manual_seed(0)).argsort(1).double()
    ratios = orders.diff(dim=1).square().sum(1) / (orders[0] - orders[0].mean()).square().sum()
    for level in (0.5, 0.05, 0.01, 0.001):
        at = float(ratios.sort().values[round(level * len(ratios))])
        # The approximation errs most at the end of the tail.
        assert bartels_p(at, count) == pytest.approx(level, rel=0.15 if level > 0.005 else 0.35)


def test_p_of_extremes() -> None:
    assert bartels_p(0.0, 32) == 0
    assert bartels_p(2.0, 32) == pytest.approx(0.5)
    assert bartels_p(4.0, 32) == 1
    ramp = torch.arange(32.0)
    ratio = float(ramp.diff().square().sum() / (ramp - ramp.mean()).square().sum())
    assert bartels_p(ratio, 32) < LEVEL
    with pytest.raises(ValueError, match="need 10"):
        bartels_p(1.0, 9)


def test_ties_are_no_order() -> None:
    """Mostly zeros, and a few neighbours that are not."""
    table = torch.zeros(64, 256, dtype=torch.float64)
    table[:, 100:110] = 7
    table += 1e-9 * torch.zeros_like(table)
    assert [one.p for one in common_sequences(table)] == [1.0, 1.0]
    assert repeats_a_smooth_sequence(table) is None


def test_no_answer() -> None:
    table = states(1)
    for bad in (
        torch.ones(64, 64),
        torch.zeros(64, 64),
        states(1)[:7],
        states(1)[:, :31][:31],
        states(1).round().int(),
    ):
        assert repeats_a_smooth_sequence(bad) is None
    for value in (math.nan, math.inf):
        broken = table.clone()
        broken[3, 3] = value
        assert common_sequences(broken) == []
        assert repeats_a_smooth_sequence(broken) is None
    assert not may_repeat_a_sequence(table[:1], 128)
    assert not may_repeat_a_sequence(table[:5], 5)
    assert may_repeat_a_sequence(table[:5], 128)
    assert common_sequences(torch.zeros(0, 64)) == common_sequences(torch.zeros(64, 0)) == []
    with pytest.raises(ValueError, match="two axes"):
        common_sequences(table[0])


@pytest.mark.parametrize("shape", [(8, 4096), (64, 1024), (1024, 64), (2048, 32)])
def test_the_beginning_of_weights_clears_nearly_all(shape: tuple[int, int]) -> None:
    heads = [normal(seed, *shape) + normal(seed + 1, shape[1]) for seed in range(0, 400, 2)]
    assert sum(may_repeat_a_sequence(head, 4096) for head in heads) <= 1
