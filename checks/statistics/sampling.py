"""The cosine of a tensor or a layer of which only some blocks were read: estimate, interval, and what stays unseen.

Of each tensor the first and the last block are read, and a simple random sample without replacement of those between:
a stratified design, one stratum for each tensor. A change that is spread over a tensor is measured well by a tenth of
it; one that is confined to a few rows is met by a sample, or not. So a sample never says that two tensors are equal,
and states how much it may have missed.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from checks.statistics.student import t_quantile

if TYPE_CHECKING:
    from checks.statistics.elementwise import ElementwiseSums

CONFIDENCE = 0.95
# Fewer random blocks than these give no interval.
LEAST_DRAWN = 6
# A sample of heavy tails shows too little of them: its skewness and excess kurtosis count so many times.
SKEWNESS_FACTOR, EXCESS_FACTOR = 1.5, 2.0
# A block of fewer elements may reach a cosine of 0.1 by chance: five standard deviations of 1/sqrt(n).
TELLING_ELEMENTS = 2500

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class BlockDesign:
    """Which blocks of a tensor are read: the first, the last, and `drawn` of those between, at random.

    `elements`: of the tensor, 1 or more. `block`: elements of a block; the last one may be shorter. The same design
    draws the same blocks on every machine. Raises ValueError for sizes that do not fit each other.
    """

    elements: int
    block: int
    drawn: int
    seed: int

    def __post_init__(self) -> None:
        if self.elements < 1 or self.block < 1 or not 0 <= self.drawn <= self.between:
            raise ValueError(
                f"{self.drawn} blocks of {self.block} elements cannot be drawn from a tensor of {self.elements}"
            )

    @property
    def blocks(self) -> int:
        """Blocks of the tensor."""
        return -(-self.elements // self.block)

    @property
    def between(self) -> int:
        """Blocks between the first and the last."""
        return max(0, self.blocks - 2)

    @property
    def elements_read(self) -> int:
        """Elements in the blocks that are read."""
        whole = (min(1, self.blocks - 1) + self.drawn) * self.block
        return whole + self.elements - (self.blocks - 1) * self.block

    def ranges(self) -> list[tuple[int, int]]:
        """The blocks that are read, in order, as elements [start, stop)."""
        drawn = random.Random(self.seed).sample(range(1, 1 + self.between), self.drawn)
        return [
            (block * self.block, min(self.elements, (block + 1) * self.block))
            for block in sorted({0, self.blocks - 1, *drawn})
        ]

    def unseen_blocks(self, confidence: float = CONFIDENCE) -> int:
        """The most blocks that a change may be confined to and still be missed with probability above 1 - confidence.

        A change in c of the N blocks between first and last is missed by n drawn ones with the hypergeometric
        probability C(N - c, n) / C(N, n). 0 when all blocks are read.
        """

        def log_missed(changed: int) -> float:
            rest = self.between - self.drawn
            if changed > rest:
                return -math.inf
            return sum(
                sign * math.lgamma(1 + count)
                for sign, count in (
                    (1, self.between - changed),
                    (1, rest),
                    (-1, rest - changed),
                    (-1, self.between),
                )
            )

        low, high = 0, self.between - self.drawn
        while low < high:
            middle = (low + high + 1) // 2
            if log_missed(middle) > math.log1p(-confidence):
                low = middle
            else:
                high = middle - 1
        return low


@dataclass(frozen=True, slots=True)
class CosineEstimate:
    """What a sample of blocks says of the centred cosine of one tensor, or of a weighted mean over several.

    `cosine`: the estimate, -1 to 1; None if a side is constant as far as it was read. `variance`, `third`: second and
    third central moment of its sampling error. `freedom`: degrees of freedom of `variance`. `blocks`, `blocks_read`,
    `drawn`: there are, were read, were read at random. `drawn_equal`: every random block is equal on both sides.
    `drawn_share`, `block`: share of the blocks between first and last that was drawn, and elements of a block (of
    several tensors the least share and the largest block). `unseen_elements`: a change confined to so many elements is
    missed with probability above .05. `strongest_block`: the largest |cosine| of one block of 2500 elements or more
    that was read, which shows a reuse confined to blocks where the mean would not; None if there is no such block.
    """

    cosine: float | None
    variance: float
    third: float
    freedom: float
    blocks: int
    blocks_read: int
    drawn: int
    elements: int
    elements_read: int
    drawn_equal: bool
    drawn_share: float
    block: int
    unseen_elements: int
    strongest_block: float | None

    @property
    def is_complete(self) -> bool:
        """Was every block read? The cosine is then no estimate."""
        return self.blocks_read == self.blocks

    @property
    def unseen_share(self) -> float:
        """Which share of all elements `unseen_elements` are, 0 to 1."""
        return self.unseen_elements / self.elements if self.elements else 0.0

    @property
    def no_interval(self) -> str | None:
        """Why there is no interval; None if there is one."""
        if self.cosine is None:
            return "one side is constant as far as it was read"
        if self.is_complete:
            return None
        if self.drawn_equal:
            return "every random block is equal on both sides: how much the others differ cannot be told"
        if self.drawn < LEAST_DRAWN or not math.isfinite(self.variance):
            return f"{self.drawn} random blocks were read, expected {LEAST_DRAWN} or more, two of each tensor"
        return None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Confidence interval (.95) of the cosine of all elements; None where `no_interval` gives the reason.

        The union of two, so that a heavy tail that the sample shows widens it: the t-interval of Fisher's z = atanh(r),
        whose degrees of freedom 2V²/Var(V) take the sample's kurtosis into account, and the skewness-corrected one of
        Hall 1992 (On the removal of skewness by transformation, J. R. Statist. Soc. B 54, eq. 2.1 and 3.2).

        Of heavy tails a sample shows too little: its skewness counts 1.5 times, its excess kurtosis twice, which was
        chosen on log-normal rows and scored on the others.

        Coverage (benchmarks/interval_coverage.py, 2000 samples of each kind; 12 to 231 random blocks): .95 to .97
        for a change spread evenly and for independent tensors. Heavy tails are covered less, and the less the fewer
        blocks: where the size of the rows' change is log-normal with sigma 1, .91 with 12 blocks and .96 to .97 for a
        layer of seven tensors, with sigma 1.5 .80 and .93 to .95; .88 to .95 where it has Student's tails (3 degrees of
        freedom); .86 to .94 where the rows of both sides differ so in size. A change confined to one block is covered
        as often as that block is drawn, and else there is no interval: of those `unseen_share` speaks.
        """
        if self.no_interval is not None or self.cosine is None:
            return None
        error = math.sqrt(self.variance)
        if error == 0:
            return self.cosine, self.cosine
        quantile = t_quantile(0.5 + CONFIDENCE / 2, self.freedom)
        skewness = SKEWNESS_FACTOR * self.third / error**3
        bounds = [self.cosine - error * _unskewed(sign * quantile, skewness) for sign in (-1, 1)]
        if abs(self.cosine) < 1:
            width = quantile * error / ((1 - self.cosine) * (1 + self.cosine))
            bounds += [math.tanh(math.atanh(self.cosine) + sign * width) for sign in (-1, 1)]
        return max(-1.0, min(bounds)), min(1.0, max(bounds))

    def as_evidence(self) -> dict[str, Any]:
        """The facts for a record."""
        return {
            "cosine": self.cosine,
            "interval": self.interval,
            "no_interval": self.no_interval,
            "confidence": CONFIDENCE,
            "blocks": self.blocks,
            "blocks_read": self.blocks_read,
            "elements": self.elements,
            "elements_read": self.elements_read,
            "every_random_block_equal": self.drawn_equal,
            "unseen_elements": self.unseen_elements,
            "unseen_share": self.unseen_share,
            "strongest_block": self.strongest_block,
        }


def estimate_cosine(design: BlockDesign, blocks: Sequence[ElementwiseSums]) -> CosineEstimate:
    """The centred cosine of a tensor from the sums of the blocks that were read, in the order of `design.ranges()`.

    Totals by inverse probability (a random block stands for N/n), their ratio r linearised (Cochran, Sampling
    Techniques, 3rd ed., 6.8): with co-moments u of each block about the estimated means and their totals S,
    z = u_ab / √(S_aa S_bb) - r/2 (u_aa/S_aa + u_bb/S_bb), and Var(r) = N² (1 - n/N) s²_z / n. A tensor read in full
    has the exact cosine and no variance. Raises ValueError if the number of blocks is not the design's.
    """
    from checks.statistics.elementwise import concatenate  # here, since planning what to read needs no torch

    if len(blocks) != design.blocks - design.between + design.drawn:
        raise ValueError(f"{len(blocks)} blocks were given, expected {design.blocks - design.between + design.drawn}")
    drawn = blocks[1 : 1 + design.drawn]
    cosines = [block.centred_cosine for block in blocks if block.n >= TELLING_ELEMENTS]
    cosine: float | None = concatenate(blocks).centred_cosine
    variance = third = 0.0
    freedom = 1.0
    if cosine is not None and design.drawn < design.between:
        estimate, moments = linearised(np.array([[_row(block) for block in blocks]]), design)
        cosine = float(estimate[0])
        variance, third, freedom = (float(each[0]) for each in moments)
    return CosineEstimate(
        cosine=cosine if cosine is None or math.isfinite(cosine) else None,
        variance=variance,
        third=third,
        freedom=freedom,
        blocks=design.blocks,
        blocks_read=len(blocks),
        drawn=design.drawn,
        elements=design.elements,
        elements_read=design.elements_read,
        drawn_equal=design.drawn > 0 and all(block.squared_difference == 0 and block.n for block in drawn),
        drawn_share=design.drawn / design.between if design.between else 1.0,
        block=design.block,
        unseen_elements=design.unseen_blocks() * design.block,
        strongest_block=max((abs(cosine) for cosine in cosines if cosine is not None), default=None),
    )


def combine(parts: Iterable[tuple[CosineEstimate, float]]) -> CosineEstimate:
    """The weighted mean of cosines: of a layer's tensors (weights: their sizes), or of layers (equal weights).

    Tensors are drawn from independently, so moments add: V = Σw²V_h, third = Σw³third_h; the degrees of freedom after
    Satterthwaite, 1946: V² / Σ(w²V_h)²/freedom_h. A part of which every random block is equal adds no variance, which
    holds as far as its sample saw. Parts without a cosine have no weight, but do count as read or not.
    A change in c blocks, wherever they lie, is missed with probability (1 - f)^c at most, f the least share that was
    drawn: hence `unseen_elements`. Raises ValueError for a negative weight.
    """
    parts = [*parts]
    if any(weight < 0 for _, weight in parts):
        raise ValueError("weights must not be negative")
    estimates = [part for part, _ in parts]
    total = math.fsum(weight for part, weight in parts if part.cosine is not None)
    defined = [(part, weight / total) for part, weight in parts if part.cosine is not None and weight]
    variance = math.fsum(weight**2 * part.variance for part, weight in defined)
    spread = math.fsum((weight**2 * part.variance) ** 2 / part.freedom for part, weight in defined)
    sampled = [part for part in estimates if not part.is_complete]
    strongest = [part.strongest_block for part in estimates if part.strongest_block is not None]
    return CosineEstimate(
        cosine=math.fsum(weight * (part.cosine or 0.0) for part, weight in defined) if defined else None,
        variance=variance,
        third=math.fsum(weight**3 * part.third for part, weight in defined),
        freedom=variance**2 / spread if 0 < spread < math.inf else 1.0,
        blocks=sum(part.blocks for part in estimates),
        blocks_read=sum(part.blocks_read for part in estimates),
        drawn=sum(part.drawn for part in estimates),
        elements=sum(part.elements for part in estimates),
        elements_read=sum(part.elements_read for part in estimates),
        drawn_equal=bool(sampled) and all(part.drawn_equal for part in sampled),
        drawn_share=min((part.drawn_share for part in sampled), default=1.0),
        block=max((part.block for part in sampled), default=1),
        unseen_elements=_unseen_in_any(sampled),
        strongest_block=max(strongest, default=None),
    )


def linearised(table: Doubles, design: BlockDesign) -> tuple[Doubles, tuple[Doubles, Doubles, Doubles]]:
    """Estimates of several draws at once: cosines, and of each the variance, third moment and degrees of freedom.

    `table`: [draws, blocks, 6], of each block n, Σa, Σb and the centred Σab, Σa², Σb²; first and last block first and
    last. Variance infinite with fewer than two random blocks, nan where a side is constant.
    """
    count, between = design.drawn, design.between
    weights = np.ones(table.shape[1])
    weights[1 : 1 + count] = between / count if count else 0.0
    with np.errstate(divide="ignore", invalid="ignore"):
        total = np.einsum("b,dbk->dk", weights, table[..., :3])
        n = table[..., 0]
        off_a = np.where(n > 0, table[..., 1] / n, 0.0) - (total[:, 1] / total[:, 0])[:, None]
        off_b = np.where(n > 0, table[..., 2] / n, 0.0) - (total[:, 2] / total[:, 0])[:, None]
        u_ab = table[..., 3] + n * off_a * off_b
        u_aa = table[..., 4] + n * off_a * off_a
        u_bb = table[..., 5] + n * off_b * off_b
        s_ab, s_aa, s_bb = (each @ weights for each in (u_ab, u_aa, u_bb))
        root = np.sqrt(s_aa) * np.sqrt(s_bb)
        cosine = np.clip(s_ab / root, -1.0, 1.0)
        if count < 2:
            infinite = np.full_like(cosine, np.inf)
            return cosine, (infinite, np.zeros_like(cosine), np.ones_like(cosine))
        drawn = np.s_[:, 1 : 1 + count]
        z = u_ab[drawn] / root[:, None] - cosine[:, None] / 2 * (
            u_aa[drawn] / s_aa[:, None] + u_bb[drawn] / s_bb[:, None]
        )
        z -= z.mean(1, keepdims=True)
        second = (z**2).mean(1)
        variance = between**2 * (1 - count / between) / count * second * count / (count - 1)
        third = (variance / count) ** 1.5 * count * np.where(second > 0, (z**3).mean(1) / second**1.5, 0.0)
        kurtosis = np.where(second > 0, (z**4).mean(1) / second**2, 3.0)
        kurtosis += (EXCESS_FACTOR - 1) * np.maximum(0.0, kurtosis - 3)
        freedom = 2 * count / (kurtosis - (count - 3) / (count - 1))
    return cosine, (variance, third, np.clip(freedom, min(2, count - 1), count - 1))


def _unseen_in_any(sampled: Sequence[CosineEstimate]) -> int:
    """The most elements, wherever in these tensors, whose change is missed with probability above .05."""
    if not sampled:
        return 0
    unread = sum(part.elements - part.elements_read for part in sampled)
    most = max(part.unseen_elements for part in sampled)
    share = min(part.drawn_share for part in sampled)
    if share <= 0:
        return unread
    blocks = int(math.log1p(-CONFIDENCE) / math.log1p(-share)) if share < 1 else 0
    return min(unread, max(most, blocks * max(part.block for part in sampled)))


def _unskewed(quantile: float, skewness: float) -> float:
    """Hall's transformation backwards: which t a standardised mean of that skewness has at a quantile."""
    if abs(skewness) < 1e-9:
        return quantile
    return float(np.cbrt(1 + skewness * (quantile - skewness / 6)) - 1) * 3 / skewness


def _row(block: ElementwiseSums) -> tuple[float, ...]:
    return (
        block.n,
        block.sum_a,
        block.sum_b,
        block.centred_dot,
        block.centred_square_a,
        block.centred_square_b,
    )
