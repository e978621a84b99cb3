"""Companions of the cosine: how far apart two tensors are, and robust versions that outliers cannot move."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from checks.statistics.elementwise import ElementwiseSums
from checks.statistics.positions import sample_positions

# Documented: weight-architecture-qa.md, Q3: tensors whose mean squared error is within 1e-5 are the same layer.
DOCUMENTED_MSE = 1e-5


@dataclass(frozen=True)
class Magnitude:
    """Result of `magnitude`; what is undefined is None.

    `n`: positions compared. `mse`: Σ(a-b)²/n, in squared units of the weights. `below_documented`: is it below 1e-5?
    `relative_mse`: the same over the mean variance of both, without unit: 0 equal, 2 unrelated, 4 for b = -a.
    `distance`: ‖a-b‖. `relative_distance`: ‖a-b‖ / sqrt(‖a‖² + ‖b‖²), 0 to √2, 1 for unrelated tensors without a mean.
    `norm_a`, `norm_b`: L2 norms. `reason`: why something is undefined, else None.
    """

    n: int
    mse: float | None
    below_documented: bool | None
    relative_mse: float | None
    distance: float
    relative_distance: float | None
    norm_a: float
    norm_b: float
    reason: str | None = None


@dataclass(frozen=True)
class RobustCosine:
    """Result of `robust_cosine`.

    `spearman`: correlation of ranks. `winsorized`: centred cosine after both tensors were clipped to their own 1st and
    99th percentiles. Both in [-1, 1]; None for a constant side. `positions`: how many were compared, drawn with `seed`.
    `null_sd`: of `spearman` for independent tensors of exchangeable elements, 1/sqrt(positions - 1).
    """

    spearman: float | None
    winsorized: float | None
    positions: int
    null_sd: float | None
    seed: int
    reason: str | None = None


def magnitude(sums: ElementwiseSums) -> Magnitude:
    """How far apart are two tensors, in their own units and free of scale?

    The cosine forgets lengths; the documents ask for the L2 distance beside it (weight-architecture-qa.md, Q4) and call
    tensors with a mean squared error within 1e-5 the same layer (Q3). That figure has a unit: independent tensors of
    standard deviation s have a mean squared error of 2s², below 1e-5 for every s < .0022, which large models have. So
    `below_documented` is shown, and `relative_mse` decides; the figure 1e-5 is one in 80 of the ordinary 2s² at s =
    .02, a relative error of .025.
    Blind to: permutation, rotation, and scaling (which changes `relative_mse` but not the cosine).
    """
    norm_a, norm_b = math.sqrt(sums.square_a), math.sqrt(sums.square_b)
    mse = sums.mean_squared_error
    relative = sums.relative_mean_squared_error
    size = math.hypot(norm_a, norm_b)
    reason = None
    if not sums.n:
        reason = "no finite positions"
    elif size == 0:
        reason = "both tensors are zero"
    elif relative is None:
        reason = "both tensors are constant"
    return Magnitude(
        sums.n,
        mse,
        None if mse is None else mse < DOCUMENTED_MSE,
        relative,
        sums.l2_distance,
        sums.l2_distance / size if size > 0 else None,
        norm_a,
        norm_b,
        reason,
    )


def robust_cosine(a: Tensor, b: Tensor, positions: int = 1 << 18, seed: int = 0) -> RobustCosine:
    """Do two tensors of equal size agree once outliers cannot dominate?

    On at most `positions` positions (stratified sample, the same in both): Spearman's rank correlation, ties sharing
    their mean rank, and the centred cosine of winsorised values. Positions where either side is not finite are left
    out. Documented: weight-architecture-qa.md, Q4 ("robust version" against outliers; zero vectors checked first).
    Null hypothesis: independent tensors of exchangeable elements; both then have mean 0.
    Zero vectors and constants have no direction: None with a reason, never 0 or 1.
    Raises ValueError for unequal sizes; TypeError for other than floating-point tensors.
    """
    for tensor in (a, b):
        if not tensor.dtype.is_floating_point or tensor.dtype == torch.float4_e2m1fn_x2:
            raise TypeError(f"{tensor.dtype} is not compared; dequantise first")
    if a.numel() != b.numel():
        raise ValueError(f"tensors of shape {tuple(a.shape)} and {tuple(b.shape)} have no common positions")
    at = sample_positions(a.numel(), positions, seed).to(a.device)
    x, y = (tensor.detach().reshape(-1)[at].double().cpu() for tensor in (a, b))
    finite = x.isfinite() & y.isfinite()
    x, y = x[finite], y[finite]
    count = x.numel()
    for name, side in (("a", x), ("b", y)):
        if count < 2 or bool((side == side[0]).all()):
            what = "zero" if count and float(side[0]) == 0 else "constant"
            reason = f"{name} is {what}" if count > 1 else f"{count} finite positions"
            return RobustCosine(None, None, count, None, seed, reason)
    ranks, clipped = zip(*(_ranked_and_clipped(side.numpy()) for side in (x, y)), strict=True)
    return RobustCosine(_centred_cosine(*ranks), _centred_cosine(*clipped), count, 1 / math.sqrt(count - 1), seed)


def _ranked_and_clipped(values: npt.NDArray[np.float64]) -> tuple[Tensor, Tensor]:
    """Ranks, ties sharing their mean, and the values clipped to their 1st and 99th percentiles, from one sort."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    first = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    sizes = np.diff(np.r_[first, len(values)])
    ranks = np.empty(len(values))
    ranks[order] = np.repeat(first + (sizes - 1) / 2, sizes)
    places = np.array([0.01, 0.99]) * (len(values) - 1)
    below = np.floor(places).astype(int)
    low, high = ordered[below] + (places - below) * (ordered[np.ceil(places).astype(int)] - ordered[below])
    return torch.from_numpy(ranks), torch.from_numpy(values.clip(low, high))


def _centred_cosine(x: Tensor, y: Tensor) -> float | None:
    scaled = [side / side.abs().max() if float(side.abs().max()) > 0 else side for side in (x, y)]
    u, v = (side - side.mean() for side in scaled)
    size = float(u.norm() * v.norm())
    # A winsorised side can be constant although the tensor is not.
    return max(-1.0, min(1.0, float(u @ v) / size)) if size > 1e-12 * len(u) else None
