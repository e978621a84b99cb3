"""Duplicates within one model: repeated layers (depth up-scaling), experts copied from one MLP (upcycling)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from checks.statistics.positions import sample_positions
from checks.statistics.units import UnitTest, two_sided_log_p, unit_permutation_test

# Elements of each MLP that the screen compares, and columns of each view that the exact test reads.
SCREEN_POSITIONS = 4096
COLUMNS = 256


@dataclass(frozen=True)
class SelfPair:
    """Two members of a group that were tested: their numbers, the exact test, and ln p times the pairs searched."""

    first: int
    second: int
    test: UnitTest
    log_p: float | None


@dataclass(frozen=True)
class SelfStructure:
    """Result of `search_duplicates`.

    `members`: MLPs in the group. `searched`: pairs that the screen compared, all of which the correction counts.
    `pairs`: those tested exactly, the largest |z| first. `unusable`: members without a screen (constant, non-finite).
    """

    members: int
    searched: int
    pairs: tuple[SelfPair, ...]
    unusable: tuple[int, ...]
    seed: int

    @property
    def strongest(self) -> SelfPair | None:
        """The pair with the largest |z|."""
        return self.pairs[0] if self.pairs else None

    def duplicates(self, log_alpha: float, minimum_effect: float) -> tuple[SelfPair, ...]:
        """Pairs whose corrected ln p is at most `log_alpha` and whose |effect| is at least `minimum_effect`."""
        return tuple(
            pair
            for pair in self.pairs
            if pair.log_p is not None and pair.log_p <= log_alpha and abs(pair.test.effect or 0.0) >= minimum_effect
        )


@dataclass(frozen=True)
class RepeatedRun:
    """Layers `first` … `first + length - 1` are repeated from `second` on."""

    first: int
    second: int
    length: int


def search_duplicates(
    members: int, views: Callable[[int], Sequence[Tensor]], seed: int = 0, partners: int = 2
) -> SelfStructure:
    """Which MLPs of one model resemble each other neuron by neuron?

    `views(i)`: the views of MLP i for some hidden units (the same numbers for all members): up [m, d], gate [m, d],
    down transposed [m, d], of equal shapes for all members. It is called once per member; samples are kept.

    Screen: correlation of all pairs on a fixed sample of elements, from one read each, O(members²·4096). The `partners`
    most similar others of every member, by |correlation|, are then tested with `unit_permutation_test` on a fixed
    sample of columns: at most `partners`·members exact tests instead of members²/2.
    ln p of a tested pair is corrected by all members·(members-1)/2 pairs (Bonferroni), so the screen needs no
    correction of its own, whatever it picks.
    Null hypothesis: the hidden units of each layer (or expert) were initialised independently and are exchangeable.
    It finds copies whose units keep their order. Not inheritance: upcycling a model's own dense predecessor gives the
    same. Source: SOLAR-10.7B (arXiv 2312.15166) for repeated layers, sparse upcycling (arXiv 2212.05055) for experts.
    Raises ValueError for members of unequal shapes.
    """
    blocks: list[list[Tensor]] = []
    signatures, unusable, shapes = [], [], None
    for member in range(members):
        found = views(member)
        shape = [tuple(view.shape) for view in found]
        if shapes is not None and shape != shapes:
            raise ValueError(f"member {member} has views {shape}; the first has {shapes}")
        shapes = shape
        blocks.append(_columns(found, seed))
        signature = _signature(found, seed)
        if signature is None:
            unusable.append(member)
        signatures.append(torch.zeros(1) if signature is None else signature)
    usable = [member for member in range(members) if member not in set(unusable)]
    searched = len(usable) * (len(usable) - 1) // 2
    if not searched:
        return SelfStructure(members, 0, (), tuple(unusable), seed)
    stacked = torch.stack([signatures[member] for member in usable])
    closeness = (stacked @ stacked.T).abs().fill_diagonal_(-1.0)
    nearest = closeness.topk(min(partners, len(usable) - 1), dim=1).indices.tolist()
    chosen = sorted({(min(i, j), max(i, j)) for i, others in enumerate(nearest) for j in others})
    pairs = []
    for i, j in chosen:
        test = unit_permutation_test(blocks[usable[i]], blocks[usable[j]])
        log_p = None if test.z is None else min(0.0, two_sided_log_p(test.z) + math.log(searched))
        pairs.append(SelfPair(usable[i], usable[j], test, log_p))
    pairs.sort(key=lambda pair: -abs(pair.test.z or 0.0))
    return SelfStructure(members, searched, tuple(pairs), tuple(unusable), seed)


def repeated_runs(pairs: Iterable[tuple[int, int]]) -> tuple[RepeatedRun, ...]:
    """Duplicates (i, j) gathered into runs i+t, j+t of neighbouring layers, the longest first."""
    left = {(min(pair), max(pair)) for pair in pairs}
    runs = []
    for first, second in sorted(left):
        if (first - 1, second - 1) in left:
            continue
        length = 1
        while (first + length, second + length) in left:
            length += 1
        runs.append(RepeatedRun(first, second, length))
    return tuple(sorted(runs, key=lambda run: (-run.length, run.first, run.second)))


def _columns(views: Sequence[Tensor], seed: int) -> list[Tensor]:
    return [view.detach()[:, sample_positions(view.shape[1], COLUMNS, seed).to(view.device)].cpu() for view in views]


def _signature(views: Sequence[Tensor], seed: int) -> Tensor | None:
    """Sampled elements of all views, each view centred and of norm 1; None where that is undefined."""
    parts = []
    for view in views:
        at = sample_positions(view.numel(), SCREEN_POSITIONS, seed)
        # Rows and columns are picked one after the other: a transposed view is not copied as a whole.
        values = view.detach()[(at // view.shape[1]).to(view.device), (at % view.shape[1]).to(view.device)].double()
        values = values - values.mean()
        norm = float(values.norm())
        if not math.isfinite(norm) or norm == 0:
            return None
        parts.append((values / norm).float().cpu())
    return torch.cat(parts) / math.sqrt(len(parts)) if parts else None
