"""Where did training start? What two models share beyond the initial weights that one of them began from."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from checks.statistics.units import UnitTest, unit_permutation_test


def beyond_start(initial: Sequence[Tensor], candidate: Sequence[Tensor], reference: Sequence[Tensor]) -> UnitTest:
    """What do candidate and reference share beyond the initial weights that both began from?

    Each argument: the same number of matrices [h, d_i], the h hidden units as rows, as `unit_permutation_test` takes
    them. Both models are tested without what their units have in common with the same units of the initial weights:
    training from one set of initial weights leaves part of it in both, which makes them resemble each other; a model
    that was derived from the other shares what the other *learned* as well.
    Null hypothesis: both began from `initial` and learned apart. It is not exact: equal starts make updates alike, so
    the effect is judged against pairs of known ancestry, not by its p-value.
    Raises as `unit_permutation_test` does, and ValueError for views whose shapes differ.
    """
    return unit_permutation_test(
        [without_start(view, start) for view, start in zip(candidate, initial, strict=True)],
        [without_start(view, start) for view, start in zip(reference, initial, strict=True)],
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
