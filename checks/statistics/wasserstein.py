"""Wasserstein distance between distributions of numbers, on a stated scale."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from checks.statistics.positions import sample_positions


@dataclass(frozen=True)
class DistributionDistance:
    """Result of `element_distance`.

    `distance`: first Wasserstein distance over the pooled standard deviation, no unit; None where undefined. `shape`:
    the same after both sides were centred and scaled to standard deviation 1. `floor`: `distance` of two random halves
    of all values together, what a sample of this size shows of equal distributions. `n`: values per side, drawn with
    `seed`. `reason`: why there is no distance, else None.
    """

    distance: float | None
    shape: float | None
    floor: float | None
    n: int
    seed: int
    reason: str | None = None


def wasserstein_distance(a: Tensor, b: Tensor) -> float:
    """First Wasserstein distance of two sets of numbers: ∫|F⁻¹(p) - G⁻¹(p)| dp, in their unit.

    For equal counts that is the mean absolute difference of the sorted values; for others the exact integral over the
    steps of both quantile functions. Source: Vallender 1974, Calculation of the Wasserstein distance between
    probability distributions on the line. Float64. Raises ValueError for empty sets and non-finite values.
    """
    x, y = (side.detach().reshape(-1).double().sort().values for side in (a, b))
    if not x.numel() or not y.numel():
        raise ValueError("a set of values is empty")
    if not bool(x.isfinite().all() and y.isfinite().all()):
        raise ValueError("the values are not finite")
    if x.numel() == y.numel():
        return float((x - y).abs().mean())
    steps_x, steps_y = (
        torch.arange(1, side.numel() + 1, dtype=torch.float64, device=side.device) / side.numel() for side in (x, y)
    )
    steps = torch.cat([steps_x, steps_y]).sort().values
    widths = steps.diff(prepend=steps.new_zeros(1))
    # The middle of a step lies on one value of each side.
    middles = steps - widths / 2
    at_x, at_y = ((middles * side.numel()).long().clamp(max=side.numel() - 1) for side in (x, y))
    return float(((x[at_x] - y[at_y]).abs() * widths).sum())


def element_distance(a: Tensor, b: Tensor, sample: int = 65_536, seed: int = 0) -> DistributionDistance:
    """How far apart are the distributions of the elements of two tensors, of any shapes?

    distance = W₁(a, b) / sqrt((var a + var b)/2), on the same number of values of each side (stratified sample).
    Documented: tutorial-qa.md, Q3, "Wasserstein Dist": below .05 fine-tuned, above .5 from scratch, without a scale;
    the pooled standard deviation is this suite's choice. Two normal distributions of equal spread whose means differ by
    m standard deviations have distance m; N(0, 1) and N(0, s²) have √(2/π)·|1-s|/sqrt((1+s²)/2).
    It cannot accuse: two independent models of one initialisation and recipe hold the same distribution of elements
    and have a distance near `floor`. A large distance does not clear either: one factor makes it. See
    `checks.statistics.pca`, whose projections do depend on the models' axes.
    Non-finite values are left out. Raises TypeError for other than floating-point tensors.
    """
    sides = []
    for tensor in (a, b):
        if not tensor.dtype.is_floating_point or tensor.dtype == torch.float4_e2m1fn_x2:
            raise TypeError(f"{tensor.dtype} is not compared; dequantise first")
        at = sample_positions(tensor.numel(), sample, seed).to(tensor.device)
        values = tensor.detach().reshape(-1)[at].double().cpu()
        sides.append(values[values.isfinite()])
    count = min(len(side) for side in sides)
    if count < 2:
        return DistributionDistance(None, None, None, count, seed, f"{count} finite values")
    x, y = (side[sample_positions(len(side), count, seed)] for side in sides)
    pooled = float(((x.var(correction=0) + y.var(correction=0)) / 2).sqrt())
    if pooled <= 1e-12 * float(torch.cat([x, y]).abs().max()):
        return DistributionDistance(None, None, None, count, seed, "both sides are constant")
    own = [float(side.std(correction=0)) for side in (x, y)]
    shape = None
    if min(own) > 1e-12 * pooled:
        shape = wasserstein_distance((x - x.mean()) / own[0], (y - y.mean()) / own[1])
    both = torch.cat([x, y])[torch.randperm(2 * count, generator=torch.Generator().manual_seed(seed))]
    floor = wasserstein_distance(both[:count], both[count:]) / pooled
    return DistributionDistance(wasserstein_distance(x, y) / pooled, shape, floor, count, seed)
