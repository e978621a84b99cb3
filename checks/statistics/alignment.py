"""Two residual streams in a common basis, found by common tokens, and what their layers read there (T3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Directions of the common basis in which layers are compared.
DIRECTIONS = 512
# Pairs of layers this near to a mapped pair are no null: neighbouring layers resemble each other.
BAND = 1
# Wider streams are decomposed in float32.
LARGEST_DOUBLE = 1024
# Fewer mismatched pairs of layers than this have no standard deviation worth the name.
LEAST_MISMATCHED = 6


@dataclass(frozen=True)
class CommonBasis:
    """Orthonormal directions [d_a, k] and [d_b, k] of two residual streams that common tokens pair.

    `tokens`: rows they were fitted on. `rank`: dimensions among which the k directions lie.
    """

    a: Tensor
    b: Tensor
    tokens: int
    rank: int


@dataclass(frozen=True)
class AlignmentTest:
    """Result of `alignment_test`, for unbiased CKA (`plain`) and for CKA less what all layers share (`centred`).

    `level`: median over mapped pairs of layers. `mismatched`, `sd`: mean and standard deviation over pairs of layers
    that are more than one layer off the map; `z` = (level - mismatched) / sd. `per_layer`: of each mapped pair.
    `count`: mismatched pairs. None where there are too few, and `reason` says why.
    """

    level: float | None
    z: float | None
    mismatched: float | None
    sd: float | None
    plain_level: float | None
    plain_mean: float | None
    plain_z: float | None
    per_layer: Mapping[int, float]
    count: int
    reason: str | None = None


@dataclass(frozen=True)
class Transform:
    """Which change of basis takes one table of rows to another.

    `kind`: identity, sign flips, permutation, signed permutation, rotation, projection (other width), none (no linear
    map takes one to the other), or unknown (nothing simpler than a rotation, and too few rows to fit one). `cosines`:
    mean cosine of rows that the map was not fitted on, for the identity (equal widths only), the best signed
    permutation and the best rotation. `rows`: how many pairs there were.
    """

    kind: str
    cosines: Mapping[str, float]
    rows: int

    @property
    def cosine(self) -> float:
        """The largest of the cosines."""
        return max(self.cosines.values(), default=0.0)


# A map that leaves less than this of held-out rows alike is named "none". On the setting half of the lineage zoo
# inherited embeddings reach 0.70 and more (of two averaged models; trained on as long as a base 0.80, fine-tuned 0.98).
# Tokens mean much the same in independent models: these reach 0.40, and a distilled student 0.52 with its teacher.
LEAST_COSINE = 0.6
# The simplest map is named whose cosine comes this near to the best one.
TOLERANCE = 0.1


def common_basis(rows_a: Tensor, rows_b: Tensor, directions: int = DIRECTIONS, seed: int = 0) -> CommonBasis:
    """Directions of both streams that belong together, from rows [n, d_a] and [n, d_b] of the same n tokens.

    Singular vectors of A'ᵀB', the tables less their mean rows: the orthogonal map PQᵀ of least squares is the same
    for every rotation of either stream (Schönemann 1966; for other widths it maps the smaller stream into the larger).
    Only the min(d_a, d_b, n/4) leading pairs of vectors are used, since few tokens determine no more. At most
    `directions` random orthonormal combinations (`seed`) of them are returned, the same of both sides.
    Raises ValueError for fewer than 8 rows, different numbers of rows, and non-finite values.
    """
    _check_tables(rows_a, rows_b)
    count = rows_a.shape[0]
    if count < 8:
        raise ValueError(f"{count} rows determine no common basis")
    left, _, right = torch.linalg.svd(_centred(rows_a).T @ _centred(rows_b), full_matrices=False)
    rank = min(left.shape[1], count // 4)
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(rank, min(directions, rank), dtype=torch.float64, generator=generator)
    combinations = torch.linalg.qr(mixed.to(left))[0]
    return CommonBasis(left[:, :rank] @ combinations, right[:rank].T @ combinations, count, rank)


def kernel(weights: Tensor, directions: Tensor) -> Tensor:
    """What a reader [out, d] of the residual stream does along common directions [d, k]: a centred kernel of norm 1.

    K = (WV)ᵀ(WV) with zero diagonal, made free of bias as HSIC is: with m = colsum(K)/(k - 2), then
    m -= Σm/(2(k - 1)), K -= m1ᵀ + 1mᵀ, and zero diagonal again. The inner product of two kernels is their unbiased CKA
    (Song et al. 2012, JMLR 13; Székely and Rizzo 2014, Annals of Statistics 42, section 2). A zero kernel stays zero.
    Returns [k, k] float32. Raises ValueError for fewer than 4 directions and non-finite weights.
    """
    size = directions.shape[1]
    if size < 4:
        raise ValueError(f"{size} directions are too few for an unbiased kernel")
    if not bool(weights.isfinite().all()):
        raise ValueError("a reader holds non-finite values")
    seen = weights.to(directions.dtype) @ directions
    product = seen.T @ seen
    product.fill_diagonal_(0)
    means = product.sum(0) / (size - 2)
    means = means - means.sum() / (2 * (size - 1))
    product = product - means - means[:, None]
    product.fill_diagonal_(0)
    norm = product.norm()
    return torch.where(norm > 0, product / norm.clamp_min(torch.finfo(product.dtype).tiny), 0.0).float()


def layer_similarities(kernels_a: Tensor, kernels_b: Tensor) -> tuple[Tensor, Tensor]:
    """Unbiased CKA of every layer of a with every layer of b, [L_a, L_b]: as it is, and less what all layers share.

    `kernels_a` [L_a, k, k], `kernels_b` [L_b, k, k]: of one part, layer by layer. For the second table each model's
    mean kernel over its layers is subtracted first. In trained models all layers read some directions more than others,
    and so do those of any independent model; what is particular to a layer is only inherited.
    """
    flat_a, flat_b = kernels_a.flatten(1).double(), kernels_b.flatten(1).double()
    own_a, own_b = (_unit(flat - flat.mean(0)) for flat in (flat_a, flat_b))
    return flat_a @ flat_b.T, own_a @ own_b.T


def alignment_test(
    tables: Sequence[tuple[Tensor, Tensor]], mapped: Mapping[int, int], band: int = BAND
) -> AlignmentTest:
    """Do layers that belong together resemble each other more, in the common basis, than layers that do not?

    `tables`: `layer_similarities` of each part (queries, keys, values), averaged here. `mapped`: row to column.
    z compares the median of the mapped pairs with all pairs more than `band` layers off the map: the median, because
    the first layers of independent models, which read the same tokens, have a CKA of 0.1 to 0.4.

    Null hypothesis: independent training on any data. It is no exact null: judge the level against the panel.
    Measured on the setting half of the lineage zoo: of plain CKA the z of independent and of derived pairs overlap,
    and the level tells them apart; of centred CKA both do.
    Blind to: embeddings that were replaced; no test for fewer than 4 layers.
    """
    if not tables or not mapped:
        return AlignmentTest(None, None, None, None, None, None, None, {}, 0, "no part is common to mapped layers")
    plain = torch.stack([table[0] for table in tables]).mean(0)
    centred = torch.stack([table[1] for table in tables]).mean(0)
    on = torch.tensor(sorted(mapped.items()))
    partner = torch.full((plain.shape[0],), -1)
    partner[on[:, 0]] = on[:, 1]
    offsets = (torch.arange(plain.shape[1]) - partner[:, None]).abs()
    off = (offsets > band) & (partner >= 0)[:, None]
    matched, plainly = centred[on[:, 0], on[:, 1]], plain[on[:, 0], on[:, 1]]
    per_layer = dict(zip(on[:, 0].tolist(), matched.tolist(), strict=True))
    level, plain_level = float(matched.median()), float(plainly.median())
    count = int(off.sum())
    if count < LEAST_MISMATCHED:
        reason = f"{count} pairs of layers are mismatched, {LEAST_MISMATCHED} are needed"
        return AlignmentTest(
            level, None, None, None, plain_level, float(plainly.mean()), None, per_layer, count, reason
        )
    mean, spread = float(centred[off].mean()), float(centred[off].std())
    plain_spread = float(plain[off].std())
    return AlignmentTest(
        level,
        (level - mean) / spread if spread > 0 else None,
        mean,
        spread,
        plain_level,
        float(plainly.mean()),
        (float(plainly.mean()) - float(plain[off].mean())) / plain_spread if plain_spread > 0 else None,
        per_layer,
        count,
    )


def seen_transform(rows_a: Tensor, rows_b: Tensor, seed: int = 0) -> Transform:
    """Which change of basis takes rows [n, d_a] to rows [n, d_b] that belong together: token by token, or neuron.

    Each map is fitted on a random half of the rows, less their mean, and judged on the others by their mean cosine: the
    identity, the signed permutation of columns of largest correlation (by assignment), and the orthogonal map of least
    squares (with orthonormal rows or columns for other widths). Named is the simplest one within 0.1 of the best, if
    that reaches 0.6; a rotation needs four rows for each dimension of the smaller width. A permutation of which no
    column moves is an identity, or sign flips.
    Raises ValueError for fewer than 8 rows, different numbers of rows, and non-finite values.
    """
    _check_tables(rows_a, rows_b)
    count = rows_a.shape[0]
    if count < 8:
        raise ValueError(f"{count} rows show no change of basis")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).to(rows_a.device)
    fit, held = order[: count // 2], order[count // 2 :]
    a, b = _centred(rows_a), _centred(rows_b)
    cosines = {}
    if a.shape[1] == b.shape[1]:
        cosines["identity"] = _mean_cosine(a[held], b[held])
    kept, taken, signs = signed_permutation(a[fit], b[fit])
    cosines["permutation"] = _mean_cosine(a[held][:, kept] * signs, b[held][:, taken])
    left, _, right = torch.linalg.svd(a[fit].T @ b[fit], full_matrices=False)
    cosines["rotation"] = _mean_cosine(a[held] @ left, b[held] @ right.T)
    best = max(cosines.values())
    is_square = a.shape[1] == b.shape[1]
    moved = bool((kept != taken).any()) if is_square else True
    flipped = bool((signs < 0).any())
    if best < LEAST_COSINE:
        kind = "none" if len(fit) >= 2 * min(a.shape[1], b.shape[1]) else "unknown"
    elif cosines.get("identity", -1.0) >= best - TOLERANCE:
        kind = "identity"
    elif cosines["permutation"] >= best - TOLERANCE:
        kind = {
            (False, False): "identity",
            (False, True): "sign flips",
            (True, False): "permutation",
            (True, True): "signed permutation",
        }[moved, flipped]
    else:
        kind = "rotation" if is_square else "projection"
    return Transform(kind, cosines, count)


def signed_permutation(rows_a: Tensor, rows_b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Columns of a, columns of b, and signs, that belong together: the assignment of the largest |correlation|.

    For rows [n, d_a] and [n, d_b] that belong together; min(d_a, d_b) columns of each are paired.
    Source: AWM, arXiv 2510.06738, section 3 (linear assignment and signs on common tokens).
    """
    from checks.statistics.assignment import best_assignment

    correlations = _unit(_centred(rows_a).T) @ _unit(_centred(rows_b).T).T
    pairs = best_assignment(correlations.abs())
    kept, taken = pairs.rows.to(rows_a.device), pairs.columns.to(rows_a.device)
    signs = torch.where(correlations[kept, taken] < 0, -1.0, 1.0).to(rows_a)
    return kept, taken, signs


def _check_tables(rows_a: Tensor, rows_b: Tensor) -> None:
    for name, rows in (("a", rows_a), ("b", rows_b)):
        if rows.dim() != 2 or rows.shape[1] == 0 or not rows.dtype.is_floating_point:
            raise ValueError(f"the rows of {name} are {rows.dtype} {tuple(rows.shape)}; need floating point [n, width]")
        if not bool(rows.isfinite().all()):
            raise ValueError(f"the rows of {name} hold non-finite values")
    if rows_a.shape[0] != rows_b.shape[0]:
        raise ValueError(f"the tables have {rows_a.shape[0]} and {rows_b.shape[0]} rows; need one for each token")


def _centred(rows: Tensor) -> Tensor:
    """Rows less their mean; float64 where that costs little."""
    wide = rows.detach().to(torch.float64 if rows.shape[1] <= LARGEST_DOUBLE else torch.float32)
    return wide - wide.mean(0)


def _unit(rows: Tensor) -> Tensor:
    """Rows of norm 1; what is zero up to rounding is zero."""
    norms = rows.norm(dim=1, keepdim=True)
    smallest = 4 * torch.finfo(rows.dtype).eps * (norms.amax() if norms.numel() else 0)
    return torch.where(norms > smallest, rows / norms, 0.0)


def _mean_cosine(a: Tensor, b: Tensor) -> float:
    """Mean cosine of paired rows; a row without a direction counts as 0."""
    norms = (a.norm(dim=1) * b.norm(dim=1)).clamp_min(torch.finfo(a.dtype).tiny)
    return float(((a * b).sum(1) / norms).mean())
