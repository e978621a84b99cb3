"""Which layer of one model belongs to which of another, and which expert to which, by what no renumbering changes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Cost of not going on with the next layer, in standard deviations of the centred scores.
JUMP = 1.0


@dataclass(frozen=True)
class ExpertPair:
    """An expert of the candidate, the reference's nearest, and their distance in standard deviations per feature."""

    candidate: int
    reference: int
    distance: float


def layer_map(scores: Tensor, jump: float = JUMP) -> list[int]:
    """The column that each row of [n, m] `scores` belongs to: what resembles it most, layers in a row preferred.

    Scores are centred over rows and columns first (some layers resemble every other), and divided by their standard
    deviation. Then dynamic programming (Viterbi 1967) maximises the sum of the scores less `jump` wherever the next row
    does not belong to the next column: so a map may repeat or leave out layers, or go back, as depth up-scaling does
    (SOLAR 10.7B, arXiv 2312.15166), but does not follow noise. Equal scores give the map nearest to the diagonal.

    Scores that no renumbering of neurons changes need no correction afterwards; others need one for every map.
    Raises ValueError for other than a matrix with rows and columns, and for non-finite scores.
    """
    if scores.dim() != 2 or scores.numel() == 0:
        raise ValueError(f"scores have shape {tuple(scores.shape)}; need [layers, layers]")
    values = scores.detach().to("cpu", torch.float64)
    if not bool(values.isfinite().all()):
        raise ValueError("scores hold non-finite values")
    rows, columns = values.shape
    values = values - values.mean(1, keepdim=True) - values.mean(0) + values.mean()
    spread = values.std(correction=0)
    values = values / spread if float(spread) > 1e-12 else torch.zeros_like(values)
    # A nudge towards the diagonal, far below any difference that counts.
    steps = torch.arange(rows, dtype=torch.float64)[:, None] / max(1, rows - 1)
    places = torch.arange(columns, dtype=torch.float64) / max(1, columns - 1)
    values = values - 1e-6 * (steps - places).abs()

    move = torch.full((columns, columns), -jump, dtype=torch.float64)
    move[torch.arange(columns - 1), torch.arange(1, columns)] = 0.0
    best, came_from = values[0], []
    for row in values[1:]:
        total, previous = (best[:, None] + move).max(0)
        came_from.append(previous)
        best = total + row
    path = [int(best.argmax())]
    for previous in reversed(came_from):
        path.append(int(previous[path[-1]]))
    return path[::-1]


def expert_pairs(candidate: Tensor, reference: Tensor, count: int) -> tuple[list[ExpertPair], int]:
    """The `count` pairs of experts of two layers that look most alike, and how many pairs were compared.

    `candidate` [n, f], `reference` [m, f]: for each expert features that no renumbering of its neurons changes. They
    are divided by their standard deviation over all experts; constant ones are left out. Every expert of the candidate
    gets its nearest of the reference: one may belong to several, since upcycling copies one MLP into many experts.
    O(n·m·f), no assignment. Raises ValueError for different features and non-finite values.
    """
    if candidate.dim() != 2 or reference.dim() != 2 or candidate.shape[1] != reference.shape[1]:
        raise ValueError(f"features have shapes {tuple(candidate.shape)} and {tuple(reference.shape)}")
    if candidate.numel() == 0 or reference.numel() == 0:
        return [], 0
    both = torch.cat([candidate, reference]).double()
    if not bool(both.isfinite().all()):
        raise ValueError("the features of an expert are not finite")
    spread = both.std(0, correction=0)
    used = spread > 1e-12 * both.abs().amax(0).clamp_min(1e-300)
    scaled = both[:, used] / spread[used]
    distances = torch.cdist(scaled[: candidate.shape[0]], scaled[candidate.shape[0] :]) / max(1, int(used.sum())) ** 0.5
    nearest = distances.min(1)
    order = nearest.values.argsort(stable=True)[:count].tolist()
    pairs = [ExpertPair(row, int(nearest.indices[row]), float(nearest.values[row])) for row in order]
    return pairs, distances.numel()


def mismatched_pairs(
    mapped: Sequence[tuple[int, int]],
    rows: Sequence[int],
    columns: Sequence[int],
    same_row: Callable[[int], Collection[int]],
    same_column: Callable[[int], Collection[int]],
    count: int,
) -> list[tuple[int, int]]:
    """At most `count` pairs of layers that do not belong together, for a null: neighbours of mapped pairs first.

    `mapped`: pairs of layers that belong together. `same_row(i)`, `same_column(j)`: layers of the same model that are
    copies of i or of j, themselves included: a copy of a partner is a partner too.
    The pairs are taken in the order of their distance to the map, so ±1, ±2 …, and spread over the layers.
    """
    together = {(row, column) for i, j in mapped for row in same_row(i) for column in same_column(j)}
    partner = dict(mapped)
    order = {column: place for place, column in enumerate(columns)}

    def distance(row: int, column: int) -> tuple[int, int, int]:
        offset = order[column] - order[partner[row]] if row in partner else 0
        return abs(offset), -offset, row

    free = [(row, column) for row in rows for column in columns if (row, column) not in together and row in partner]
    return sorted(free, key=lambda pair: distance(*pair))[:count]
