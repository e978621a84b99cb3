"""k-means centroids of two embedding tables, matched one to one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from checks.statistics.assignment import best_assignment
from checks.statistics.positions import sample_positions

# Steps of Lloyd's algorithm at most; centroids hardly move after that.
ITERATIONS = 20


@dataclass(frozen=True)
class CentroidSimilarity:
    """Result of `centroid_similarity`.

    `cosine`: mean cosine of matched centroids, in [-1, 1]; None where undefined. `null_mean`, `null_sd`: of the same
    value over `permutations` random permutations of one side's channels, re-matched each time; `z` = (cosine -
    null_mean)/null_sd. `clusters`: k. `reason`: why there is no cosine, else None.
    """

    cosine: float | None
    z: float | None
    null_mean: float | None
    null_sd: float | None
    clusters: int
    permutations: int
    seed: int
    reason: str | None = None


def k_means(points: Tensor, clusters: int, seed: int = 0, restarts: int = 4) -> Tensor:
    """Centroids [k, d] of the points [n, d] by Lloyd's algorithm, the best of several starts by squared distance.

    Starts are drawn by k-means++ (Arthur, Vassilvitskii 2007) from `seed`; a cluster that loses all points keeps its
    centroid; it stops when no point changes its cluster. The order of the centroids has no meaning. Float32 distances.
    Raises ValueError unless 1 ≤ k ≤ n and all points are finite.
    """
    if points.dim() != 2 or not 1 <= clusters <= points.shape[0]:
        raise ValueError(f"cannot make {clusters} clusters of points of shape {tuple(points.shape)}")
    data = points.detach().float()
    if not bool(data.isfinite().all()):
        raise ValueError("the points hold non-finite values")
    generator = torch.Generator().manual_seed(seed)
    best, lowest = data[:clusters], math.inf
    for _ in range(restarts):
        centroids, distance = _lloyd(data, _plus_plus(data, clusters, generator))
        if distance < lowest:
            best, lowest = centroids, distance
    return best


def centroid_similarity(
    rows_a: Tensor, rows_b: Tensor, clusters: int = 16, permutations: int = 20, seed: int = 0, rows: int = 4096
) -> CentroidSimilarity:
    """Do the k-means centroids of two embedding tables of equal width point the same way?

    `rows_a` [n, d], `rows_b` [m, d]: tokens need not be the same. Zero rows are left out, at most `rows` rows of each
    table are taken (stratified sample), each table's mean row is subtracted, and its rms is made 1. Lloyd's algorithm
    starts from k-means++ on a, and on b from the centroids of a, so that two tables that can be split alike are;
    centroids are then matched by linear assignment on their cosine. The value is the mean over the matched pairs.
    Documented: tutorial-qa.md, Q3 ("compare centroids by K-means clustering"), with neither k nor bands; k = 16 is
    ours.
    Null hypothesis: independent training makes the residual channels exchangeable, so the value is compared with that
    of the same procedure after random permutations of b's channels: start, search and assignment are part of the null.
    Blind to permuted or rotated channels.
    Raises ValueError for other shapes and non-finite values.
    """
    if rows_a.dim() != 2 or rows_b.dim() != 2 or rows_a.shape[1] != rows_b.shape[1]:
        raise ValueError(f"tables of shape {tuple(rows_a.shape)} and {tuple(rows_b.shape)} have no common channels")
    tables = []
    for name, table in (("a", rows_a), ("b", rows_b)):
        kept = table.detach()[(table != 0).any(1)]
        kept = kept[sample_positions(kept.shape[0], rows, seed).to(kept.device)].float()
        if not bool(kept.isfinite().all()):
            raise ValueError(f"the table of {name} holds non-finite values")
        reason = None
        if kept.shape[0] < 2 * clusters:
            reason = f"{name} has {kept.shape[0]} rows; need {2 * clusters} for {clusters} clusters"
        else:
            # Before anything is squared: one factor changes no cosine.
            kept = kept / kept.abs().max()
            kept = kept - kept.mean(0)
            if float(kept.abs().max()) <= 1e-6:
                reason = f"all rows of {name} are equal"
        if reason:
            return CentroidSimilarity(None, None, None, None, clusters, 0, seed, reason)
        tables.append(kept / kept.square().mean().sqrt())
    a, b = tables
    centroids = k_means(a, clusters, seed)
    value = _matched(centroids, _lloyd(b, centroids)[0])
    generator = torch.Generator().manual_seed(seed)
    # Permuting the channels of the start permutes b's channels the other way, without a copy of b.
    starts = (centroids[:, torch.randperm(b.shape[1], generator=generator).to(b.device)] for _ in range(permutations))
    null = torch.tensor([_matched(start, _lloyd(b, start)[0]) for start in starts])
    if permutations < 2 or float(null.std()) <= 1e-12:
        return CentroidSimilarity(value, None, None, None, clusters, permutations, seed)
    mean, sd = float(null.mean()), float(null.std())
    return CentroidSimilarity(value, (value - mean) / sd, mean, sd, clusters, permutations, seed)


def _matched(a: Tensor, b: Tensor) -> float:
    cosines = (torch.nn.functional.normalize(a, dim=1) @ torch.nn.functional.normalize(b, dim=1).T).double().cpu()
    return best_assignment(cosines).score / len(cosines)


def _plus_plus(data: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """Starting centroids: each next one is drawn with a probability proportional to its squared distance."""
    chosen = [int(torch.randint(data.shape[0], (1,), generator=generator))]
    distance = (data - data[chosen[0]]).square().sum(1)
    for _ in range(1, clusters):
        cumulative = distance.double().cumsum(0)
        target = torch.rand(1, generator=generator, dtype=torch.float64).to(data.device) * cumulative[-1]
        chosen.append(int(torch.searchsorted(cumulative, target).clamp(max=data.shape[0] - 1)))
        distance = torch.minimum(distance, (data - data[chosen[-1]]).square().sum(1))
    return data[chosen].clone()


def _lloyd(data: Tensor, centroids: Tensor) -> tuple[Tensor, float]:
    """Refined centroids and the sum of squared distances to them."""
    nearest, squares = None, data.square().sum()
    for _ in range(ITERATIONS):
        # Of ‖x - c‖² only what depends on c, so that the work is products of matrices.
        found = (centroids.square().sum(1) - 2 * (data @ centroids.T)).argmin(1)
        if nearest is not None and bool((found == nearest).all()):
            break
        nearest = found
        members = torch.nn.functional.one_hot(nearest, len(centroids)).to(data.dtype)
        counts = members.sum(0)[:, None]
        centroids = torch.where(counts > 0, members.T @ data / counts.clamp(min=1), centroids)
    rest = (centroids.square().sum(1) - 2 * (data @ centroids.T)).amin(1)
    return centroids, float(squares.double() + rest.double().sum())
