"""The matchings of a pair of models as one test: blocks that belong together against blocks that do not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from checks.statistics.double_matching import LEAST_UNITS, DoubleMatching, agreement_z
from checks.statistics.units import ONE_SIDED_95, two_sided_log_p

# With fewer layers too few blocks are mismatched to say how such matchings vary.
LEAST_LAYERS = 5
# Fewer mismatched blocks than this are no null.
LEAST_NULL = 8
# Shares of neurons that must agree, of one block and of all together. Far above every independent pair of the setting
# half of the lineage zoo (8 % of a first layer by tokens, 6 % of a block by anchors, 1.8 % of all), since neurons that
# answer to one token arise in every model, and may be more in larger ones.
LEAST_AGREEMENT = 0.25
LEAST_JOINT_AGREEMENT = 0.1
# If more than this share of all neurons would have to agree to be noticed, there is no power.
LARGEST_DETECTABLE = 0.5


@dataclass(frozen=True)
class BlockPair:
    """An MLP of the candidate and one of the reference: layer and expert (None: the layer's only MLP), and result."""

    candidate: tuple[int, int | None]
    reference: tuple[int, int | None]
    matching: DoubleMatching


@dataclass(frozen=True)
class MatchingNull:
    """How matchings of blocks that do not belong together vary, in this very pair of models or in its panel.

    `borrowed`: how many of them are of other pairs of models. `mean`, `sd`, `maximum`: of z (Spearman). `rate`:
    agreements for each one expected, at least 1. `dispersion`: their variance in units of Poisson's, at least 1.
    `largest_agreement`: the largest share of agreeing neurons.
    """

    matchings: tuple[DoubleMatching, ...]
    borrowed: int = 0

    @property
    def count(self) -> int:
        """Mismatched blocks."""
        return len(self.matchings)

    @cached_property
    def values(self) -> tuple[float, ...]:
        """z (Spearman) of each."""
        return tuple(one.z for one in self.matchings if one.z is not None)

    @property
    def mean(self) -> float:
        """Mean z; 0 for none."""
        return math.fsum(self.values) / len(self.values) if self.values else 0.0

    @property
    def sd(self) -> float:
        """Standard deviation of z; 1 for fewer than two."""
        if len(self.values) < 2:
            return 1.0
        return math.sqrt(math.fsum((z - self.mean) ** 2 for z in self.values) / (len(self.values) - 1))

    @property
    def maximum(self) -> float:
        """Largest z; -inf for none."""
        return max(self.values, default=-math.inf)

    @cached_property
    def rate(self) -> float:
        """Agreements for each that is expected of unrelated matchings, at least 1."""
        expected = math.fsum(one.expected for one in self.matchings)
        return max(1.0, sum(one.agreements for one in self.matchings) / expected) if expected else 1.0

    @cached_property
    def dispersion(self) -> float:
        """Mean of (agreements - rate·expected)² / (rate·expected), at least 1."""
        if len(self.matchings) < 2:
            return 1.0
        means = [self.rate * one.expected for one in self.matchings]
        squares = [(one.agreements - mean) ** 2 / mean for one, mean in zip(self.matchings, means, strict=True)]
        return max(1.0, math.fsum(squares) / (len(squares) - 1))

    @property
    def largest_agreement(self) -> float:
        """Largest share of agreeing neurons, 0 for none."""
        return max((one.agreement for one in self.matchings), default=0.0)

    def adjusted(self, matching: DoubleMatching) -> float | None:
        """(z - max(0, mean)) / max(1, sd) of a matching; None without z."""
        return None if matching.z is None else (matching.z - max(0.0, self.mean)) / max(1.0, self.sd)


@dataclass(frozen=True)
class MatchingTest:
    """Double matching of the blocks of two models that belong together, and of blocks that do not.

    `blocks`: mapped pairs. `null`: mismatched pairs. `searched`: pairs of blocks among which the map or the pairs were
    chosen, all of which a correction counts; at least the number of blocks. `layer_map`: candidate's layer to
    reference's. `probes`: directions whose answers were compared. `abstains_because`: why the numbers decide nothing.
    `detail`: for the record.
    """

    blocks: tuple[BlockPair, ...]
    null: MatchingNull
    searched: int
    layer_map: dict[int, int]
    probes: int
    seed: int
    abstains_because: str | None = None
    detail: dict[str, float | str] = field(default_factory=dict)

    @property
    def units(self) -> int:
        """Neurons that were matched, of all blocks."""
        return sum(block.matching.units for block in self.blocks)

    @property
    def agreement(self) -> float:
        """Share of all neurons to which both matchings give the same partner."""
        return sum(block.matching.agreements for block in self.blocks) / self.units if self.units else 0.0

    @property
    def rho(self) -> float | None:
        """Mean Spearman correlation of the blocks; None without any."""
        values = [block.matching.rho for block in self.blocks if block.matching.rho is not None]
        return math.fsum(values) / len(values) if values else None

    @property
    def z(self) -> float | None:
        """Mean z (Spearman) of the blocks; None without any."""
        values = [block.matching.z for block in self.blocks if block.matching.z is not None]
        return math.fsum(values) / len(values) if values else None

    @property
    def joint_z(self) -> float | None:
        """Stouffer's joint score of the blocks, each adjusted by the null: Σ z_adjusted / √blocks; None without any."""
        values = [value for value in map(self.z_adjusted, self.blocks) if value is not None]
        return math.fsum(values) / math.sqrt(len(values)) if values else None

    @property
    def strongest(self) -> BlockPair | None:
        """The block with the largest adjusted z; None without any."""
        defined = [block for block in self.blocks if block.matching.z is not None]
        return max(defined, key=lambda block: self.z_adjusted(block) or 0.0, default=None)

    @property
    def agreement_score(self) -> float | None:
        """Standard score of the agreements of all blocks above the null's rate, for the record; None without blocks.

        More sensitive than `joint_z`, and not calibrated: first layers of independent models agree a little.
        """
        matchings = [block.matching for block in self.blocks if block.matching.z is not None]
        if not matchings:
            return None
        expected = self.null.rate * math.fsum(one.expected for one in matchings)
        return agreement_z(sum(one.agreements for one in matchings), expected, self.null.dispersion)

    @property
    def tests(self) -> int:
        """How many tests a correction counts: every pair that was searched, and all blocks together."""
        return max(self.searched, len(self.blocks)) + 1

    @property
    def log_p(self) -> float | None:
        """Natural logarithm of the smallest p-value of the blocks and of all together, times `tests`; at most 0."""
        best = max((z for z in (self.joint_z, *map(self.z_adjusted, self.blocks)) if z is not None), default=None)
        if best is None:
            return None
        return min(0.0, two_sided_log_p(best) - math.log(2) + math.log(self.tests)) if best > 0 else 0.0

    def z_adjusted(self, block: BlockPair) -> float | None:
        """z of a block less the null's mean, in its standard deviations: (z - max(0, mean)) / max(1, sd)."""
        return self.null.adjusted(block.matching)

    def finding(
        self,
        critical_z: float,
        least_agreement: float = LEAST_AGREEMENT,
        least_joint: float = LEAST_JOINT_AGREEMENT,
    ) -> MatchingFinding:
        """What the numbers say at a critical value that is already corrected for all `tests` of the whole claim.

        Dependent: a block has an adjusted z of at least `critical_z` and an agreement of at least `least_agreement`, or
        all together have both, with `least_joint`; and at least twice the agreement of every mismatched block.
        Otherwise neither, if the null itself passes the critical value, if mismatched blocks agree as much as is asked
        of a block, or without power; else independent.
        """
        if self.abstains_because is not None:
            return MatchingFinding(None, self.abstains_because, None)
        strongest, joint = self.strongest, self.joint_z
        if strongest is None or joint is None:
            return MatchingFinding(None, "no block could be matched", None)
        largest = self.null.largest_agreement
        needed = max(least_agreement, 2 * largest)
        agreeing = [
            block
            for block in self.blocks
            if (self.z_adjusted(block) or 0.0) >= critical_z and block.matching.agreement >= needed
        ]
        if agreeing:
            return MatchingFinding(True, None, max(agreeing, key=lambda block: block.matching.agreement))
        if joint >= critical_z and self.agreement >= max(least_joint, 2 * largest):
            return MatchingFinding(True, None, None)
        if self.null.maximum >= critical_z or largest >= least_agreement:
            reason = (
                f"mismatched blocks reach z = {self.null.maximum:.1f} (critical {critical_z:.1f}) and {largest:.0%} of "
                "agreeing neurons: layers that repeat each other, or probes that favour some neurons"
            )
            return MatchingFinding(None, reason, None)
        detectable = self.detectable_agreement(critical_z)
        if detectable > LARGEST_DETECTABLE:
            words = "neurons of all blocks" if math.isfinite(detectable) else "neurons, and more,"
            reason = f"no power: {min(detectable, 1.0):.0%} of the {words} would have to agree to be noticed"
            return MatchingFinding(None, reason, None)
        return MatchingFinding(False, None, None)

    def detectable_agreement(self, critical_z: float) -> float:
        """Smallest share of agreeing neurons, in all blocks, that is found in 95 of 100 cases; above 1 without power.

        z of a block is the share times √(units - 1), with standard deviation 1; found in the largest block or jointly.
        """
        roots = [math.sqrt(block.matching.units - 1) for block in self.blocks if block.matching.z is not None]
        if not roots:
            return math.inf
        mean, spread = max(0.0, self.null.mean), max(1.0, self.null.sd)
        needed = (critical_z + ONE_SIDED_95) * spread
        alone = max(LEAST_AGREEMENT, (needed + mean) / max(roots))
        together = max(LEAST_JOINT_AGREEMENT, (needed * math.sqrt(len(roots)) + mean * len(roots)) / math.fsum(roots))
        return min(alone, together)

    def with_borrowed(self, matchings: Sequence[DoubleMatching]) -> MatchingTest:
        """The same test with mismatched blocks of other pairs of the panel added to its null."""
        null = MatchingNull((*self.null.matchings, *matchings), self.null.borrowed + len(matchings))
        return replace(self, null=null, abstains_because=why_abstain(self.blocks, null, self.layer_map))


@dataclass(frozen=True)
class MatchingFinding:
    """`dependent`: True, False, or None (with a `reason`). `block`: the block that decided; None for all together."""

    dependent: bool | None
    reason: str | None
    block: BlockPair | None


def why_abstain(blocks: Sequence[BlockPair], null: MatchingNull, layer_map: dict[int, int]) -> str | None:
    """Why these matchings decide nothing whatever their values; None if they may decide."""
    if not blocks:
        return "there is no pair of MLPs to compare"
    usable = [block for block in blocks if block.matching.z is not None and block.matching.units >= LEAST_UNITS]
    if not usable:
        most = max((block.matching.units for block in blocks), default=0)
        return f"no power: the largest of {len(blocks)} pairs of MLPs has {most} neurons, {LEAST_UNITS} are needed"
    if null.count < LEAST_NULL:
        return f"{null.count} mismatched blocks are no null, {LEAST_NULL} are needed: borrow those of the panel"
    if len(layer_map) < LEAST_LAYERS and not null.borrowed:
        return f"{len(layer_map)} layers, {LEAST_LAYERS} are needed for a null of one's own: borrow that of the panel"
    return None
