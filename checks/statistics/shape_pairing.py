"""Tensors of two models paired by shape and content, whatever their names, and tested on elements not used to pair."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from checks.statistics.assignment import best_assignment
from checks.statistics.units import two_sided_log_p, unit_permutation_test

# Elements by which tensors are paired, at most; rows and columns of the block that is tested, at most.
PAIRING_POSITIONS = 4096
BLOCK = 128
# Positions beyond the first two axes (kernels, fused experts) that are read, at most.
_TRAILING = 16
# An axis shorter than this is not split, and tells nothing by itself.
_SHORTEST_AXIS = 16
# Groups of equal shape beyond this size are paired by mutual best similarity: assignment is cubic.
LARGEST_ASSIGNMENT = 2048


@dataclass(frozen=True, eq=False)
class ShapeSample:
    """Result of `shape_sample`: what is kept of one tensor after one read.

    `shape`: size-1 axes left out, the shorter axis of a matrix first. `elements`. `pairing`: centred elements of norm
    1. `block`: other elements, [rows, columns, trailing], float32. `turned`: the same of the transpose of a square
    matrix. `reason`: why it cannot be paired, else None.
    """

    shape: tuple[int, ...]
    elements: int
    pairing: Tensor | None = None
    block: Tensor | None = None
    turned: tuple[Tensor, Tensor] | None = None
    reason: str | None = None


@dataclass(frozen=True)
class ShapePair:
    """Two tensors of equal shape, as numbered in both lists.

    `similarity`: centred cosine of the elements used to pair, inflated by the search. `z_rows`, `z_columns`: exact
    tests over the order of either axis on other elements; None for a short axis. `z`: the one of smaller size, 0 if
    they contradict each other, None if there is none, and of a matrix that has not both. `effect`: smaller mean centred
    cosine of rows or of columns, as z. `log_p`: ln of its two-sided p, uncorrected. `elements`: of the tensor.
    `turned`: the reference's is transposed.
    """

    index: int
    other: int
    similarity: float
    z_rows: float | None
    z_columns: float | None
    z: float | None
    effect: float | None
    log_p: float | None
    elements: int
    turned: bool = False


@dataclass(frozen=True)
class ShapePairing:
    """Result of `pair_by_shape`.

    `pairs`: in the order of the candidate's tensors. `unpaired`: numbers of the candidate's usable tensors without a
    partner. `searched`: combinations that the assignment chose from (no correction needs them).
    """

    pairs: tuple[ShapePair, ...]
    unpaired: tuple[int, ...]
    searched: int
    seed: int

    @property
    def tests(self) -> int:
        """Pairs with a z: a correction counts each of them once."""
        return sum(pair.z is not None for pair in self.pairs)

    @property
    def strongest(self) -> ShapePair | None:
        """The pair with the largest |z|."""
        return max((pair for pair in self.pairs if pair.z is not None), key=lambda pair: abs(pair.z or 0), default=None)

    @property
    def log_p(self) -> float | None:
        """ln p of the strongest pair, corrected for all pairs tested (Bonferroni)."""
        strongest = self.strongest
        if strongest is None or strongest.log_p is None:
            return None
        return min(0.0, strongest.log_p + math.log(self.tests))

    def share(self, log_alpha: float, minimum_effect: float) -> float:
        """Share of the paired elements in pairs whose corrected ln p and |effect| reach both bounds, 0 to 1."""
        total = sum(pair.elements for pair in self.pairs)
        found = sum(
            pair.elements
            for pair in self.pairs
            if pair.log_p is not None
            and pair.log_p + math.log(self.tests) <= log_alpha
            and abs(pair.effect or 0.0) >= minimum_effect
        )
        return found / total if total else 0.0


def shape_sample(tensor: Tensor, seed: int = 0) -> ShapeSample:
    """What pairing and test need of a tensor of any shape, from one read; tensors of equal shape give equal positions.

    Axes of size 1 are dropped; a matrix is turned so that its shorter axis comes first (exporters differ in that). The
    positions of the first axis are split at random in two halves, and those of the second: one half of each gives the
    elements that pair tensors, the other halves the block that is tested, so that they share no row and no column. An
    axis of fewer than 16 is not split; a vector is split by position. Constant or non-finite samples have a reason.
    Raises TypeError for other than floating-point tensors.
    """
    if not tensor.dtype.is_floating_point or tensor.dtype == torch.float4_e2m1fn_x2:
        raise TypeError(f"{tensor.dtype} is not compared; dequantise first")
    flat = tensor.detach().reshape(-1)
    return shape_sample_of(flat[shape_positions(tensor.shape, seed).to(flat.device)].cpu(), tensor.shape, seed)


def shape_positions(shape: Sequence[int], seed: int = 0) -> Tensor:
    """The elements of a tensor of that shape that `shape_sample` looks at, in the order in which it does: positions in
    stored order, int64. None of a tensor that is too short.
    """
    parts = _parts(tuple(shape), seed)
    return torch.cat([part.reshape(-1) for part in parts]) if parts else torch.empty(0, dtype=torch.int64)


def shape_sample_of(values: Tensor, shape: Sequence[int], seed: int = 0) -> ShapeSample:
    """`shape_sample` of a tensor of that shape, from the elements at its `shape_positions`: floats on the CPU."""
    plain, elements, parts = _plain_shape(tuple(shape)), math.prod(shape), _parts(tuple(shape), seed)
    if not parts:
        return ShapeSample(plain, elements, reason=f"{elements} elements; need {4 * _SHORTEST_AXIS}")
    split = torch.split(values.double(), [part.numel() for part in parts])
    pairing, block, *turned = (one.reshape(part.shape) for one, part in zip(split, parts, strict=True))
    found = _sampled(pairing, block)
    if found is None:
        return ShapeSample(plain, elements, reason="constant or non-finite")
    return ShapeSample(plain, elements, *found, _sampled(*turned) if turned else None)


@lru_cache(maxsize=16)
def _parts(shape: tuple[int, ...], seed: int) -> tuple[Tensor, ...]:
    """Positions of the elements to pair by and of the block; of a square matrix also both of its transpose."""
    plain, elements = _plain_shape(shape), math.prod(shape)
    if elements < 4 * _SHORTEST_AXIS:
        return ()
    trailing = math.prod(plain[2:])
    strides = elements // plain[0], trailing
    if len(plain) == 2 and plain != tuple(size for size in shape if size != 1):
        strides = 1, plain[0]
    is_square = len(plain) == 2 and plain[0] == plain[1]
    return (*_halves(plain, strides, seed), *(_halves(plain, strides[::-1], seed) if is_square else ()))


def pair_by_shape(candidate: Sequence[ShapeSample], reference: Sequence[ShapeSample], seed: int = 0) -> ShapePairing:
    """Which tensors of two models belong together, and do they share values?

    Within each shape, candidate and reference tensors are paired by the assignment of largest total similarity (mutual
    best partners in groups beyond 2048). Then every pair is tested on elements in other rows and columns:

        z_rows: `unit_permutation_test` with the rows as units; z_columns: with the columns as units
        z = the smaller of both in size

    Null hypothesis: independent training, under which the order of at least one axis is exchangeable (hidden units,
    residual channels, experts; vocabulary rows and rotary rows are not, but their columns are). Which one it is need
    not be known, since both must speak for dependence (an intersection-union test, Berger 1982, Technometrics 24). The
    tested rows and columns took no part in the pairing, so the search over partners needs no correction; count `tests`
    pairs. A matrix with an axis of fewer than 16 has one test, and its longer axis may number positions or buckets
    (tables of relative positions, [169, 12]): without the other test it decides nothing. Kernels whose first axes allow
    one test keep it, since their trailing positions make up the rows. Vectors have one axis, whose index may have a
    meaning of its own (frequencies, positions): their pairs are shown with similarity alone and decide nothing. z of
    several tensors of one model are not independent (hidden units and channels are shared), so they are not added up.
    Blind to permuted or rotated units and to tensors that were split or fused. Effect 1 gives |z| up to 127.
    """
    groups: dict[tuple[int, ...], tuple[list[int], list[int]]] = {}
    for side, samples in enumerate((candidate, reference)):
        for number, sample in enumerate(samples):
            if sample.pairing is not None:
                groups.setdefault(sample.shape, ([], []))[side].append(number)
    pairs, searched = [], 0
    for ours, theirs in groups.values():
        if not ours or not theirs:
            continue
        plain, turned = _similarities([candidate[i] for i in ours], [reference[j] for j in theirs])
        searched += plain.numel() * (1 if turned is None else 2)
        best = plain if turned is None else torch.maximum(plain, turned)
        for i, j in _assigned(best):
            use_turned = turned is not None and bool(turned[i, j] > plain[i, j])
            a, b = candidate[ours[i]], reference[theirs[j]]
            pairs.append(_tested(ours[i], theirs[j], a, b, float(best[i, j]), use_turned))
    pairs.sort(key=lambda pair: pair.index)
    found = {pair.index for pair in pairs}
    unpaired = tuple(i for i, one in enumerate(candidate) if one.pairing is not None and i not in found)
    return ShapePairing(tuple(pairs), unpaired, searched, seed)


def _plain_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without axes of size 1, the shorter axis of a matrix first."""
    plain = tuple(size for size in shape if size != 1)
    return tuple(sorted(plain)) if len(plain) == 2 else plain


def _halves(plain: tuple[int, ...], strides: tuple[int, int], seed: int) -> tuple[Tensor, Tensor]:
    """Positions of the elements to pair by, and of the block to test [rows, columns, trailing].

    `strides`: how far apart neighbours along the first two axes are stored; those along the others lie side by side.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (_split(size, generator) for size in (plain[0], plain[1] if len(plain) > 1 else 1))
    trailing = torch.randperm(math.prod(plain[2:]), generator=generator)[:_TRAILING].sort().values
    to_pair, to_test = (
        (r * strides[0])[:, None, None] + (c * strides[1])[:, None] + trailing
        for r, c in zip(rows, columns, strict=True)
    )
    if len(plain) > 1:
        to_test = to_test[:BLOCK, :BLOCK]
    chosen = torch.randperm(to_pair.numel(), generator=generator)[:PAIRING_POSITIONS]
    return to_pair.reshape(-1)[chosen], to_test.clone()


def _sampled(pairing: Tensor, block: Tensor) -> tuple[Tensor, Tensor] | None:
    """The elements to pair by (centred, norm 1) and the block to test; None of constant or non-finite ones."""
    values = pairing - pairing.mean()
    norm = float(values.norm())
    if not math.isfinite(norm) or norm <= 1e-12 * float(pairing.abs().max()) or not bool(block.isfinite().all()):
        return None
    return (values / norm).float(), block.float()


def _split(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two random halves of an axis, at most 2·BLOCK of it; both are the whole of a short one."""
    order = torch.randperm(size, generator=generator)
    if size < _SHORTEST_AXIS:
        whole = order.sort().values
        return whole, whole
    half = size // 2
    return order[:half][: 2 * BLOCK].sort().values, order[half:][: 2 * BLOCK].sort().values


def _similarities(ours: Sequence[ShapeSample], theirs: Sequence[ShapeSample]) -> tuple[Tensor, Tensor | None]:
    a = torch.stack([one.pairing for one in ours if one.pairing is not None])
    b = torch.stack([one.pairing for one in theirs if one.pairing is not None])
    square = len(theirs[0].shape) == 2 and theirs[0].shape[0] == theirs[0].shape[1]
    if not square:
        return a @ b.T, None
    other = torch.stack([torch.zeros_like(b[0]) if one.turned is None else one.turned[0] for one in theirs])
    return a @ b.T, a @ other.T


def _assigned(similarity: Tensor) -> list[tuple[int, int]]:
    if max(similarity.shape) <= LARGEST_ASSIGNMENT:
        found = best_assignment(similarity)
        return list(zip(found.rows.tolist(), found.columns.tolist(), strict=True))
    forward, backward = similarity.argmax(1).tolist(), similarity.argmax(0).tolist()
    return [(i, j) for i, j in enumerate(forward) if backward[j] == i]


def _tested(index: int, other: int, a: ShapeSample, b: ShapeSample, similarity: float, turned: bool) -> ShapePair:
    left, right = a.block, b.turned[1] if turned and b.turned else b.block
    assert left is not None
    assert right is not None
    tests = []
    for axis in (0, 1):
        x, y = (block.movedim(axis, 0).flatten(1) for block in (left, right))
        enough = len(a.shape) > 1 and a.shape[axis] >= _SHORTEST_AXIS and x.shape[1] > 1
        tests.append(unit_permutation_test([x], [y]) if enough else None)
    defined = [test for test in tests if test is not None and test.z is not None]
    z_rows, z_columns = (None if test is None else test.z for test in tests)
    z = effect = None
    # The only axis that is long enough may be the one that is not exchangeable.
    if len(defined) == 2 or (defined and len(a.shape) > 2):
        scores, effects = [test.z or 0.0 for test in defined], [test.effect or 0.0 for test in defined]
        agree = min(scores) >= 0 or max(scores) <= 0
        z, effect = (min(scores, key=abs), min(effects, key=abs)) if agree else (0.0, 0.0)
    log_p = None if z is None else two_sided_log_p(z)
    return ShapePair(index, other, similarity, z_rows, z_columns, z, effect, log_p, a.elements, turned)
