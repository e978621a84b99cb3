"""Joint principal components of two models' rows: do the two clouds of points overlap?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from checks.statistics.positions import sample_positions

# Steps of the subspace iteration: axes of nearly equal variance need not be told apart.
_ITERATIONS = 6


@dataclass(frozen=True)
class CloudOverlap:
    """Result of `cloud_overlap`; None where undefined.

    `overlap`: 0 (disjoint) to 1 (the same cloud). `distance`: mean over the components of the Wasserstein distance of
    both projections over their pooled standard deviation. `null_overlap`, `null_distance`: means of the same after
    `permutations` random permutations of one side's channels, `null_highest_overlap` and `null_lowest_distance` the
    extremes. `projection_a`, `projection_b`: coordinates [n, 2] for a plot. `reason`: why there is no value, else None.
    """

    overlap: float | None
    distance: float | None
    null_overlap: float | None
    null_highest_overlap: float | None
    null_distance: float | None
    null_lowest_distance: float | None
    components: int
    points: tuple[int, int]
    permutations: int
    seed: int
    projection_a: Tensor | None = None
    projection_b: Tensor | None = None
    reason: str | None = None


def cloud_overlap(
    points_a: Tensor, points_b: Tensor, components: int = 32, permutations: int = 10, seed: int = 0
) -> CloudOverlap:
    """Do the rows of two models of equal width occupy the same region of space?

    `points_a` [n, d], `points_b` [m, d]: rows over the residual channels (embedding rows, neurons), not paired. Rows
    are scaled to norm 1 (zero rows left out) and each cloud is centred. The principal components of both clouds
    together, each weighing the same, are the axes.

    overlap = |Σa|^¼ |Σb|^¼ / |(Σa + Σb)/2|^½, the Bhattacharyya coefficient of two normal clouds with the covariances Σ
    in these axes (Bhattacharyya 1943, Bulletin of the Calcutta Mathematical Society 35): 1 if both clouds have one
    covariance, near 0 if each has its spread where the other has little.
    distance = mean over components of W₁ / pooled standard deviation.

    Documented: weight-architecture-qa.md, Q3 and tutorial-qa.md, Q3: fine-tuned models cluster near their base with
    more than 80 % overlap, models from scratch form other clusters; Wasserstein distance below .05 or above .5. They
    define neither points, overlap nor scale: those are this suite's.
    Null hypothesis: independent training makes the residual channels exchangeable, so a random permutation of one
    side's channels gives an equally likely overlap. Where the null itself overlaps by much (flat spectra, in which any
    axes are as good) there is no power. Few points per component lower the overlap of equal clouds: take 30 or more.
    Blind to permuted or rotated channels. Raises ValueError for other shapes and non-finite values.
    """
    if points_a.dim() != 2 or points_b.dim() != 2 or points_a.shape[1] != points_b.shape[1]:
        raise ValueError(f"points of shape {tuple(points_a.shape)} and {tuple(points_b.shape)} have no common channels")
    clouds = []
    for name, points in (("a", points_a), ("b", points_b)):
        wide = points.detach().double()
        if not bool(wide.isfinite().all()):
            raise ValueError(f"the points of {name} hold non-finite values")
        wide = wide[(wide != 0).any(1)]
        wide = wide / wide.abs().amax(1, keepdim=True)
        wide = wide / wide.norm(dim=1, keepdim=True)
        clouds.append(wide - wide.mean(0))
    a, b = clouds
    counts = (a.shape[0], b.shape[0])
    axes = min(components, a.shape[1], min(counts) - 1)
    for name, cloud in (("a", a), ("b", b)):
        if axes < 2 or float(cloud.square().sum(1).mean()) < 1e-12:
            reason = f"{cloud.shape[0]} points of {name} do not span two components"
            return CloudOverlap(None, None, None, None, None, None, max(axes, 0), counts, 0, seed, reason=reason)
    generator = torch.Generator().manual_seed(seed)
    inner_a, inner_b = (cloud.T @ cloud / cloud.shape[0] for cloud in (a, b))
    overlap, distance, basis = _compare((a, inner_a), (b, inner_b), axes, seed)
    null = []
    for _ in range(permutations):
        order = torch.randperm(b.shape[1], generator=generator).to(b.device)
        null.append(_compare((a, inner_a), (b[:, order], inner_b[order][:, order]), axes, seed)[:2])
    overlaps, distances = zip(*null, strict=True) if null else ((), ())
    return CloudOverlap(
        overlap,
        distance,
        math.fsum(overlaps) / len(overlaps) if overlaps else None,
        max(overlaps, default=None),
        math.fsum(distances) / len(distances) if distances else None,
        min(distances, default=None),
        axes,
        counts,
        permutations,
        seed,
        (a @ basis[:, :2]).cpu(),
        (b @ basis[:, :2]).cpu(),
    )


def _compare(
    one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], axes: int, seed: int
) -> tuple[float, float, Tensor]:
    """Overlap and distance in the leading components of both clouds together, and these components [d, axes].

    Of each cloud its points and its covariance.
    """
    basis = _leading_components(one[1] + other[1], axes, seed)
    inner_a, inner_b = (basis.T @ covariance @ basis for _, covariance in (one, other))
    # A cloud that is flat along an axis keeps a trace of width, so that every determinant is defined.
    ridge = 1e-6 * torch.diagonal(inner_a + inner_b).mean() * torch.eye(axes, dtype=basis.dtype, device=basis.device)
    logs = [torch.linalg.slogdet(matrix + ridge).logabsdet for matrix in (inner_a, inner_b, (inner_a + inner_b) / 2)]
    log_overlap = float(logs[0] + logs[1]) / 4 - float(logs[2]) / 2
    pooled = (torch.diagonal(inner_a + inner_b) / 2).sqrt()
    # As many points of each, so that all components are sorted and subtracted at once.
    count = min(len(one[0]), len(other[0]))
    left, right = (
        (points[sample_positions(len(points), count, seed).to(points.device)] @ basis).float().sort(0).values
        for points, _ in (one, other)
    )
    distances = (left - right).double().abs().mean(0)[pooled > 0] / pooled[pooled > 0]
    return math.exp(min(0.0, log_overlap)), float(distances.mean()), basis


def _leading_components(covariance: Tensor, axes: int, seed: int) -> Tensor:
    """Leading eigenvectors [d, axes] by subspace iteration (Halko, Martinsson, Tropp 2011, algorithm 4.4)."""
    generator = torch.Generator().manual_seed(seed)
    width = min(axes + 8, covariance.shape[0])
    basis = torch.randn(covariance.shape[0], width, generator=generator, dtype=torch.float64).to(covariance.device)
    for _ in range(_ITERATIONS):
        basis = torch.linalg.qr(covariance @ basis).Q
    small = basis.T @ covariance @ basis
    leading: Tensor = basis @ torch.linalg.eigh((small + small.T) / 2).eigenvectors.flip(1)[:, :axes]
    return leading
