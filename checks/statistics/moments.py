"""Lengths and variance of the rows of an embedding table."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowMoments:
    """Result of `row_moments`: of the rows that are not zero.

    `rows`, `zero_rows`: how many. `mean_norm`, `sd_norm`: of the rows' L2 norms, in units of the weights. `variance`:
    of all elements, in squared units. All None without a row.
    """

    rows: int
    zero_rows: int
    mean_norm: float | None
    sd_norm: float | None
    variance: float | None


@dataclass(frozen=True)
class MomentComparison:
    """Result of `compare_moments`.

    `norm_difference`, `variance_difference`: |x_a - x_b| / mean of both, 0 to 2; None where either is undefined or both
    are 0. `norm_correlation`: Pearson's r of the log norms of paired rows, None without pairs or variation; `pairs`.
    """

    a: RowMoments
    b: RowMoments
    norm_difference: float | None
    variance_difference: float | None
    norm_correlation: float | None
    pairs: int


def row_moments(rows: Tensor) -> RowMoments:
    """L2 norms and variance of a table [n, d]; zero rows (padding) are counted and left out.

    Raises TypeError for other than floating-point tables; ValueError for wrong shapes and non-finite values.
    """
    norms = _norms(rows)
    used = norms > 0
    count = int(used.sum())
    if not count:
        return RowMoments(0, rows.shape[0], None, None, None)
    kept = rows.detach()[used].double()
    return RowMoments(
        count,
        rows.shape[0] - count,
        float(norms[used].mean()),
        float(norms[used].std(correction=0)),
        float(kept.var(correction=0)),
    )


def compare_moments(rows_a: Tensor, rows_b: Tensor, paired: bool = False) -> MomentComparison:
    """How far apart are the row lengths and the variance of two embedding tables?

    `rows_a` [n, d_a] and `rows_b` [m, d_b]; `paired` says that row i of both belongs to the same token.
    Documented without figures: tutorial-qa.md, Q3, "L2 norm and variance comparison" of the embedding layer.
    It cannot accuse: scale follows from initialisation, weight decay and frequency, so independent models of one recipe
    agree, also row by row (frequent tokens have other norms than rare ones in any model). It cannot clear either: one
    factor changes it. Raises as `row_moments`; ValueError for pairs of unequal number.
    """
    a, b = row_moments(rows_a), row_moments(rows_b)
    correlation, pairs = None, 0
    if paired:
        if rows_a.shape[0] != rows_b.shape[0]:
            raise ValueError(f"{rows_a.shape[0]} and {rows_b.shape[0]} rows cannot be paired")
        norms = torch.stack([_norms(rows_a).cpu(), _norms(rows_b).cpu()])
        logs = norms[:, (norms > 0).all(0)].log()
        pairs = logs.shape[1]
        if pairs > 1:
            centred = logs - logs.mean(1, keepdim=True)
            size = float(centred[0].norm() * centred[1].norm())
            correlation = float(centred[0] @ centred[1]) / size if size > 1e-12 * pairs else None
    return MomentComparison(
        a, b, _difference(a.mean_norm, b.mean_norm), _difference(a.variance, b.variance), correlation, pairs
    )


def _norms(rows: Tensor) -> Tensor:
    if not rows.dtype.is_floating_point:
        raise TypeError(f"the table is {rows.dtype}; dequantise first")
    if rows.dim() != 2 or rows.shape[1] == 0:
        raise ValueError(f"the table has shape {tuple(rows.shape)}; need [rows, columns]")
    norms: Tensor = rows.detach().double().norm(dim=1)
    if not bool(norms.isfinite().all()):
        raise ValueError("the table holds non-finite values (or values too large to square in float64)")
    return norms


def _difference(a: float | None, b: float | None) -> float | None:
    if a is None or b is None or a + b == 0 or not math.isfinite(a + b):
        return None
    return 2 * abs(a - b) / (a + b)
