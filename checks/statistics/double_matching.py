"""Double matching: do two independent ways to pair the neurons of two MLPs agree? (Zhu et al., arXiv 2502.12292)"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from checks.statistics.assignment import best_assignment

# Fewer paired neurons than this can hardly reach a critical value after correction, and the normal tail is poor.
LEAST_UNITS = 32


@dataclass(frozen=True)
class DoubleMatching:
    """Result of `double_matching`, or of several on disjoint rows (`pool`).

    `units`: paired neurons m. `agreements`: how many neurons both matchings give the same partner. `expected`: how many
    two unrelated matchings do (m / columns). `rho`: Spearman correlation of the two matchings as numberings, `z` =
    rho·√(m - 1), about standard normal for unrelated matchings. None, with a `reason`, for fewer than 2 neurons.
    """

    units: int
    agreements: int
    expected: float
    rho: float | None
    z: float | None
    seed: int = 0
    reason: str | None = None

    @property
    def agreement(self) -> float:
        """Share of the neurons to which both matchings give the same partner, 0 to 1: the effect."""
        return self.agreements / self.units if self.units else 0.0


def double_matching(
    first: Tensor, second: Tensor, first_has_sign: bool = True, second_has_sign: bool = True, seed: int = 0
) -> DoubleMatching:
    """Do the pairs of neurons that `first` favours also stand out in `second`?

    `first`, `second`: similarities [n, m] of the n neurons of one MLP with the m of another, by two readings that share
    no weight: what the gate and what the up projection answers to the same probes, or reading and writing. Where a
    reading's sign is free, its similarities count by size: negating up and down weights of a neuron changes nothing.

    Each reading is matched by assignment, π₁ and π₂. Of two unrelated matchings about n/max(n, m) pairs agree, Poisson
    distributed; rho, Spearman's correlation of π₁ and π₂, has standard deviation 1/√(units - 1). Agreement is the same
    evidence without the noise of the numbering: over random numberings of the columns rho has mean ≈ the share that
    agrees, so that agreement shows a hundred of a thousand neurons where rho shows nothing.

    Null hypothesis: independent training makes π₁ and π₂ unrelated. This is no exact null: readings of one MLP share
    structure (rare tokens, hubs), so compare with blocks that do not belong together (`MatchingTest`).
    Source: Zhu et al., Independence Tests for Language Models, ICML 2025, arXiv 2502.12292, section 3.3 (MATCH).
    Blind to: nothing that keeps the rows and their readings; neurons that were retrained beyond recognition.

    Columns are shuffled differently for each assignment (`seed`), so that ties never agree by position. Rows and
    columns may differ in number; the shorter side is matched whole. Raises as `best_assignment`, and ValueError for
    different shapes.
    """
    if first.shape != second.shape:
        raise ValueError(f"the similarities have shapes {tuple(first.shape)} and {tuple(second.shape)}; need the same")
    rows, columns = first.shape
    if min(rows, columns) < 2:
        reason = f"{min(rows, columns)} neurons cannot be matched"
        return DoubleMatching(min(rows, columns), 0, 0.0, None, None, seed, reason)
    if rows > columns:
        first, second, rows, columns = first.T, second.T, columns, rows
    one = _partners(first if first_has_sign else first.abs(), 2 * seed)
    other = _partners(second if second_has_sign else second.abs(), 2 * seed + 1)
    rho = spearman(one, other)
    return DoubleMatching(rows, int((one == other).sum()), rows / columns, rho, rho * math.sqrt(rows - 1), seed)


def pool(matchings: Sequence[DoubleMatching]) -> DoubleMatching:
    """Matchings of disjoint rows of the same pair of MLPs as one: counts add up, z by Stouffer, rho from z.

    Source of the joint z: Stouffer et al. 1949. Raises ValueError for no matchings.
    """
    if not matchings:
        raise ValueError("no matchings to pool")
    defined = [one for one in matchings if one.z is not None]
    if not defined:
        return matchings[0]
    units = sum(one.units for one in defined)
    z = math.fsum(one.z for one in defined if one.z is not None) / math.sqrt(len(defined))
    agreements, expected = sum(one.agreements for one in defined), math.fsum(one.expected for one in defined)
    return DoubleMatching(units, agreements, expected, z / math.sqrt(units - 1), z, defined[0].seed)


def row_similarity(a: Tensor, b: Tensor) -> Tensor:
    """Correlations [n, m] of the rows of `a` [n, p] with those of `b` [m, p]; 0 where a row is constant."""
    return centred_unit_rows(a) @ centred_unit_rows(b).T


def centred_unit_rows(rows: Tensor) -> Tensor:
    """Rows less their own mean, scaled to norm 1; a row that is constant up to rounding becomes zero."""
    centred = rows - rows.mean(1, keepdim=True)
    norms = centred.norm(dim=1, keepdim=True)
    return torch.where(norms > 8 * torch.finfo(rows.dtype).eps * rows.norm(dim=1, keepdim=True), centred / norms, 0.0)


def unit_rows(rows: Tensor) -> Tensor:
    """Rows scaled to norm 1; a row of zeros stays zero, and so does one that is zero up to rounding of its matrix.

    A row that holds NaN or infinity holds NaN, and changes no other; one whose norm overflows becomes zero.
    """
    norms = rows.norm(dim=1, keepdim=True)
    finite = torch.where(norms.isfinite(), norms, 0.0)
    smallest = torch.finfo(rows.dtype).eps * (finite.amax() if norms.numel() else 0)
    # A single division, by infinity where there is nothing to scale: the rows of an MLP are large.
    return rows / torch.where(norms > smallest, norms, torch.inf)


def spearman(one: Tensor, other: Tensor) -> float:
    """Spearman's rank correlation of two vectors without ties, in [-1, 1].

    1 - 6·Σd²/(n(n² - 1)), d being differences of ranks. Raises ValueError for fewer than 2 or different lengths.
    """
    count = one.shape[0]
    if count < 2 or one.shape != other.shape:
        raise ValueError(f"need two vectors of equal length, at least 2, got {one.shape[0]} and {other.shape[0]}")
    ranks = (one.argsort().argsort() - other.argsort().argsort()).double()
    return 1 - 6 * float(ranks.square().sum()) / (count * (count**2 - 1))


def agreement_z(agreements: int, expected: float, dispersion: float = 1.0) -> float:
    """How far a count of agreements is above what is expected, as a standard score.

    Signed root of the Poisson deviance at the count less half, over √dispersion:
        sign · sqrt(2·(k·ln(k/μ) - k + μ) / φ),  k = agreements - 1/2
    Below the score of the exact Poisson tail, by less than 0.3 where μ ≤ 1 and by 0.1 or less elsewhere (McCullagh and
    Nelder 1989, Generalized Linear Models, section 6.2.1; quasi-likelihood, chapter 9). Counts below what is expected
    have negative scores.
    Raises ValueError for a negative count, `expected` ≤ 0 or `dispersion` < 1.
    """
    if agreements < 0 or not expected > 0 or not dispersion >= 1:
        raise ValueError(f"need counts ≥ 0, expected > 0, dispersion ≥ 1: got {agreements}, {expected}, {dispersion}")
    count = max(agreements - 0.5, 0.0)
    logarithm = count * math.log(count / expected) if count > 0 else 0.0
    deviance = max(0.0, 2 * (logarithm - count + expected) / dispersion)
    return math.copysign(math.sqrt(deviance), count - expected)


def nearest_agreement(first: Tensor, second: Tensor) -> float:
    """Share of rows whose nearest column is the same in both similarities [n, m]; 0 for no rows.

    A quick stand-in for `double_matching` where both sides have one basis: 1/m for unrelated blocks, about 1 for a
    block and its copy.
    """
    if first.numel() == 0:
        return 0.0
    return float((first.argmax(1) == second.abs().argmax(1)).double().mean())


def _partners(similarity: Tensor, seed: int) -> Tensor:
    """The column assigned to each row; the columns are shuffled first and their numbers restored after."""
    order = torch.randperm(similarity.shape[1], generator=torch.Generator().manual_seed(seed))
    return order[best_assignment(similarity[:, order.to(similarity.device)]).columns]
