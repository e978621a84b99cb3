"""Where did training start? What two models share beyond the initial weights that one of them began from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from checks.statistics.units import UnitTest, unit_permutation_test


@dataclass(frozen=True)
class OriginTest:
    """Three unit permutation tests of one MLP.

    `start`: initial weights and candidate; `reference_start`: initial weights and reference; `beyond`: candidate and
    reference, each without what its units have in common with the same units of the initial weights.
    """

    start: UnitTest
    reference_start: UnitTest
    beyond: UnitTest


def origin_test(initial: Sequence[Tensor], candidate: Sequence[Tensor], reference: Sequence[Tensor]) -> OriginTest:
    """Does what candidate and reference share come from the initial weights alone?

    Each argument: the same number of matrices [h, d_i], the h hidden units as rows, as `unit_permutation_test` takes
    them. Two models trained from one set of initial weights keep part of it, which makes them resemble each other; one
    that was derived from the other shares what the other *learned* as well, which lies beyond the initial weights.
    Null hypothesis of `beyond`: both began from `initial` and learned apart. It is not exact: equal starts make updates
    alike, so its effect is judged against pairs of known ancestry, not by its p-value.
    Raises as `unit_permutation_test` does, and ValueError for views whose shapes differ.
    """
    return OriginTest(
        unit_permutation_test(initial, candidate),
        unit_permutation_test(initial, reference),
        unit_permutation_test(
            [without_start(view, start) for view, start in zip(candidate, initial, strict=True)],
            [without_start(view, start) for view, start in zip(reference, initial, strict=True)],
        ),
    )


def without_start(rows: Tensor, start: Tensor) -> Tensor:
    """Each row less its projection on the same row of `start`, in float64: r - (⟨r, s⟩/⟨s, s⟩)·s; all [h, d].

    The factor is the row's own, since weight decay shrinks initial weights at a rate that nobody states. Where `start`
    is zero the row stays as it is. Raises ValueError for other shapes.
    """
    if rows.shape != start.shape:
        raise ValueError(f"rows are {tuple(rows.shape)} and their start {tuple(start.shape)}; expected equal shapes")
    x, s = rows.double(), start.double()
    square = s.square().sum(1, keepdim=True)
    factor = (x * s).sum(1, keepdim=True) / square.where(square > 0, 1.0)
    return x - factor * s
