"""What the documents ask for beside the cosine: distances, zero vectors, and correlations that outliers cannot move."""

from __future__ import annotations

from collections import defaultdict
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from checks.pair.comparison import Comparison, TensorComparison
    from checks.statistics.elementwise import ElementwiseSums

# Tensors that a record names.
SHOWN = 8


def companions(comparison: Comparison) -> dict[str, Any]:
    """For the record of a cosine, from the same reading; of weights that are read in part, from what was read.

    `distances`: by category ‖a-b‖, the same over sqrt(‖a‖² + ‖b‖²) (0 equal, 1 unrelated, √2 opposite), and ‖a‖/‖b‖, of
    the category's elements as one vector. `zero_vectors`: tensors that are zero on one side, and have no cosine; those
    that are zero on both count as tensors that any model could have. `robust`: rank correlation and winsorised cosine
    of at most 48 tensors, at 8192 positions of each; shown are those where the rank correlation is farthest from the
    cosine. `undefined`: those of them that are constant there, with the reason.
    Documented: tutorial-qa.md, limits of the cosine (a zero check, the L2 distance beside it, a robust version);
    weight-architecture-qa.md, Q4.
    """
    by_category: dict[str, list[ElementwiseSums]] = defaultdict(list)
    zeros = {}
    for one in comparison.compared:
        if (sums := one.sums or one.drawn) is not None and sums.n:
            by_category[one.entry.role.category].append(sums)
            sides = [side for side, size in (("candidate", sums.square_a), ("reference", sums.square_b)) if size == 0]
            if sides:
                zeros[one.entry.name] = " and ".join(sides)
    return {
        "distances": {category: _distance(found) for category, found in sorted(by_category.items())},
        "zero_vectors": dict(list(zeros.items())[:SHOWN]),
        "robust": _robust(comparison.compared),
    }


def _distance(tensors: Iterable[ElementwiseSums]) -> dict[str, float | None]:
    from checks.statistics.elementwise import pool_centred
    from checks.statistics.magnitude import magnitude

    sums = pool_centred(tensors)
    found = magnitude(sums)
    return {"l2": found.distance, "relative": found.relative_distance, "norm_ratio": sums.norm_ratio}


def _robust(compared: Iterable[TensorComparison]) -> dict[str, Any]:
    from checks.pair.robust_cosines import POSITIONS, SEED

    rows, undefined = [], {}
    for one in compared:
        if one.robust is None:
            continue
        spearman, cosine = one.robust.spearman, one.cosine
        if spearman is None:
            undefined[one.entry.name] = one.robust.reason
            continue
        rows.append((spearman, one.robust.winsorized, cosine, one.entry.name))
    rows.sort(key=lambda row: -abs(row[0] - (row[2] or 0.0)))
    winsorized = [row[1] for row in rows if row[1] is not None]
    return {
        "tensors": len(rows),
        "positions": POSITIONS,
        "seed": SEED,
        "median_spearman": median(row[0] for row in rows) if rows else None,
        "median_winsorized": median(winsorized) if winsorized else None,
        "farthest_from_the_cosine": [
            {"name": name, "spearman": spearman, "winsorized": clipped, "cosine": cosine}
            for spearman, clipped, cosine, name in rows[:SHOWN]
        ],
        "undefined": undefined,
    }
