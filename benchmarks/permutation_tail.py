"""Is the normal tail of the unit test right where it decides? Sampled permutations of few units and awkward weights.

    python benchmarks/permutation_tail.py [--permutations 1000000] [--seed 0] [--save]

independence.units takes z of the exact mean and variance over all permutations for normal. Here the units of one of two
unrelated matrices are renumbered at random, a million times, and it is counted how often |z| is as large as a normal
variable's at a level; 1 is as often, above 1 the test accuses more often than it says. Weights: the first and the last
MLP of the example models `base` and `independent`, some neurons of them, and made ones: normal; Cauchy; with a mean row
that outweighs what differs, with outliers beside it, or in two clusters; dominated by one direction with loads that are
heavy-tailed.

`once` is the same statistic without scaling the rows again about their mean: a few units then decide alone, and the
tail is five hundred times what it should be. That is why the test scales twice.

Prints a table in Markdown; `--save` writes benchmarks/results/permutation-tail.json.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from safetensors.torch import load_file
from scipy.stats import norm
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from stream import machine  # noqa: E402

from checks.statistics.units import unit_permutation_test  # noqa: E402

RESULT = HERE / "results" / "permutation-tail.json"
EXAMPLES = HERE.parent / "examples" / "checkpoints"
SIZES, WIDTH, VIEWS = (32, 64, 128, 256), 64, 3
LEVELS = (1e-3, 1e-4, 1e-5)
Pair = tuple[list[Tensor], list[Tensor]]


def normal(seed: int, *shape: int) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cauchy(seed: int, units: int) -> Tensor:
    """Ratios of normal numbers: single weights outweigh their rows."""
    return normal(seed, units, WIDTH) / normal(seed + 1, units, WIDTH).abs().clamp_min(1e-3)


def mean_row(seed: int, units: int) -> Tensor:
    """Rows that share most of what they are."""
    return normal(seed, units, WIDTH) + 3 * normal(seed + 1, 1, WIDTH)


def outliers(seed: int, units: int) -> Tensor:
    """Rows that share nearly everything, and one of fifty that shares nothing."""
    rows = normal(seed, units, WIDTH) + 10 * normal(seed + 1, 1, WIDTH)
    few = max(1, units // 50)
    rows[:few] = 10 * normal(seed + 2, few, WIDTH)
    return rows


def clusters(seed: int, units: int) -> Tensor:
    """Two kinds of rows that hardly differ within; one of thirty is of the rare kind."""
    kind = (torch.arange(units) < max(1, units // 30))[:, None]
    rows = torch.where(kind, normal(seed, 1, WIDTH), normal(seed + 1, 1, WIDTH))
    return rows + 0.05 * normal(seed + 2, units, WIDTH)


def one_direction(seed: int, units: int) -> Tensor:
    """One direction in both models, with lognormal loads."""
    return normal(seed, units, 1).exp() * normal(7000, 1, WIDTH) + 0.3 * normal(seed + 1, units, WIDTH)


MADE: dict[str, Callable[[int, int], Tensor]] = {
    "normal": lambda seed, units: normal(seed, units, WIDTH),
    "Cauchy": cauchy,
    "large mean row": mean_row,
    "larger mean row, outliers": outliers,
    "two clusters": clusters,
    "one direction": one_direction,
}


def made(name: str, units: int, seed: int) -> Pair:
    """Two unrelated matrices of a kind, three views each."""
    sides = [[MADE[name](seed + 100 * side + 10 * view, units) for view in range(VIEWS)] for side in (0, 1)]
    return sides[0], sides[1]


def trained(layer: int, units: int) -> Pair:
    """Gate, up and down of a layer of two independent example models, evenly spread neurons of each."""
    sides = []
    for name in ("base", "independent"):
        tensors = load_file(EXAMPLES / name / "model.safetensors")
        views = [tensors[f"model.layers.{layer}.mlp.{kind}_proj.weight"].double() for kind in ("gate", "up", "down")]
        views[2] = views[2].T
        some = torch.linspace(0, len(views[0]) - 1, units).round().long()
        sides.append([view[some] for view in views])
    return sides[0], sides[1]


def standardised(views: Pair, twice: bool) -> Tensor:
    """Products [h, h] of the units, in standard deviations of their sum over a random permutation."""
    sides = []
    for side in views:
        rows = [torch.nn.functional.normalize(view, dim=1) for view in side]
        if twice:
            rows = [torch.nn.functional.normalize(row - row.mean(0), dim=1) for row in rows]
        whole = torch.cat(rows, 1)
        sides.append(whole - whole.mean(0))
    products = sides[0] @ sides[1].T
    return products * math.sqrt(len(products) - 1) / products.norm()


@numba.njit(cache=True)  # type: ignore[untyped-decorator]
def count_beyond(products: Any, permutations: int, seed: int, bounds: Any) -> Any:
    """How many |sums| of random permutations reach each bound, the largest of them, and the mean fourth power."""
    np.random.seed(seed)
    units = products.shape[0]
    order = np.arange(units)
    found = np.zeros(bounds.size, np.int64)
    largest, fourth = 0.0, 0.0
    for _ in range(permutations):
        total = products[0, 0] * 0.0
        for place in range(units - 1, 0, -1):
            other = np.random.randint(0, place + 1)
            order[place], order[other] = order[other], order[place]
            total += products[place, order[place]]
        total += products[0, order[0]]
        largest = max(largest, abs(total))
        fourth += total**4
        for number in range(bounds.size):
            found[number] += abs(total) >= bounds[number]
    return found, largest, fourth / permutations


def row(kind: str, units: int, views: Pair, permutations: int, seed: int) -> dict[str, Any]:
    """How often permutations pass each level, relative to it, as the test is and with rows scaled once."""
    bounds = np.array([norm.isf(level / 2) for level in LEVELS])
    found: dict[str, Any] = {"weights": kind, "units": units, "permutations": permutations}
    test = unit_permutation_test(*views)
    for name, twice in (("twice", True), ("once", False)):
        products = standardised(views, twice)
        if twice and (test.z is None or abs(float(products.trace()) - test.z) > 1e-6):
            raise AssertionError(f"{kind}: this is not the statistic of the suite ({test})")
        counts, largest, fourth = count_beyond(products.numpy(), permutations, seed, bounds)
        ratios = [round(int(count) / permutations / level, 2) for count, level in zip(counts, LEVELS, strict=True)]
        found[name] = {"ratios": ratios, "largest_z": round(largest, 2), "excess_kurtosis": round(fourth - 3, 3)}
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown."""
    levels = " | ".join(f"p = {level:g}" for level in LEVELS)
    lines = [f"| weights | units | {levels} | largest abs. z | scaled once: {levels} | largest abs. z |"]
    lines.append("|---" * (4 + 2 * len(LEVELS)) + "|")
    for one in rows:
        cells = [
            f"{' | '.join(map(str, one[name]['ratios']))} | {one[name]['largest_z']}" for name in ("twice", "once")
        ]
        lines.append(f"| {one['weights']} | {one['units']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Sample, and print how often the tail is passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--permutations", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    started = time.process_time()
    rows = []
    for units in SIZES:
        pairs = {f"trained, layer {layer}": trained(layer, units) for layer in (0, 3)}
        pairs |= {name: made(name, units, 1000 * arguments.seed) for name in MADE}
        for kind, views in pairs.items():
            rows.append(row(kind, units, views, arguments.permutations, arguments.seed))
        print(f"{units} units: {time.process_time() - started:.0f} CPU-seconds", file=sys.stderr)
    seconds = round(time.process_time() - started)
    print(table(rows))
    if arguments.save:
        document = {
            "machine": machine(),
            "seed": arguments.seed,
            "cpu_seconds": seconds,
            "levels": LEVELS,
            "rows": rows,
        }
        RESULT.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
