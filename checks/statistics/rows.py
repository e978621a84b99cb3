"""Two embedding tables whose rows are paired by token: do the rows of equal tokens resemble each other?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from checks.statistics.channels import ChannelProducts, channel_permutation_test


@dataclass(frozen=True)
class RowSimilarity:
    """Result of `row_similarity`; what cannot be computed is None, and `reason` says why.

    `tokens`: pairs of rows used. `width_a`, `width_b`: columns of each table. `cosine`: mean centred cosine of paired
    rows, in [-1, 1]; None for different widths. `channel_z`, `channel_effect`: exact test over the channels; None for
    different widths. `token_z`: test over the tokens, descriptive; None for different widths. `cka`: unbiased linear
    CKA, in [-1, 1]. `aligned_cosine`: mean cosine of the rows that the alignment was not fitted on, after it;
    `residual`: their relative residual, 0 to about 2; None with too few tokens. `fitted`: tokens on which it was
    fitted.
    """

    tokens: int
    width_a: int
    width_b: int
    cosine: float | None = None
    channel_z: float | None = None
    channel_effect: float | None = None
    token_z: float | None = None
    cka: float | None = None
    aligned_cosine: float | None = None
    residual: float | None = None
    fitted: int = 0
    seed: int = 0
    reason: str | None = None


def row_similarity(rows_a: Tensor, rows_b: Tensor, seed: int = 0, align: bool = True) -> RowSimilarity:
    """How alike are two tables [n, d_a] and [n, d_b] whose rows belong to the same n tokens?

    Rows that are zero on either side (unused tokens) are left out; then each table's mean row is subtracted.

    1. `cosine` = mean over tokens of aᵢ·bᵢ / (‖aᵢ‖‖bᵢ‖), for equal widths. Documented: tutorial-qa.md, "Embedding
       Cosine Sim": above .98 fine-tuned, below .1 from scratch.
       Null hypothesis: independent training, which makes the residual channels exchangeable: `channel_z` is the exact
       permutation test of `ChannelProducts` on the tables transposed and decides. `token_z` shuffles the pairs instead.
       It is no test of independence, since tokens are not exchangeable (frequent tokens differ from rare ones in any
       two models, and two tables share that axis up to a chance angle): it is large for many independent pairs.
       Blind to a permuted or rotated residual stream, and to other widths.
    2. `aligned_cosine`: an orthogonal map (Schönemann 1966, A generalized solution of the orthogonal Procrustes
       problem; with orthonormal rows or columns for different widths) from a to b is fitted on a random half of the
       tokens, and the other half is compared: 1 for rotated or permuted copies. It needs twice as many fitted tokens
       as the smaller width. `residual` = ‖sAR - B‖²/‖B‖² of the same rows, s being the best scale of the fitted half.
    3. `cka`: unbiased linear CKA (Song et al. 2012, JMLR 13, eq. 5; Kornblith et al. 2019, arXiv 1905.00414).
       2. and 3. have no exact null: independent models of one language share semantics, and both are then well above 0.
       Judge them against the other references.

    O(n·d²) and one SVD of [d_a, d_b]; float64 sums. Raises TypeError for other than floating-point tables; ValueError
    for wrong shapes and non-finite values.
    """
    for name, rows in (("a", rows_a), ("b", rows_b)):
        if not rows.dtype.is_floating_point:
            raise TypeError(f"the table of {name} is {rows.dtype}; dequantise first")
        if rows.dim() != 2 or rows.shape[1] == 0:
            raise ValueError(f"the table of {name} has shape {tuple(rows.shape)}; need [tokens, width]")
        if not bool(rows.isfinite().all()):
            raise ValueError(f"the table of {name} holds non-finite values")
    if rows_a.shape[0] != rows_b.shape[0]:
        raise ValueError(f"the tables have {rows_a.shape[0]} and {rows_b.shape[0]} rows; need one per token in both")
    used = (rows_a != 0).any(1) & (rows_b != 0).any(1)
    a, b = (_centred(rows[used]) for rows in (rows_a.detach(), rows_b.detach()))
    tokens, widths = a.shape[0], (a.shape[1], b.shape[1])
    if tokens < 4:
        return RowSimilarity(tokens, *widths, seed=seed, reason=f"{tokens} tokens have rows that are not zero")
    for name, rows in (("a", a), ("b", b)):
        if float(rows.abs().max()) == 0:
            return RowSimilarity(tokens, *widths, seed=seed, reason=f"all rows of {name} are equal")

    cosine = channel_z = channel_effect = token_z = None
    if widths[0] == widths[1]:
        cosine = _mean_cosine(a, b)
        products = ChannelProducts(widths[0], a.device)
        products.add(a.T, b.T)
        test = products.test()
        channel_z, channel_effect = test.z, test.effect
        # The same test with tokens in the place of channels.
        token_z = channel_permutation_test([a], [b]).z
    aligned = _align(a, b, seed) if align else None
    return RowSimilarity(
        tokens,
        *widths,
        cosine,
        channel_z,
        channel_effect,
        token_z,
        unbiased_linear_cka(a, b),
        aligned_cosine=aligned[0] if aligned else None,
        residual=aligned[1] if aligned else None,
        fitted=tokens // 2 if aligned else 0,
        seed=seed,
        reason=None
        if aligned or not align
        else f"{tokens} tokens are too few to fit a map of {min(widths)} dimensions: need {4 * min(widths)}",
    )


def unbiased_linear_cka(a: Tensor, b: Tensor) -> float | None:
    """Unbiased linear CKA of features [n, d_a] and [n, d_b] of the same n examples; about 0 for unrelated features.

        HSIC(K, L) ∝ tr(K̃L̃) + 1ᵀK̃1·1ᵀL̃1/((n-1)(n-2)) - 2/(n-2)·1ᵀK̃L̃1,   K̃ = AAᵀ with zero diagonal
        CKA = HSIC(K, L) / sqrt(HSIC(K, K)·HSIC(L, L))

    Computed from the features: the [n, n] kernels are never formed. None where a kernel has no positive HSIC with
    itself. Source: Song et al. 2012, Feature selection via dependence maximization, JMLR 13, eq. 5.
    Raises ValueError for fewer than 4 examples.
    """
    if a.shape[0] != b.shape[0] or a.shape[0] < 4:
        raise ValueError(f"need the same examples, at least 4, got {a.shape[0]} and {b.shape[0]}")
    a, b = _centred(a), _centred(b)
    cross, own_a, own_b = _hsic(a, b), _hsic(a, a), _hsic(b, b)
    return max(-1.0, min(1.0, cross / math.sqrt(own_a * own_b))) if own_a > 0 and own_b > 0 else None


def _hsic(a: Tensor, b: Tensor) -> float:
    n = a.shape[0]
    diagonal_a, diagonal_b = a.square().sum(1), b.square().sum(1)
    sums_a, sums_b = a @ a.sum(0) - diagonal_a, b @ b.sum(0) - diagonal_b
    trace = (a.T @ b).square().sum() - diagonal_a @ diagonal_b
    return float(trace + sums_a.sum() * sums_b.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (sums_a @ sums_b))


def _centred(rows: Tensor) -> Tensor:
    """Float64 rows less their mean, scaled as a whole so that no square over- or underflows."""
    wide = rows.double()
    largest = wide.abs().max() if wide.numel() else wide.new_zeros(())
    wide = wide / largest if float(largest) > 0 else wide
    constant = (wide == wide[:1]).all(0)
    return torch.where(constant, 0.0, wide - wide.mean(0))


def _mean_cosine(a: Tensor, b: Tensor) -> float | None:
    """Mean over rows; rows that equal the mean on either side have no direction and are left out."""
    norms = a.norm(dim=1) * b.norm(dim=1)
    defined = norms > 0
    if not bool(defined.any()):
        return None
    return float(((a * b).sum(1)[defined] / norms[defined]).mean())


def _align(a: Tensor, b: Tensor, seed: int) -> tuple[float, float] | None:
    """Mean cosine and relative residual on the half of the rows that the orthogonal map was not fitted on."""
    if a.shape[0] < 4 * min(a.shape[1], b.shape[1]):
        return None
    order = torch.randperm(a.shape[0], generator=torch.Generator().manual_seed(seed)).to(a.device)
    fit, held = order[: a.shape[0] // 2], order[a.shape[0] // 2 :]
    left, singular, right = torch.linalg.svd(a[fit].T @ b[fit], full_matrices=False)
    aligned = a[held] @ left @ right
    cosine = _mean_cosine(aligned, b[held])
    square = float(b[held].square().sum())
    if cosine is None or square == 0:
        return None
    scale = float(singular.sum()) / max(float((a[fit] @ left).square().sum()), 1e-300)
    return cosine, float((scale * aligned - b[held]).square().sum()) / square
