"""Maximum-score linear assignment: which row belongs to which column, each used once?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


@dataclass(frozen=True)
class Assignment:
    """One-to-one pairs of rows and columns.

    `rows`, `columns`: int64 tensors [min(n, m)] on the CPU, rows ascending. `score`: the sum of the paired scores.
    """

    rows: Tensor
    columns: Tensor
    score: float


def best_assignment(scores: Tensor) -> Assignment:
    """The one-to-one pairs of rows and columns of [n, m] `scores` with the largest sum; the shorter side is used up.

    Solved exactly by the modified Jonker-Volgenant algorithm of scipy (Crouse 2016, On implementing 2D rectangular
    assignment algorithms), in float64 on the CPU. Before it, every line of the side that is used up, and of a square
    matrix also every column, has its maximum subtracted: that changes the sums of all assignments alike, so not the
    best one, and spares the solver much of its search where some columns are attractive to all rows.
    Measured on one core: 4096 x 4096 in 1.4 to 2.1 s for scores of full or moderately decaying rank; a matrix of
    rank 2 takes half a minute.

    An empty matrix has no pairs and score 0. Ties are broken by position: shuffle columns where that could matter.
    Raises ValueError for other than a matrix and for non-finite scores, TypeError for other than floating-point ones.
    """
    if scores.dim() != 2:
        raise ValueError(f"scores have shape {tuple(scores.shape)}; need a matrix [rows, columns]")
    if not scores.dtype.is_floating_point:
        raise TypeError(f"scores are {scores.dtype}; need floating point")
    if scores.numel() == 0:
        nothing = torch.zeros(0, dtype=torch.int64)
        return Assignment(nothing, nothing.clone(), 0.0)
    values = scores.detach().to("cpu", torch.float64)
    if not bool(values.isfinite().all()):
        raise ValueError("scores hold non-finite values; leave those rows and columns out first")
    used_up = 1 if values.shape[0] <= values.shape[1] else 0
    reduced = values - values.amax(used_up, keepdim=True)
    if values.shape[0] == values.shape[1]:
        reduced -= reduced.amax(0, keepdim=True)
    rows, columns = linear_sum_assignment(reduced.numpy(), maximize=True)
    order = np.argsort(rows)
    rows, columns = torch.from_numpy(rows[order]), torch.from_numpy(columns[order])
    return Assignment(rows, columns, float(values[rows, columns].sum()))
