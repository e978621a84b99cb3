"""Singular values of the attention products over depth: a triage that no change of basis defeats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Quantiles of the log singular values that describe one product.
QUANTILES = 64
# Fewer layers give too few shifts to compare with.
MINIMUM_LAYERS = 8


@dataclass(frozen=True)
class SpectrumComparison:
    """Result of `compare_spectra`; None where undefined, with `reason`.

    `ratio`: `distance` / `own_distance`, 0 for equal spectra; None with fewer than two layers. `distance`: median over
    a's layers of the distance to the nearest of b's, the rms difference of log singular values. `own_distance`: the
    same between layers of one model, of whichever model has the larger. `similarity`: mean correlation of aligned
    layers' detrended spectra, in [-1, 1]. `null_mean`, `null_sd`: of the same after each cyclic shift of one model's
    layers, aligned anew. `z` = (similarity - null_mean)/null_sd. `rank`: share of all shifts, the unshifted one
    included, that reach the similarity: 1/shifts at best. `layer_map`: for each layer of a the aligned layer of b (by
    position).
    """

    layers: tuple[int, int]
    ratio: float | None = None
    distance: float | None = None
    own_distance: float | None = None
    similarity: float | None = None
    z: float | None = None
    rank: float | None = None
    null_mean: float | None = None
    null_sd: float | None = None
    layer_map: tuple[int, ...] = ()
    reason: str | None = None


def product_singular_values(left: Tensor, right: Tensor) -> Tensor:
    """Singular values of LᵀR for small factors L [r, m] and R [r, n], descending, float64 [min(r, m, n)].

    LᵀR = Q₁(T₁T₂ᵀ)Q₂ᵀ with Lᵀ = Q₁T₁ and Rᵀ = Q₂T₂: only products of r rows are formed. They do not change when L and R
    are rotated on the outside (a rotation of the residual stream) or multiplied by an invertible matrix and its inverse
    transpose on the inside. Raises ValueError for unequal r or non-finite values.
    """
    if left.dim() != 2 or right.dim() != 2 or left.shape[0] != right.shape[0]:
        raise ValueError(f"factors of shape {tuple(left.shape)} and {tuple(right.shape)} have no product")
    if not bool(left.isfinite().all() and right.isfinite().all()):
        raise ValueError("the factors hold non-finite values")
    small = [torch.linalg.qr(side.detach().double().T, mode="r").R for side in (left, right)]
    values: Tensor = torch.linalg.svdvals(small[0] @ small[1].T)
    return values[: min(*left.shape, *right.shape)]


def attention_spectrum(left: Tensor, right: Tensor, heads: int, kv_heads: int) -> Tensor:
    """All singular values of a layer's per-head products, sorted descending.

    `left`: the query side, `heads` blocks of rows [heads·r, d] (W_q, or W_oᵀ); `right`: the key-value side, `kv_heads`
    blocks [kv_heads·r, d] (W_k, or W_v). With grouped queries head h uses block h·kv_heads/heads. Head order is lost by
    the sorting, so permuted heads do not matter. Norms of the residual stream belong folded into the factors.
    Source: the products W_q·W_kᵀ and W_v·W_o of GhostSpec (arXiv 2511.06390), here per head.
    Raises ValueError for rows that do not divide into the heads.
    """
    if heads < 1 or kv_heads < 1 or heads % kv_heads or left.shape[0] % heads or right.shape[0] % kv_heads:
        raise ValueError(f"{left.shape[0]} and {right.shape[0]} rows are not {heads} and {kv_heads} heads")
    queries, keys = left.chunk(heads), right.chunk(kv_heads)
    values = [product_singular_values(query, keys[number * kv_heads // heads]) for number, query in enumerate(queries)]
    return torch.cat(values).sort(descending=True).values


def spectrum_features(*spectra: Tensor) -> Tensor:
    """Description of one layer [QUANTILES · spectra] that no factor changes: quantiles of the logs less their mean.

    Values below 1e-6 of the largest count as that much. A zero spectrum gives zeros.
    """
    features = []
    for values in spectra:
        largest = float(values.max()) if values.numel() else 0.0
        if largest <= 0:
            features.append(torch.zeros(QUANTILES, dtype=torch.float64))
            continue
        logs = (values.double() / largest).clamp(min=1e-6).log().cpu()
        points = (torch.arange(QUANTILES, dtype=torch.float64) + 0.5) / QUANTILES
        described = torch.quantile(logs, points)
        features.append(described - described.mean())
    return torch.cat(features)


def compare_spectra(a: Sequence[Tensor], b: Sequence[Tensor]) -> SpectrumComparison:
    """Are the spectra of two models nearer to each other than layers of one model are, and do they vary alike?

    `a`, `b`: `spectrum_features` of each layer in order of depth.

    1. `ratio`: each layer of a against its nearest in b, over the distance of nearest layers within a model. About 1 or
       more for independent models, far below for copies, in any basis. It needs two layers on both sides.
    2. `similarity`: from every feature its quadratic trend over relative depth is removed, since all models trend
       alike; then the mean correlation over aligned layers. Models of equal depth are aligned one to one, others by the
       best monotone map (dynamic programming). It is compared with the same after every cyclic shift of b's layers,
       each aligned anew, so the search is part of the comparison. It needs 8 layers on both sides.

    Null hypothesis: spectra of independent models differ as much as those of different layers, and what is left after
    detrending has no order in common. Neither is exact: spectra follow from recipe, width and depth, the more closely
    the wider the model, and neighbouring layers resemble each other, so that shifts are no independent draws. It is a
    triage, which never decides alone. No permutation, rotation or new vocabulary hides from it; pruning and much
    further training do. Source: GhostSpec (arXiv 2511.06390) for the products; ratio, detrending and shifts are this
    suite's.
    Raises ValueError for features that are not finite.
    """
    layers = (len(a), len(b))
    if min(layers) < 2:
        return SpectrumComparison(layers, reason=f"{min(layers)} layers with attention; need 2")
    plain = [torch.stack(list(side)).double() for side in (a, b)]
    if not all(bool(side.isfinite().all()) for side in plain):
        raise ValueError("the features are not finite")
    distance = float(_distances(plain[0], plain[1]).amin(1).median())
    own = max(float(_distances(side, side).fill_diagonal_(math.inf).amin(1).median()) for side in plain)
    level = (distance / own if own > 0 else None, distance, own)
    if min(layers) < MINIMUM_LAYERS:
        reason = f"{min(layers)} layers; need {MINIMUM_LAYERS} to compare with shifted ones"
        return SpectrumComparison(layers, *level, reason=reason)
    rest = [_unit_rows(_detrended(side)) for side in plain]
    if any(float(side.abs().sum()) == 0 for side in rest):
        reason = "the spectra follow a smooth trend over depth in one of the models"
        return SpectrumComparison(layers, *level, reason=reason)
    cosines = rest[0] @ rest[1].T
    similarity, aligned = _align(cosines)
    null = torch.tensor([_align(cosines.roll(shift, 1))[0] for shift in range(1, layers[1])])
    mean, sd = float(null.mean()), float(null.std())
    z = (similarity - mean) / sd if sd > 1e-12 else None
    rank = (1 + int((null >= similarity).sum())) / layers[1]
    return SpectrumComparison(layers, *level, similarity, z, rank, mean, sd, tuple(aligned))


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Rms difference of every feature row of a from every one of b, [layers of a, layers of b]."""
    return torch.stack([(b - row).square().mean(1).sqrt() for row in a])


def _detrended(features: Tensor) -> Tensor:
    """Features [layers, f] less the least-squares parabola of each over relative depth."""
    depth = torch.linspace(-1, 1, features.shape[0], dtype=features.dtype)
    basis = torch.linalg.qr(torch.stack([torch.ones_like(depth), depth, depth.square()], 1)).Q
    rest = features - basis @ (basis.T @ features)
    return torch.where(rest.abs() > 1e-9 * features.abs().max(), rest, 0.0)


def _unit_rows(rows: Tensor) -> Tensor:
    norms = rows.norm(dim=1, keepdim=True)
    return torch.where(norms > 0, rows / norms, 0.0)


def _align(cosines: Tensor) -> tuple[float, list[int]]:
    """Mean cosine of the best non-decreasing map of a's layers to b's, and the map; one to one for equal depths."""
    rows, columns = cosines.shape
    if rows == columns:
        return float(cosines.diagonal().mean()), list(range(rows))
    totals, choices = cosines[0].clone(), []
    for row in range(1, rows):
        best = torch.cummax(totals, 0)
        choices.append(best.indices)
        totals = best.values + cosines[row]
    value, last = totals.max(0)
    path = [int(last)]
    for indices in reversed(choices):
        path.append(int(indices[path[-1]]))
    return float(value) / rows, path[::-1]
