"""Exact index test: do same-numbered hidden units of two layers resemble each other? (Zhu et al., arXiv 2502.12292)"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Fewer units have too few permutations: no p is below 1/h!, but z of a copy is h - 1 and its normal tail goes on.
LEAST_UNITS = 16
# Columns of the concatenated views that are held in float64 at a time, per model and per side of a product.
COLUMN_BLOCK = 1024
# Units whose products with each other are formed at most: 8 bytes each, 512 MiB.
LARGEST_PRODUCTS = 8192
# Square of the norm that rounding leaves of rows of norm 1 that are equal: far less than this.
ROUNDING = 1e-24
# 95 % of a standard normal variable lie above the negative of this.
ONE_SIDED_95 = 1.6448536269514722


@dataclass(frozen=True)
class UnitTest:
    """Result of `unit_permutation_test`.

    `z`: standard score of Σ(A∘B) over all permutations of the units; None if the permutations do not vary it.
    `effect`: Σ(A∘B) / (‖A‖‖B‖) in [-1, 1], the mean centred cosine of same-numbered units; None as z.
    `scale`: z / effect = ‖A‖‖B‖ / sd of Σ(A∘B), the power of the test; known also where the effect is 0; None as z.
    `units`: h. `reason`: why there is no z, else None.
    """

    z: float | None
    effect: float | None
    scale: float | None
    units: int
    reason: str | None = None


def unit_permutation_test(views_a: Sequence[Tensor], views_b: Sequence[Tensor]) -> UnitTest:
    """Do hidden units of the same number resemble each other more than units of different numbers?

    `views_a`, `views_b`: for each model the same number of floating-point matrices [h, d_i] with the h hidden units as
    rows: up [h, d], gate [h, d] and down transposed [h, d]. Within each view rows are scaled to norm 1, centred over
    the units and scaled to norm 1 again (zero rows stay zero), so that no few of them decide where the others share a
    large mean. The views are concatenated along the columns to A and B [h, D], and every column is centred once more.

        z = Σ(A∘B) / sqrt(⟨AᵀA, BᵀB⟩ / (h - 1))

    Null hypothesis: independent training. Initialisation is exchangeable over hidden units, and SGD, Adam and Muon are
    equivariant under their permutation, so every permutation of the units of one model is equally likely whatever the
    data (Zhu et al., Independence Tests for Language Models, ICML 2025, arXiv 2502.12292, theorem 1). Mean 0 and the
    variance above are exact over all h! permutations (Hoeffding 1951, A combinatorial central limit theorem, theorem
    2). The normal tail is an approximation. It holds within a factor of 3 at p = 1e-5 for 32 to 256 units of weights
    of many kinds, trained, Cauchy and clustered ones among them (benchmarks/results/permutation-tail.json). Ask for a
    minimum effect as well. Fewer than 16 units have no z: the smallest p of any permutation is 1/h!.

    Units that are zero in all views of either side (padded widths) are left out: they stand at the same end of any
    model and are no more exchangeable with the others.
    Two-sided: flipping the signs of the up and down rows of a unit together leaves the function unchanged, and makes z
    negative where all are flipped and up and down outweigh gate.
    Known false positives: whatever breaks exchangeability: structured initialisation, learning rates that depend on the
    position of a unit, and a shared seed, so a large |z| means "inherited or same initial weights".
    Blind to: a permutation of the units (that is the null hypothesis), other unit counts.

    Float64, O(h·D·min(h, D)) operations: with at most as many units as columns (and no more than 8192) the h x h matrix
    ABᵀ is formed, whose trace and squared norm are the two sums; else blocks of the D x D Gram matrices. The device is
    read twice. Raises TypeError for other than floating-point views; ValueError for no views, differing numbers of
    views, units or columns, views that are not matrices, non-finite values, and values whose squares overflow float64.
    """
    units, widths = _check_shapes(views_a, views_b)
    if units < LEAST_UNITS:
        return UnitTest(None, None, None, units, f"{units} hidden units, {LEAST_UNITS} are needed")
    views_a, views_b = _without_zero_units(views_a, views_b)
    units = views_a[0].shape[0]
    if units < LEAST_UNITS:
        reason = f"{units} hidden units are not zero on both sides, {LEAST_UNITS} are needed"
        return UnitTest(None, None, None, units, reason)
    a = _ViewBlocks(views_a)
    b = _ViewBlocks(views_b)
    _check_finite(a, b)

    blocks = [(index, start) for index, width in enumerate(widths) for start in range(0, width, COLUMN_BLOCK)]
    zero = torch.zeros((), dtype=torch.float64, device=views_a[0].device)
    dot, square_a, square_b, gram = zero.clone(), zero.clone(), zero.clone(), zero.clone()
    # Where the units are fewer than the columns, ⟨AᵀA, BᵀB⟩ = ‖ABᵀ‖² costs less.
    products = None
    if units <= min(sum(widths), LARGEST_PRODUCTS):
        products = torch.zeros(units, units, dtype=torch.float64, device=views_a[0].device)
    for number, position in enumerate(blocks):
        a_left, b_left = a.block(*position), b.block(*position)
        square_a += (a_left * a_left).sum()
        square_b += (b_left * b_left).sum()
        if products is not None:
            products.addmm_(a_left, b_left.T)
            continue
        dot += (a_left * b_left).sum()
        gram += ((a_left.T @ a_left) * (b_left.T @ b_left)).sum()
        for other in blocks[number + 1 :]:
            a_right, b_right = a.block(*other), b.block(*other)
            gram += 2 * ((a_left.T @ a_right) * (b_left.T @ b_right)).sum()
    if products is not None:
        # The norm, whose square needs no second matrix.
        dot, gram = products.diagonal().sum(), torch.linalg.vector_norm(products).square()
    dot_sum, norm_a, norm_b, gram_sum = torch.stack([dot, square_a, square_b, gram]).tolist()

    rounding = ROUNDING * units * len(widths)
    for name, square in (("a", norm_a), ("b", norm_b)):
        if square <= rounding:
            return UnitTest(None, None, None, units, f"all units of {name} are equal")
    norms = math.sqrt(norm_a) * math.sqrt(norm_b)
    if gram_sum <= 1e-12 * norms * norms:
        return UnitTest(None, None, None, units, "the units of a and b vary in different columns")
    sigma = math.sqrt(gram_sum / (units - 1))
    effect = max(-1.0, min(1.0, dot_sum / norms))
    return UnitTest(dot_sum / sigma, effect, norms / sigma, units)


def stouffer(zs: Iterable[float | None]) -> float | None:
    """Joint standard score Σz/√L of L independent tests; None entries are skipped, and None if nothing is left.

    Layers permute independently, so their z of `unit_permutation_test` are independent under the null hypothesis.
    Source: Stouffer et al. 1949, The American Soldier, vol. 1, p. 45. Raises ValueError for NaN.
    """
    scores = [z for z in zs if z is not None]
    if any(math.isnan(z) for z in scores):
        raise ValueError("a standard score is NaN")
    return math.fsum(scores) / math.sqrt(len(scores)) if scores else None


def two_sided_log_p(z: float) -> float:
    """Natural logarithm of P(|Z| ≥ |z|) for standard normal Z: ln 2 + ln Φ(-|z|).

    `torch.special.log_ndtr` in float64 keeps full relative precision where the p-value itself underflows (z = 500 gives
    -125006.44). Raises ValueError for NaN.
    """
    if math.isnan(z):
        raise ValueError("a standard score is NaN")
    log_tail = float(torch.special.log_ndtr(torch.tensor(-abs(z), dtype=torch.float64)))
    return min(0.0, math.log(2) + log_tail)


def critical_z(alpha: float, tests: int) -> float:
    """Two-sided critical |z| of each of `tests` tests at joint level `alpha`, after Bonferroni.

    Φ⁻¹(1 - alpha/(2·tests)) of the standard normal distribution, by `torch.special.ndtri` of the lower tail in float64.

    Raises ValueError unless 0 < alpha < 1 and tests ≥ 1.
    """
    if not 0 < alpha < 1 or tests < 1:
        raise ValueError(f"need 0 < alpha < 1 and tests >= 1, not alpha = {alpha} and tests = {tests}")
    return -float(torch.special.ndtri(torch.tensor(alpha / (2 * tests), dtype=torch.float64)))


@dataclass(frozen=True)
class CombinedUnitTest:
    """The unit permutation tests of a model's MLPs as one test.

    `z`: Stouffer's joint score. `log_p`: natural logarithm of its two-sided p-value. `effect`: mean of the effects,
    weighted by their scales, so that z = effect · Σ scale / √tests. `tests`: how many independent observations had a z.
    """

    z: float
    log_p: float
    effect: float
    tests: int
    total_scale: float

    def detectable_effect(self, critical_z: float) -> float:
        """Smallest effect that, in every MLP, takes the joint score to `critical_z` in 95 of 100 cases.

        (critical_z + 1.645)·√tests / Σ scale; above 1 there is no power.
        """
        return (critical_z + ONE_SIDED_95) * math.sqrt(self.tests) / self.total_scale


@dataclass(frozen=True)
class UnitTests:
    """All unit permutation tests of a pair of models.

    `joint`: over all MLPs together, for all views and for the gates alone. `single`: of each MLP, by name. `coverage`:
    share of the candidate's MLP elements that were tested, 0 to 1, of `elements`. `mapped`: as `joint`, over MLPs in
    other places that belong together by what no renumbering of units changes, so that the null holds for them as well.
    A correction counts every one of them.
    """

    joint: tuple[CombinedUnitTest, ...]
    single: tuple[tuple[str, UnitTest], ...]
    coverage: float
    mapped: tuple[CombinedUnitTest, ...] = ()
    elements: int = 0

    @property
    def joint_tests(self) -> int:
        """How many joint tests were made."""
        return len(self.joint) + len(self.mapped)

    @property
    def tests(self) -> int:
        """How many tests were made."""
        return self.joint_tests + len(self.single)

    @property
    def strongest_joint(self) -> CombinedUnitTest:
        """The joint test with the largest |z|."""
        return max((*self.joint, *self.mapped), key=lambda test: abs(test.z))

    @property
    def strongest_single(self) -> tuple[str, UnitTest] | None:
        """The MLP with the largest |z|."""
        return max(self.single, key=lambda one: abs(one[1].z or 0.0), default=None)


def as_one_observation(tests: Iterable[UnitTest]) -> UnitTest | None:
    """The tests of MLPs that may be copies of each other, as the experts of a layer may, as one; None without any z.

        z = mean of the z; scale = mean of the scales; effect = Σ scale·effect / Σ scale, so that z = effect · scale

    Experts that were made from one dense MLP follow the same permutation, and so does z of all of them if both models
    were made that way: their sum is then as wide as their number, not its square root. The mean has a variance of at
    most 1 under any correlation (Cauchy and Schwarz), so that the result is conservative for independent experts, and
    exact for a single one. `units`: of all of them.
    """
    defined = [test for test in tests if test.z is not None]
    if not defined:
        return None
    z, scale, effect = _totals(defined)
    count = len(defined)
    return UnitTest(z / count, effect, scale / count, sum(test.units for test in defined))


def combine(tests: Iterable[UnitTest]) -> CombinedUnitTest | None:
    """Combine the tests of independent MLPs of a pair, one or more for each layer; None when none of them has a z.

    Exact for dense MLPs; the experts of a layer have to be put together before, see `as_one_observation`.
    Source: Stouffer et al. 1949, as in `stouffer`.
    """
    defined = [test for test in tests if test.z is not None]
    z = stouffer(test.z for test in defined)
    if z is None:
        return None
    _, total, effect = _totals(defined)
    return CombinedUnitTest(z, two_sided_log_p(z), effect, len(defined), total)


def _totals(defined: Sequence[UnitTest]) -> tuple[float, float, float]:
    """Σ z, Σ scale and Σ scale·effect / Σ scale of tests that have a z."""
    total = math.fsum(test.scale or 0.0 for test in defined)
    effect = math.fsum((test.scale or 0.0) * (test.effect or 0.0) for test in defined) / total
    return math.fsum(test.z or 0.0 for test in defined), total, effect


def _without_zero_units(
    views_a: Sequence[Tensor], views_b: Sequence[Tensor]
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The views less the units that are zero throughout on either side: padding stands at the same end of any model."""
    used = torch.ones(views_a[0].shape[0], dtype=torch.bool, device=views_a[0].device)
    for views in (views_a, views_b):
        used &= torch.stack([(view != 0).any(1) for view in views]).any(0)
    if bool(used.all()):
        return views_a, views_b
    return [view[used] for view in views_a], [view[used] for view in views_b]


class _ViewBlocks:
    """Column blocks of the views with rows of equal norm about their mean, built in float64 when they are asked for."""

    def __init__(self, views: Sequence[Tensor]) -> None:
        self.views = [view.detach() for view in views]
        self.squares = [
            torch.stack([x.double().square().sum(1) for x in torch.split(view, COLUMN_BLOCK, 1)]).sum(0)
            for view in self.views
        ]
        self._used = [(square > 0)[:, None] for square in self.squares]
        self._counts = [used.sum().clamp_min(1) for used in self._used]
        self._scales = [torch.where(square > 0, square.rsqrt(), 0.0)[:, None] for square in self.squares]
        self._centred_scales: list[Tensor] = []
        for index, view in enumerate(self.views):
            starts = range(0, view.shape[1], COLUMN_BLOCK)
            squares = torch.stack([self._centred(index, start).square().sum(1) for start in starts]).sum(0)
            self._centred_scales.append(torch.where(squares > ROUNDING, squares.rsqrt(), 0.0)[:, None])

    def _centred(self, index: int, start: int) -> Tensor:
        rows = self.views[index][:, start : start + COLUMN_BLOCK].double() * self._scales[index]
        return torch.where(self._used[index], rows - rows.sum(0) / self._counts[index], 0.0)

    def block(self, index: int, start: int) -> Tensor:
        rows = self._centred(index, start) * self._centred_scales[index]
        return rows - rows.mean(0)


def _check_shapes(views_a: Sequence[Tensor], views_b: Sequence[Tensor]) -> tuple[int, list[int]]:
    """Number of units and width of each view."""
    if not views_a or len(views_a) != len(views_b):
        raise ValueError(f"need the same views of both models, got {len(views_a)} and {len(views_b)}")
    for index, (a, b) in enumerate(zip(views_a, views_b, strict=True)):
        if not a.dtype.is_floating_point or not b.dtype.is_floating_point:
            raise TypeError(f"view {index} is {a.dtype} and {b.dtype}; dequantise first")
        if a.dim() != 2 or a.shape != b.shape or a.shape[0] != views_a[0].shape[0] or a.shape[1] == 0:
            raise ValueError(
                f"view {index} has shapes {tuple(a.shape)} and {tuple(b.shape)}; need equal matrices [units, columns] "
                f"with {views_a[0].shape[0] if views_a[0].dim() else 0} units and at least one column"
            )
    return views_a[0].shape[0], [view.shape[1] for view in views_a]


def _check_finite(a: _ViewBlocks, b: _ViewBlocks) -> None:
    flags = torch.stack([square.isfinite().all() for square in a.squares + b.squares]).tolist()
    for number, finite in enumerate(flags):
        if not finite:
            index, name = number % len(a.squares), "a" if number < len(a.squares) else "b"
            raise ValueError(f"view {index} of {name} holds non-finite values (or too large to square in float64)")
