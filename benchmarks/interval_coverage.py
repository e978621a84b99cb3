"""How often does the 95 % interval of a sampled cosine hold the true one?

    python benchmarks/interval_coverage.py [--populations 40] [--draws 50] [--save]

The blocks are those that a sample of a given share draws from tensors of real shapes in bf16. Elements of the
reference are Gaussian; the candidate's differ from them

- diffuse: by noise of a tenth of their size; independent: altogether
- log-normal, Student: by noise whose size differs from row to row, as exp(sigma·N) or as Student's t with 3 degrees of
  freedom has it; scaled rows: the rows of both sides differ so in size
- confined: in a tenth of the blocks, or in one of them

For each kind, shape and share: the share of intervals that hold the cosine of all elements, their median width, and the
share of samples without an interval (every random block is equal). Prints JSON and a table; `--save` writes both to
benchmarks/results/coverage.json and coverage.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from stream import machine  # noqa: E402

from checks.checkpoint.index import TensorInfo  # noqa: E402
from checks.statistics.sampling import BlockDesign, CosineEstimate, combine, linearised  # noqa: E402
from checks.streaming.blocks import draw_blocks  # noqa: E402

Doubles = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]
# Of each row the size of the reference's elements and of the noise.
Sizes = tuple[Doubles, Doubles]
Kind = Callable[[np.random.Generator, tuple[int, int]], Sizes]

# Shape, share of the blocks, and how many such tensors make up what is estimated.
CASES = (
    ((1024, 1024), 0.07, 1),
    ((4096, 4096), 0.033, 1),
    ((4096, 4096), 0.07, 1),
    ((4096, 4096), 0.2, 1),
    ((4096, 14336), 0.07, 1),
    ((1024, 1024), 0.07, 7),
    ((4096, 4096), 0.07, 7),
)


def diffuse(_: np.random.Generator, shape: tuple[int, int]) -> Sizes:
    """Noise of a tenth."""
    return np.ones(shape), np.full(shape, 0.1)


def independent(_: np.random.Generator, shape: tuple[int, int]) -> Sizes:
    """Nothing of the reference: noise without end."""
    return np.ones(shape), np.full(shape, np.inf)


def log_normal(sigma: float) -> Kind:
    """Noise of a row of size exp(sigma·N)."""
    return lambda rng, shape: (np.ones(shape), 0.02 * np.exp(sigma * rng.standard_normal(shape)))


def student(rng: np.random.Generator, shape: tuple[int, int]) -> Sizes:
    """Noise of a row of the size that makes its elements t with 3 degrees of freedom."""
    return np.ones(shape), 0.02 * np.sqrt(3 / rng.chisquare(3, shape))


def scaled_rows(rng: np.random.Generator, shape: tuple[int, int]) -> Sizes:
    """Rows of both sides of log-normal size."""
    size = np.exp(rng.standard_normal(shape))
    return size, 0.3 * size


def confined(share: float) -> Kind:
    """Noise in some of the blocks between the first and the last; one at least."""

    def make(rng: np.random.Generator, shape: tuple[int, int]) -> Sizes:
        noise = np.zeros(shape)
        noise[1 + rng.permutation(shape[0] - 2)[: max(1, round(share * shape[0]))]] = 0.5
        return np.ones(shape), noise

    return make


KINDS: dict[str, Kind] = {
    "diffuse": diffuse,
    "independent": independent,
    "log-normal rows, sigma 0.5": log_normal(0.5),
    "log-normal rows, sigma 1": log_normal(1.0),
    "log-normal rows, sigma 1.5": log_normal(1.5),
    "Student rows, 3 degrees": student,
    "scaled rows, sigma 1": scaled_rows,
    "confined to a tenth": confined(0.1),
    "confined to one block": confined(0.0),
}


def design_of(shape: tuple[int, int], share: float) -> BlockDesign:
    """The blocks that are drawn of a pair of tensors in bf16 where so much of their bytes may be read."""
    tensor = TensorInfo("weight", "BF16", shape, "shard", 0, 2 * shape[0] * shape[1])
    ((_, design),) = draw_blocks([(tensor, tensor)], 0, int(share * 2 * tensor.stop))
    return design


def blocks_of(kind: Kind, design: BlockDesign, width: int, rng: np.random.Generator) -> tuple[Doubles, Flags]:
    """What `linearised` needs of every block, [blocks, 6]; and which blocks differ.

    Sums over the elements of a row are drawn from their distributions: squares are chi-square, the product of both
    sides' Gaussian elements is normal given the first side.
    """
    rows = max(1, round(design.block / width))
    each = design.block / rows
    size, noise = kind(rng, (design.blocks, rows))
    squares = rng.chisquare(each, size.shape)
    cross = np.sqrt(squares) * rng.standard_normal(size.shape)
    others = cross**2 / squares + rng.chisquare(each - 1, size.shape)
    sum_a = np.sqrt(each) * rng.standard_normal(size.shape)
    sum_e = np.sqrt(each) * rng.standard_normal(size.shape)
    is_alone = np.isinf(noise)
    kept, noise = np.where(is_alone, 0.0, size), np.where(is_alone, size, noise)
    per_row = [
        np.full(size.shape, each),
        size * sum_a,
        kept * sum_a + noise * sum_e,
        size * (kept * squares + noise * cross),
        size**2 * squares,
        kept**2 * squares + 2 * kept * noise * cross + noise**2 * others,
    ]
    table = np.stack([one.sum(1) for one in per_row], 1)
    n, a, b = table[:, 0], table[:, 1], table[:, 2]
    table[:, 3:] -= np.stack([a * b / n, a * a / n, b * b / n], 1)
    return table, np.any(noise > 0, axis=1)


def whole(table: Doubles) -> float:
    """The cosine of all blocks."""
    n = table[:, 0]
    off = table[:, 1:3] / n[:, None] - table[:, 1:3].sum(0) / n.sum()
    ab, aa, bb = (
        (table[:, column] + n * off[:, one] * off[:, other]).sum()
        for column, one, other in ((3, 0, 1), (4, 0, 0), (5, 1, 1))
    )
    return float(ab / np.sqrt(aa * bb))


def estimates(
    table: Doubles, differs: Flags, design: BlockDesign, draws: int, rng: np.random.Generator
) -> list[CosineEstimate]:
    """Estimates from several samples of one tensor."""
    drawn = design.drawn
    chosen = 1 + np.argpartition(rng.random((draws, design.between)), drawn - 1, axis=1)[:, :drawn]
    chosen = np.pad(chosen, ((0, 0), (1, 1)), constant_values=((0, 0), (0, design.blocks - 1)))
    cosines, moments = linearised(table[chosen], design)
    return [
        CosineEstimate(
            cosine=float(cosines[draw]),
            variance=float(moments[0][draw]),
            third=float(moments[1][draw]),
            freedom=float(moments[2][draw]),
            blocks=design.blocks,
            blocks_read=drawn + 2,
            drawn=drawn,
            elements=design.elements,
            elements_read=design.elements_read,
            drawn_equal=not differs[chosen[draw, 1:-1]].any(),
            drawn_share=drawn / design.between,
            block=design.block,
            unseen_elements=0,
            strongest_block=None,
        )
        for draw in range(draws)
    ]


def measure(
    kind: Kind, case: tuple[tuple[int, int], float, int], populations: int, draws: int, seed: int
) -> dict[str, Any]:
    """Coverage, width and refusals of one kind of change in one case."""
    shape, share, tensors = case
    design, rng = design_of(shape, share), np.random.default_rng(seed)
    held = refused = 0
    widths = []
    for _ in range(populations):
        made = [blocks_of(kind, design, shape[1], rng) for _ in range(tensors)]
        truth = float(np.mean([whole(table) for table, _ in made]))
        samples = [estimates(table, differs, design, draws, rng) for table, differs in made]
        for parts in zip(*samples, strict=True):
            interval = (parts[0] if tensors == 1 else combine((part, 1.0) for part in parts)).interval
            if interval is None:
                refused += 1
                continue
            held += interval[0] <= truth <= interval[1]
            widths.append(interval[1] - interval[0])
    total = populations * draws
    return {
        "shape": [*shape],
        "share": share,
        "tensors": tensors,
        "blocks": design.blocks,
        "random_blocks": design.drawn * tensors,
        "coverage": held / total,
        "without_interval": refused / total,
        "median_width": float(np.median(widths)) if widths else None,
    }


def table_of(results: dict[str, list[dict[str, Any]]]) -> str:
    """The coverage as Markdown."""
    first = next(iter(results.values()))
    heads = [
        f"{one['tensors']} of [{one['shape'][0]}, {one['shape'][1]}], {one['random_blocks']} of "
        f"{one['blocks'] * one['tensors']} blocks"
        for one in first
    ]
    lines = ["# Coverage of the 95 % intervals", "", "Made by `python benchmarks/interval_coverage.py --save`.", ""]
    lines += ["| change | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    for name, found in results.items():
        cells = [
            f"{one['coverage']:.3f}" + (f" ({one['without_interval']:.2f} none)" if one["without_interval"] else "")
            for one in found
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--populations", type=int, default=40)
    parser.add_argument("--draws", type=int, default=50, help="samples of each population")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    started = time.perf_counter()
    how = (arguments.populations, arguments.draws, arguments.seed)
    results = {name: [measure(kind, case, *how) for case in CASES] for name, kind in KINDS.items()}
    whole_run = {
        "benchmark": "coverage",
        "machine": machine(),
        "populations": arguments.populations,
        "draws": arguments.draws,
        "seed": arguments.seed,
        "wall_s": round(time.perf_counter() - started, 1),
        "results": results,
    }
    text, table = json.dumps(whole_run, indent=1), table_of(results)
    print(text, table, sep="\n")
    if arguments.save:
        (HERE / "results" / "coverage.json").write_text(text + "\n")
        (HERE / "results" / "coverage.md").write_text(table)


if __name__ == "__main__":
    main()
