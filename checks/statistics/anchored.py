"""Anchored double matching: neurons are probes for each other, so that no common vocabulary or basis is needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from checks.statistics.assignment import best_assignment
from checks.statistics.double_matching import DoubleMatching, double_matching, pool
from checks.statistics.neuron_signature import Neurons

# Rounds of matching with anchors of the same MLP, then with those of all MLPs.
WITHIN_ROUNDS = 3
ACROSS_ROUNDS = 4
# Matched neurons that serve as probes at most: the better half, and no more than this.
LARGEST_BANK = 1024


@dataclass(frozen=True)
class AnchoredMatchings:
    """Result of `anchored_matchings`: one matching for each mapped pair and for each mismatched pair with anchors.

    `directions`: paired directions [p, d_a] and [p, d_b] of the anchors in both residual streams. `same_number`: share
    of the anchors that have the same number in both MLPs; None for MLPs of different size.
    """

    mapped: tuple[DoubleMatching, ...]
    mismatched: tuple[DoubleMatching, ...]
    anchors: int
    directions: tuple[Tensor, Tensor] | None
    same_number: float | None
    seed: int


@dataclass(frozen=True)
class _Matched:
    """Neurons of one pair of MLPs, matched: their indices on both sides, relative signs, and how clear each is."""

    left: Tensor
    right: Tensor
    signs: Tensor | None
    margins: Tensor


@dataclass(frozen=True)
class _Bank:
    """Paired probes: directions [p, d] of both models, whose neurons they are, and their weights [p]."""

    directions_a: Tensor
    directions_b: Tensor
    blocks_a: Tensor
    blocks_b: Tensor
    neurons_a: Tensor
    neurons_b: Tensor
    weights: Tensor

    def without(self, block_a: int, block_b: int) -> _Bank:
        """The probes that are neurons of neither block."""
        kept = (self.blocks_a != block_a) & (self.blocks_b != block_b)
        return _Bank(*(getattr(self, name)[kept] for name in self.__dataclass_fields__))


def anchored_matchings(
    a: Sequence[Neurons],
    b: Sequence[Neurons],
    mapped: Sequence[tuple[int, int]],
    mismatched: Sequence[tuple[int, int]] = (),
    signatures: tuple[Sequence[Tensor], Sequence[Tensor]] | None = None,
    seed: int = 0,
) -> AnchoredMatchings:
    """Double matching of the MLPs of two models by what their neurons read of each other.

    `a`, `b`: the MLPs of both models; `mapped`: pairs of indices (a, b) that may belong together; `mismatched`: pairs
    that do not, for the null. `signatures`: of every MLP that is mapped (`signature`), or None to compute them.

    What one neuron reads along the direction in which another one reads or writes is the same after any rotation or
    permutation of the residual stream. Only the numbers of the neurons are unknown:

    1. A random half of the neurons of the smaller MLP of each pair (by its number and `seed`) is matched to the other
       MLP by signature.
    2. The better half of those pairs are anchors: the directions in which they read at the gate, and in which they
       write with their relative sign, are paired probes. All neurons of the half are matched again by their answers to
       them, with the anchors of the same MLP first, then with those of all mapped MLPs, weighted by how far a pair's
       similarity is above the next one's. An anchor is no probe for itself.
    3. Test: the other half of the neurons, which had no part in choosing the anchors, answers the anchors with the gate
       and with the up projection (without a gate: reading and writing), and the two matchings are compared
       (`double_matching`). Then the halves change places, and both results are pooled.

    Null hypothesis: independent training; the anchors are then paired at random and the two matchings unrelated.
    Mismatched pairs answer the same anchors, less those that are neurons of either MLP.
    An MLP that was inherited alone is found by its own anchors, and finds weaker neighbours by being theirs.
    Follows double matching (Zhu et al., arXiv 2502.12292, section 3.3) with seeded graph matching (Fishkind et al.
    2019, Seeded graph matching, Pattern Recognition 87) in place of common inputs.
    Blind to: single neurons that were inherited among fresh ones; distillation.

    Cost: for each mapped pair about 2·(rounds + 1)·(2 h²p + 2 h p d) multiply-adds and as many assignments of h/2 x h,
    p being at most 2·`LARGEST_BANK`. Deterministic. Raises ValueError for indices out of range.
    """
    pairs = [_Pair(a, b, i, j) for i, j in mapped]
    pooled: list[list[DoubleMatching]] = [[] for _ in (*mapped, *mismatched)]
    if not pairs:
        return AnchoredMatchings((), (), 0, None, None, seed)
    if signatures is None:
        signatures = _signatures(a, {i for i, _ in mapped}), _signatures(b, {j for _, j in mapped})
    for fold in (0, 1):
        state = [pair.by_signature(signatures[0][pair.i], signatures[1][pair.j], fold, seed) for pair in pairs]
        for _ in range(WITHIN_ROUNDS):
            state = [
                pair.by_anchors(_bank([pair], [one], weighted=False), one.left)
                for pair, one in zip(pairs, state, strict=True)
            ]
        for _ in range(ACROSS_ROUNDS if len(pairs) > 1 else 0):
            bank = _bank(pairs, state, weighted=True)
            state = [pair.by_anchors(bank, one.left) for pair, one in zip(pairs, state, strict=True)]
        bank = _bank(pairs, state, weighted=True)
        for number, pair in enumerate(pairs):
            pooled[number].append(pair.test(bank, fold, seed))
        for number, (i, j) in enumerate(mismatched, start=len(mapped)):
            rest = bank.without(i, j)
            if rest.weights.shape[0] > 1:
                pooled[number].append(_Pair(a, b, i, j).test(rest, fold, seed))
    results = [pool(one) if one else None for one in pooled]
    first, second = results[: len(mapped)], results[len(mapped) :]
    return AnchoredMatchings(
        tuple(one for one in first if one is not None),
        tuple(one for one in second if one is not None),
        bank.weights.shape[0],
        (bank.directions_a, bank.directions_b),
        _same_number(pairs, state),
        seed,
    )


class _Pair:
    """An MLP of a and one of b; the smaller is `left`, whose neurons are matched, the other `right`."""

    def __init__(self, a: Sequence[Neurons], b: Sequence[Neurons], i: int, j: int) -> None:
        if not (0 <= i < len(a) and 0 <= j < len(b)):
            raise ValueError(f"pair ({i}, {j}) of {len(a)} and {len(b)} MLPs")
        self.i, self.j = i, j
        one, other = a[i], b[j]
        if len(one.others) != len(other.others) or one.sign_free != other.sign_free:
            raise ValueError(f"pair ({i}, {j}): one MLP has a gate and the other has not; compare both `without_up`")
        self.sign_free = one.sign_free
        self.is_swapped = one.count > other.count
        self.left, self.right = (other, one) if self.is_swapped else (one, other)

    def half(self, fold: int, seed: int) -> Tensor:
        """Half of the left neurons; the same for every pair of which that MLP is the left one."""
        key = 2 * (self.j if self.is_swapped else self.i) + self.is_swapped
        generator = torch.Generator().manual_seed(seed * 1_000_003 + key)
        order = torch.randperm(self.left.count, generator=generator)
        middle = self.left.count // 2
        return (order[middle:] if fold else order[:middle]).sort().values.to(self.left.fixed.device)

    def by_signature(self, of_a: Tensor, of_b: Tensor, fold: int, seed: int) -> _Matched:
        """Match half of the neurons by signature. Without a gate the signs are known, all of them positive."""
        rows = self.half(fold, seed)
        left, right = (of_b, of_a) if self.is_swapped else (of_a, of_b)
        signs = None if self.sign_free else torch.ones((), device=rows.device).expand(len(rows), self.right.count)
        return _match(left[rows] @ right.T, rows, signs)

    def by_anchors(self, bank: _Bank, rows: Tensor) -> _Matched:
        """Match some neurons by the answers of all their views to the probes."""
        fixed, *others = self._similarities(bank, rows, len(self.left.others))
        together = torch.stack(others).sum(0)
        total = fixed + (together.abs() if self.sign_free else together)
        return _match(total / (1 + len(others)), rows, together.sign() if self.sign_free else torch.ones_like(together))

    def test(self, bank: _Bank, fold: int, seed: int) -> DoubleMatching:
        """Double matching of the half that chose no anchors."""
        fixed, second = self._similarities(bank, self.half(1 - fold, seed), 1)
        return double_matching(fixed, second, True, not self.sign_free, seed)

    def _similarities(self, bank: _Bank, rows: Tensor, others: int) -> list[Tensor]:
        """Similarities of the answers of the fixed view and of the first `others` others."""
        ours = (bank.directions_a, bank.blocks_a == self.i, bank.neurons_a)
        theirs = (bank.directions_b, bank.blocks_b == self.j, bank.neurons_b)
        of_left, of_right = (theirs, ours) if self.is_swapped else (ours, theirs)
        left = (self.left.fixed, *self.left.others[:others])
        right = (self.right.fixed, *self.right.others[:others])
        own_left = _own(of_left, self.left.count, rows)
        own_right = _own(of_right, self.right.count, None)
        return [
            _answers(one[rows], of_left[0], own_left, bank.weights)
            @ _answers(other, of_right[0], own_right, bank.weights).T
            for one, other in zip(left, right, strict=True)
        ]


def _own(side: tuple[Tensor, Tensor, Tensor], count: int, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which neurons (positions in `rows`) meet themselves among the probes, and where: two vectors of indices."""
    _, is_own, owners = side
    probes = is_own.nonzero()[:, 0]
    if rows is None:
        return owners[probes], probes
    position = torch.full((count,), -1, device=rows.device)
    position[rows] = torch.arange(len(rows), device=rows.device)
    places = position[owners[probes]]
    return places[places >= 0], probes[places >= 0]


def _answers(view: Tensor, directions: Tensor, own: tuple[Tensor, Tensor], weights: Tensor) -> Tensor:
    """Answers [n, p] of some neurons to the probes, centred, weighted, of norm 1; none to the neuron itself."""
    answers = view @ directions.T
    answers[own] = 0.0
    others = answers.shape[1] - torch.bincount(own[0], minlength=answers.shape[0])
    answers -= (answers.sum(1) / others.clamp_min(1))[:, None]
    answers[own] = 0.0
    answers *= weights
    norms = answers.norm(dim=1, keepdim=True)
    answers /= norms.clamp_min(1e-12)
    return answers


def _match(similarity: Tensor, rows: Tensor, signs: Tensor | None) -> _Matched:
    """The best assignment, and by how much each pair is better than the neuron's next best."""
    columns = best_assignment(similarity).columns.to(rows.device)
    places = torch.arange(len(rows), device=rows.device)
    values = similarity[places, columns]
    rest = similarity.scatter(1, columns[:, None], -torch.inf).amax(1)
    return _Matched(rows, columns, None if signs is None else signs[places, columns], values - rest)


def _bank(pairs: Sequence[_Pair], state: Sequence[_Matched], weighted: bool) -> _Bank:
    """The better half of all matched neurons as probes: where they read at the gate, and where they write."""
    margins = torch.cat([one.margins for one in state])
    kept = margins.argsort(descending=True, stable=True)[: min(LARGEST_BANK, (len(margins) + 1) // 2)]
    chosen = torch.zeros_like(margins, dtype=torch.bool)
    chosen[kept] = True
    parts: list[tuple[Tensor, ...]] = []
    sizes = [len(one.margins) for one in state]
    for pair, one, keep in zip(pairs, state, torch.split(chosen, sizes), strict=True):
        left, right = one.left[keep], one.right[keep]
        weights = one.margins[keep].clamp_min(1e-4) if weighted else torch.ones_like(one.margins[keep])
        in_a, in_b = (right, left) if pair.is_swapped else (left, right)
        block_a, block_b = (pair.right, pair.left) if pair.is_swapped else (pair.left, pair.right)
        owners = (torch.full_like(in_a, pair.i), torch.full_like(in_b, pair.j), in_a, in_b, weights)
        parts.append((block_a.fixed[in_a], block_b.fixed[in_b], *owners))
        if one.signs is not None:
            written = block_b.others[-1][in_b] * one.signs[keep][:, None]
            parts.append((block_a.others[-1][in_a], written, *owners))
    return _Bank(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _same_number(pairs: Sequence[_Pair], state: Sequence[_Matched]) -> float | None:
    """Share of matched neurons whose numbers are equal; None if no pair of MLPs has equal sizes."""
    same = [
        (pair.left.numbers[one.left] == pair.right.numbers[one.right]).double()
        for pair, one in zip(pairs, state, strict=True)
        if pair.left.total == pair.right.total and len(one.left)
    ]
    return float(torch.cat(same).mean()) if same else None


def _signatures(blocks: Sequence[Neurons], wanted: set[int]) -> list[Tensor]:
    from checks.statistics.neuron_signature import signature

    return [signature(block) if number in wanted else torch.zeros(0) for number, block in enumerate(blocks)]
