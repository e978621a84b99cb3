from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from checks.statistics.elementwise import ElementwiseSums, elementwise_sums
from checks.statistics.sampling import (
    CONFIDENCE,
    LEAST_DRAWN,
    BlockDesign,
    CosineEstimate,
    Doubles,
    combine,
    estimate_cosine,
    linearised,
)

Population = tuple[Doubles, Doubles]


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def read(a: Tensor, b: Tensor, design: BlockDesign) -> CosineEstimate:
    """The estimate from two flat tensors."""
    return estimate_cosine(design, [elementwise_sums(a[start:stop], b[start:stop]) for start, stop in design.ranges()])


# Which blocks are read


@given(elements=st.integers(1, 5000), block=st.integers(1, 600), share=st.floats(0, 1), seed=st.integers(0, 2**64))
@settings(deadline=None, max_examples=100)
def test_first_and_last_block_are_always_read(elements: int, block: int, share: float, seed: int) -> None:
    blocks = -(-elements // block)
    design = BlockDesign(elements, block, int(share * max(0, blocks - 2)), seed)
    ranges = design.ranges()
    assert ranges == BlockDesign(elements, block, design.drawn, seed).ranges()
    assert ranges[0] == (0, min(block, elements))
    assert ranges[-1][1] == elements
    assert all(stop <= start for (_, stop), (start, _) in pairwise(ranges))
    assert all(start % block == 0 and 0 < stop - start <= block for start, stop in ranges)
    assert sum(stop - start for start, stop in ranges) == design.elements_read
    assert len(ranges) == min(blocks, 2) + design.drawn


def test_every_block_is_drawn_equally_often() -> None:
    counts = np.zeros(40)
    for seed in range(2000):
        for start, _ in BlockDesign(400, 10, 8, seed).ranges():
            counts[start // 10] += 1
    assert counts[0] == counts[-1] == 2000
    expected = 2000 * 8 / 38
    assert stats.chi2.sf(float(((counts[1:-1] - expected) ** 2 / expected).sum()), 37) > 1e-4


@pytest.mark.parametrize(
    "sizes", [(0, 1, 0), (10, 0, 0), (10, 1, 9), (10, 1, -1)], ids=["empty", "no block", "too many", "negative"]
)
def test_impossible_designs(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="cannot be drawn"):
        BlockDesign(*sizes, seed=0)


@given(between=st.integers(0, 300), share=st.floats(0, 1))
@settings(deadline=None, max_examples=100)
def test_unseen_blocks_follow_the_hypergeometric_distribution(between: int, share: float) -> None:
    drawn = int(share * between)
    unseen = BlockDesign(between + 2, 1, drawn, 0).unseen_blocks()
    assert unseen == 0 or stats.hypergeom.pmf(0, between, unseen, drawn) > 1 - CONFIDENCE - 1e-9
    assert stats.hypergeom.pmf(0, between, unseen + 1, drawn) <= 1 - CONFIDENCE + 1e-9 or unseen == between - drawn


def test_unseen_blocks_are_missed_as_often_as_stated() -> None:
    design = BlockDesign(400, 1, 40, 0)
    unseen = design.unseen_blocks()
    assert unseen == 27
    rng = np.random.default_rng(0)
    missed = {unseen: 0, unseen + 5: 0}
    for seed in range(1000):
        hit = {start for start, _ in replace(design, seed=seed).ranges()}
        for changed in missed:
            missed[changed] += not hit & set((1 + rng.choice(398, changed, replace=False)).tolist())
    assert 35 < missed[unseen] < 75
    assert missed[unseen + 5] < 50


# Estimates


@given(seed=st.integers(0, 999), block=st.integers(1, 40), scale=st.floats(1e-3, 1e3), offset=st.floats(-5, 5))
@settings(deadline=None, max_examples=50)
def test_all_blocks_give_the_exact_cosine(seed: int, block: int, scale: float, offset: float) -> None:
    a = normal(seed, 150).double()
    b = scale * (a + normal(seed + 1, 150)) + offset
    blocks = -(-150 // block)
    estimate = read(a, b, BlockDesign(150, block, max(0, blocks - 2), seed))
    exact = np.corrcoef(a, b)[0, 1]
    assert estimate.is_complete
    assert estimate.cosine == pytest.approx(exact, abs=1e-9)
    assert estimate.interval == (estimate.cosine, estimate.cosine)
    assert estimate.unseen_share == 0
    assert not estimate.drawn_equal


@given(seed=st.integers(0, 999), factor=st.floats(1e-3, 1e3), offset=st.floats(-3, 3))
@settings(deadline=None, max_examples=30)
def test_estimates_ignore_scale_and_mean(seed: int, factor: float, offset: float) -> None:
    a = normal(seed, 4000).double()
    b = a + 0.5 * normal(seed + 1, 4000)
    design = BlockDesign(4000, 40, 20, seed)
    one, other, turned = read(a, b, design), read(factor * a + offset, b, design), read(b, a, design)
    assert one.cosine is not None
    assert one.interval is not None
    assert one.interval[0] < one.cosine < one.interval[1]
    for same in (other, turned):
        assert same.cosine == pytest.approx(one.cosine, abs=1e-9)
        assert same.interval == pytest.approx(one.interval, abs=1e-6)
    negative = read(a, -b, design)
    assert negative.cosine == pytest.approx(-one.cosine, abs=1e-12)
    assert negative.interval == pytest.approx((-one.interval[1], -one.interval[0]), abs=1e-9)


def test_variance_agrees_with_the_jackknife() -> None:
    a = normal(0, 50_000).double()
    b = a + normal(1, 50_000)
    design = BlockDesign(50_000, 100, 60, 4)
    blocks = [elementwise_sums(a[start:stop], b[start:stop]) for start, stop in design.ranges()]
    rows = np.array([[x.n, x.sum_a, x.sum_b, x.centred_dot, x.centred_square_a, x.centred_square_b] for x in blocks])
    without = [
        float(linearised(np.delete(rows, index, 0)[None], replace(design, drawn=59))[0][0]) for index in range(1, 61)
    ]
    finite = 1 - 60 / 498
    jackknife = finite * 59 / 60 * float(((np.array(without) - np.mean(without)) ** 2).sum())
    assert estimate_cosine(design, blocks).variance == pytest.approx(jackknife, rel=0.03)


def test_mean_of_a_layer_is_weighted_and_pools_the_errors() -> None:
    designs = [BlockDesign(9000, 100, 20, 1), BlockDesign(3000, 100, 10, 2), BlockDesign(50, 100, 0, 3)]
    parts = []
    for seed, design in enumerate(designs):
        a = normal(seed, design.elements)
        parts.append((read(a, a + normal(seed + 9, design.elements), design), design.elements))
    layer = combine(parts)
    weights = [size / 12050 for _, size in parts]
    assert layer.cosine == pytest.approx(
        sum(weight * (part.cosine or 0) for weight, (part, _) in zip(weights, parts, strict=True))
    )
    assert layer.variance == pytest.approx(
        sum(weight**2 * part.variance for weight, (part, _) in zip(weights, parts, strict=True))
    )
    assert max(part.freedom for part, _ in parts) < layer.freedom < 28
    assert layer.blocks == 90 + 30 + 1
    assert layer.drawn == 30
    assert layer.interval is not None
    assert layer.interval[0] < (layer.cosine or 0) < layer.interval[1]
    largest = max(part.unseen_elements for part, _ in parts)
    assert largest <= layer.unseen_elements < 1.5 * largest
    assert layer.unseen_share == layer.unseen_elements / 12050
    # A single part is itself, and nesting changes nothing.
    assert combine([(parts[0][0], 3)]).interval == pytest.approx(parts[0][0].interval)
    nested = combine([(combine(parts[:2]), 12000), parts[2]])
    assert nested.interval == pytest.approx(layer.interval)


# No interval


def test_equal_blocks_give_no_interval_and_no_equality() -> None:
    a = normal(0, 10_000)
    b = a.clone()
    b[:100] += 1  # the first block, which is read in any case
    design = BlockDesign(10_000, 100, 30, 0)
    for other in (a, b):
        estimate = read(a, other, design)
        assert estimate.drawn_equal
        assert estimate.interval is None
        assert "how much the others differ" in (estimate.no_interval or "")
        assert 0 < estimate.unseen_share < 0.1
    assert combine([(read(a, a, design), 1), (read(a, b, design), 1)]).interval is None
    changed = read(a, a + 0.1 * normal(1, 10_000), design)
    assert combine([(read(a, a, design), 1), (changed, 1)]).interval is not None


@pytest.mark.parametrize("drawn", [0, 1, LEAST_DRAWN - 1])
def test_few_blocks_give_no_interval(drawn: int) -> None:
    a = normal(0, 10_000)
    estimate = read(a, a + normal(1, 10_000), BlockDesign(10_000, 100, drawn, 0))
    assert estimate.interval is None
    assert f"{drawn} random blocks" in (estimate.no_interval or "")
    assert estimate.cosine == pytest.approx(0.7, abs=0.15)
    if drawn < 2:  # one tensor's error is unknown, and so is the mean's
        known = read(a, a + normal(1, 10_000), BlockDesign(10_000, 100, 20, 0))
        assert combine([(estimate, 1), (known, 1)]).interval is None
        assert combine([(estimate, 0), (known, 1)]).interval == pytest.approx(known.interval)


def test_constant_and_nonfinite_tensors() -> None:
    a = normal(0, 10_000)
    design = BlockDesign(10_000, 100, 30, 0)
    constant = read(a, torch.full_like(a, 0.5), design)
    assert constant.cosine is None
    assert constant.interval is None
    assert "constant" in (constant.no_interval or "")
    assert combine([(constant, 1)]).cosine is None
    assert combine([]).cosine is None
    assert combine([]).interval is None
    known = read(a, a + normal(1, 10_000), design)
    assert combine([(constant, 5), (known, 1)]).cosine == known.cosine
    broken = a.clone()
    broken[design.ranges()[3][0] : design.ranges()[4][1]] = math.nan
    assert read(broken, a + normal(1, 10_000), design).cosine == pytest.approx(0.7, abs=0.1)
    assert read(torch.full_like(a, math.nan), a, design).cosine is None


def test_wrong_numbers_of_blocks_and_weights() -> None:
    with pytest.raises(ValueError, match="expected 32"):
        estimate_cosine(BlockDesign(10_000, 100, 30, 0), [ElementwiseSums()] * 31)
    known = read(normal(0, 100), normal(1, 100), BlockDesign(100, 100, 0, 0))
    with pytest.raises(ValueError, match="negative"):
        combine([(known, -1)])


def test_a_reuse_confined_to_blocks_shows_in_the_strongest_block() -> None:
    a, b = normal(0, 600_000), normal(1, 600_000)
    design = BlockDesign(600_000, 3000, 40, 0)
    assert (read(a, b, design).strongest_block or 1) < 0.1
    start, stop = design.ranges()[5]
    b[start:stop] = a[start:stop]
    copied = read(a, b, design)
    assert copied.strongest_block == pytest.approx(1)
    assert (copied.cosine or 1) < 0.1
    assert combine([(copied, 1), (read(a, normal(3, 600_000), design), 1)]).strongest_block == pytest.approx(1)
    assert read(a[:3000], b[:3000], BlockDesign(3000, 100, 28, 0)).strongest_block is None


# Coverage


def rows_of(rng: np.random.Generator, blocks: int) -> Doubles:
    """Blocks of 4 rows of 32 elements."""
    return rng.standard_normal((blocks, 4, 32))


def diffuse(rng: np.random.Generator, blocks: int) -> Population:
    a = rows_of(rng, blocks)
    return a, a + 0.1 * rows_of(rng, blocks)


def independent(rng: np.random.Generator, blocks: int) -> Population:
    return rows_of(rng, blocks), rows_of(rng, blocks)


def log_normal(sigma: float) -> Callable[[np.random.Generator, int], Population]:
    def make(rng: np.random.Generator, blocks: int) -> Population:
        a = rows_of(rng, blocks)
        return a, a + 0.02 * np.exp(sigma * rng.standard_normal((blocks, 4, 1))) * rows_of(rng, blocks)

    return make


def scaled_rows(rng: np.random.Generator, blocks: int) -> Population:
    scale = np.exp(rng.standard_normal((blocks, 4, 1)))
    a = scale * rows_of(rng, blocks)
    return a, a + 0.3 * scale * rows_of(rng, blocks)


def confined(share: float) -> Callable[[np.random.Generator, int], Population]:
    def make(rng: np.random.Generator, blocks: int) -> Population:
        a = rows_of(rng, blocks)
        b = a.copy()
        hit = 1 + rng.permutation(blocks - 2)[: max(1, round(share * blocks))]
        b[hit] += 0.5 * rows_of(rng, len(hit))
        return a, b

    return make


def block_table(a: Doubles, b: Doubles) -> Doubles:
    """What `linearised` needs of every block, [blocks, 6]; `a`, `b`: [blocks, elements]."""
    centred_a, centred_b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    return np.stack(
        [
            np.full(len(a), float(a.shape[1])),
            a.sum(1),
            b.sum(1),
            (centred_a * centred_b).sum(1),
            (centred_a**2).sum(1),
            (centred_b**2).sum(1),
        ],
        1,
    )


def estimates(a: Doubles, b: Doubles, drawn: int, draws: int, rng: np.random.Generator) -> list[CosineEstimate]:
    """Estimates from several samples of one population of blocks."""
    blocks = len(a)
    chosen = 1 + np.argpartition(rng.random((draws, blocks - 2)), drawn - 1, axis=1)[:, :drawn]
    chosen = np.pad(chosen, ((0, 0), (1, 1)), constant_values=((0, 0), (0, blocks - 1)))
    cosines, moments = linearised(block_table(a, b)[chosen], BlockDesign(blocks, 1, drawn, 0))
    differs = ((a - b) ** 2).sum(1) > 0
    return [
        CosineEstimate(
            cosine=float(cosines[draw]),
            variance=float(moments[0][draw]),
            third=float(moments[1][draw]),
            freedom=float(moments[2][draw]),
            blocks=blocks,
            blocks_read=drawn + 2,
            drawn=drawn,
            elements=blocks,
            elements_read=drawn + 2,
            drawn_equal=not differs[chosen[draw, 1:-1]].any(),
            drawn_share=drawn / (blocks - 2),
            block=1,
            unseen_elements=0,
            strongest_block=None,
        )
        for draw in range(draws)
    ]


def holds(estimate: CosineEstimate, truth: float) -> bool:
    interval = estimate.interval
    return interval is not None and interval[0] <= truth <= interval[1]


def measure(make: Callable[[np.random.Generator, int], Population], blocks: int, share: float) -> tuple[float, float]:
    """Which share of 2000 intervals (50 draws from each of 40 populations) holds the truth, which share is refused?"""
    rng = np.random.default_rng(20_240_229)
    held = refused = 0
    for _ in range(40):
        a, b = (side.reshape(blocks, -1) for side in make(rng, blocks))
        truth = float(np.corrcoef(a.ravel(), b.ravel())[0, 1])
        found = estimates(a, b, round(share * blocks) - 2, 50, rng)
        held += sum(holds(estimate, truth) for estimate in found)
        refused += sum(estimate.interval is None for estimate in found)
    return held / 2000, refused / 2000


@pytest.mark.parametrize(("make", "lowest"), [(diffuse, 0.94), (independent, 0.94), (log_normal(1.0), 0.86)])
def test_coverage_of_a_layer_of_tensors_with_two_random_blocks(
    make: Callable[[np.random.Generator, int], Population], lowest: float
) -> None:
    rng = np.random.default_rng(7)
    held = 0
    for _ in range(20):
        tensors = [tuple(side.reshape(128, -1) for side in make(rng, 128)) for _ in range(16)]
        truth = float(np.mean([np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in tensors]))
        samples = [estimates(a, b, 2, 25, rng) for a, b in tensors]
        held += sum(holds(combine((part, 1.0) for part in parts), truth) for parts in zip(*samples, strict=True))
    assert lowest <= held / 500 <= 0.995


@pytest.mark.parametrize(
    ("make", "blocks", "share", "lowest", "highest"),
    [
        (diffuse, 128, 0.0625, 0.94, 0.99),
        (diffuse, 448, 0.07, 0.94, 0.98),
        (diffuse, 1000, 0.2, 0.93, 0.97),
        (independent, 448, 0.07, 0.94, 0.98),
        (log_normal(1.0), 128, 0.1, 0.86, 0.95),
        (log_normal(1.0), 1000, 0.1, 0.93, 0.99),
        (log_normal(1.5), 128, 0.1, 0.75, 0.87),
        (log_normal(1.5), 1000, 0.1, 0.87, 0.96),
        (scaled_rows, 128, 0.1, 0.81, 0.92),
        (scaled_rows, 1000, 0.1, 0.92, 0.98),
        (confined(0.1), 1000, 0.1, 0.94, 0.995),
    ],
    ids=[
        "diffuse, 6 random blocks",
        "diffuse, 29",
        "diffuse, 198",
        "independent, 29",
        "rows log-normal 1, 11",
        "rows log-normal 1, 98",
        "rows log-normal 1.5, 11",
        "rows log-normal 1.5, 98",
        "rows of both sides log-normal, 11",
        "rows of both sides log-normal, 98",
        "a tenth of the blocks, 98",
    ],
)
def test_coverage(
    make: Callable[[np.random.Generator, int], Population], blocks: int, share: float, lowest: float, highest: float
) -> None:
    covered, refused = measure(make, blocks, share)
    assert lowest <= covered <= highest
    assert refused < 0.01


@pytest.mark.parametrize("share", [0.1, 0.2])
def test_a_change_confined_to_one_block_is_covered_no_more_often_than_it_is_drawn(share: float) -> None:
    covered, refused = measure(confined(0.0), 500, share)
    assert covered <= share + 0.03
    assert refused == pytest.approx(1 - share, abs=0.03)
