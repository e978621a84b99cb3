"""How the similarity of two models runs over their layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

PatternName = Literal[
    "no layers",
    "uniformly low",
    "uniformly high",
    "some layers high",
    "high early, falling with depth",
    "unclear",
]


@dataclass(frozen=True)
class DepthPattern:
    """Result of `depth_pattern`.

    `slope`: least-squares change of the cosine from the first to the last layer; None with fewer than two measured
    layers. `early`, `late`: mean cosine of the measured ones among the first and the last layers; None if there are
    none. `high_layers`: indices of the layers at or above `high`.
    """

    name: PatternName
    slope: float | None
    early: float | None
    late: float | None
    high_layers: tuple[int, ...]


def depth_pattern(
    cosines: Sequence[float | None],
    *,
    low: float = 0.3,
    high: float = 0.9,
    fall: float = 0.05,
    early_layers: int | None = None,
) -> DepthPattern:
    """Which of the documented depth patterns do the layers' cosines follow?

    `cosines`: one per layer in order of depth, in [-1, 1]; None where a layer could not be measured, and such layers
    are left out. `early_layers`: how many layers count as early, and as many as late; by default a sixth, at least one
    (documented: "Layer 1-5" of a model of about 30). The first rule that holds names the pattern:

    1. "no layers": none was measured.
    2. "uniformly low": all < `low`. Independent training.
    3. "uniformly high": all >= `high`. Light fine-tuning, or a copy.
    4. "some layers high": at least one >= `high` and at least one < `low`. Partial initialisation.
    5. "high early, falling with depth": early >= `high`, early - late >= `fall`, slope < 0. Fine-tuning.
    6. "unclear": anything else.

    Rule 4 comes before rule 5, because the documented fine-tuned layers stay above .6, and layers below `low` are as
    unlike as those of independent models. Source: weight-analysis.md, depth patterns (high .9, early layers after
    fine-tuning); weight-architecture-qa.md, Q3 (low .3) and Q4 (figures by depth).
    Raises ValueError for cosines that are not finite, `low` > `high`, and `early_layers` < 1.
    """
    if low > high or (early_layers is not None and early_layers < 1):
        raise ValueError(f"need low <= high and early_layers >= 1, not {low}, {high}, {early_layers}")
    measured = [(index, cosine) for index, cosine in enumerate(cosines) if cosine is not None]
    if not all(math.isfinite(cosine) for _, cosine in measured):
        raise ValueError("a cosine is not finite; undefined cosines are None")
    if not measured:
        return DepthPattern("no layers", None, None, None, ())

    count = early_layers if early_layers is not None else max(1, len(cosines) // 6)
    early = _mean([cosine for index, cosine in measured if index < count])
    late = _mean([cosine for index, cosine in measured if index >= len(cosines) - count])
    slope = _slope(measured, len(cosines))
    high_layers = tuple(index for index, cosine in measured if cosine >= high)
    lowest, highest = min(cosine for _, cosine in measured), max(cosine for _, cosine in measured)

    name: PatternName = "unclear"
    if highest < low:
        name = "uniformly low"
    elif lowest >= high:
        name = "uniformly high"
    elif high_layers and lowest < low:
        name = "some layers high"
    elif early is None or late is None or slope is None:
        name = "unclear"
    elif early >= high and early - late >= fall and slope < 0:
        name = "high early, falling with depth"
    return DepthPattern(name, slope, early, late, high_layers)


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _slope(measured: Sequence[tuple[int, float]], layers: int) -> float | None:
    """Least-squares slope over relative depth, 0 at the first layer and 1 at the last."""
    if len(measured) < 2:
        return None
    depths = [index / (layers - 1) for index, _ in measured]
    centre = math.fsum(depths) / len(depths)
    mean = math.fsum(cosine for _, cosine in measured) / len(measured)
    covariance = math.fsum(
        (depth - centre) * (cosine - mean) for depth, (_, cosine) in zip(depths, measured, strict=True)
    )
    return covariance / math.fsum((depth - centre) ** 2 for depth in depths)
