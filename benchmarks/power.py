"""How much noise may lie over a copied model until each test of independence loses it?

    python -m tests.zoo.build --output ZOO                       # once
    python benchmarks/power.py ZOO [--model llama] [--repeats 3] [--save]

Copies of a trained model of the zoo's half `setting` get normal noise of SIGMA times the standard deviation of each
tensor, norms too, so that a row's cosine with the original is about 1/sqrt(1 + SIGMA²): as they are; with neurons,
heads and residual channels renumbered; and with the residual stream rotated and the neurons renumbered. Each copy is
judged beside the original by every decisive check of the family, at the level of a claim with 20 calibrated cases.
Independent models of the zoo show where chance lies.

Prints tables in Markdown; `--save` writes benchmarks/results/power.md, .json and .png.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from stream import machine  # noqa: E402

from checks.catalog.architecture import from_config  # noqa: E402
from checks.checkpoint.model import Model  # noqa: E402
from checks.claim.discovery import discovered_checks  # noqa: E402
from checks.claim.model import ModelSource  # noqa: E402
from checks.evidence.judge import ContradictingEvidence, Judge, JudgeContext  # noqa: E402
from checks.evidence.record import CONTRADICTS, Evidence  # noqa: E402
from checks.pair.pair import Pair  # noqa: E402
from tests.zoo import symmetry  # noqa: E402
from tests.zoo.weights import Weights, read_weights, write_weights  # noqa: E402

RESULTS = HERE / "results" / "power"
CHECKS = tuple(f"independence.{name}" for name in ("units", "channels", "tensors", "neurons", "anchored"))
SIGMAS = (0.1, 0.3, 0.6, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0)
INNOCENTS = ("llama_other_seed", "llama_other_data", "llama_distilled")
# Calibrated cases of a claim, among which its level is divided.
CASES = 20


def renumbered(weights: Weights, seed: int) -> Weights:
    """Neurons, heads and residual channels in another order."""
    return symmetry.permute_residual(
        symmetry.permute_heads(symmetry.permute_neurons(weights, seed), seed + 1), seed + 2
    )


def rotated(weights: Weights, seed: int) -> Weights:
    """Neurons in another order, norms folded, and the residual stream in another basis."""
    return symmetry.rotate_residual(symmetry.permute_neurons(weights, seed), seed + 1)


COPIES: dict[str, Callable[[Weights, int], Weights]] = {
    "as it is": lambda weights, seed: weights,
    "renumbered": renumbered,
    "rotated": rotated,
}


def noisy(weights: Weights, sigma: float, seed: int) -> Weights:
    """Every tensor with noise of `sigma` times its standard deviation."""
    generator = torch.Generator().manual_seed(seed)
    return weights.map(lambda _, one: one + sigma * one.std() * torch.randn(one.shape, generator=generator))


def opened(directory: Path) -> Model:
    """A checkpoint as a claim opens it."""
    architectures = from_config(json.loads((directory / "config.json").read_text(encoding="utf-8")))
    return Model(ModelSource(name=directory.name, path=str(directory), architectures=architectures), None, ("",))


def judged(check: str, pair: Pair) -> Evidence:
    """What a check says of a pair."""
    judge = Judge(check, JudgeContext(check, "power", "benchmarks/power.py:1", "reference", False, CASES))
    with contextlib.suppress(ContradictingEvidence, pytest.skip.Exception):
        discovered_checks()[check].function(pair=pair, judge=judge)
    assert judge.evidence is not None
    return judge.evidence


def measured(pair: Pair) -> dict[str, dict[str, Any]]:
    """Of each check: found or not, the standard score, and the effect (cosine, or share of neurons that agree)."""
    found = {}
    for check in CHECKS:
        evidence = judged(check, pair)
        details = evidence.details
        z, effect = evidence.value, details.get("effect")
        if "joint_z" in details:
            z, effect = details["joint_z"], evidence.value
        elif isinstance(details.get("tests"), dict):
            strongest = max(details["tests"].values(), key=lambda one: abs(one["z"]))
            z, effect = strongest["z"], strongest["effect"]
        found[check] = {"found": evidence.outcome == CONTRADICTS, "z": z, "effect": effect}
    return found


def copies(zoo: Path, name: str, repeats: int) -> list[dict[str, Any]]:
    """Every kind of copy with every amount of noise, `repeats` times."""
    original = zoo / "setting" / name
    weights = read_weights(original)
    rows = []
    for copy, change in COPIES.items():
        for number, sigma in enumerate(SIGMAS):
            for repeat in range(repeats):
                seed = 1000 * number + repeat
                with tempfile.TemporaryDirectory() as directory:
                    place = Path(directory)
                    write_weights(noisy(change(weights, seed), sigma, seed), place)
                    for tokenizer in original.glob("tokenizer*"):
                        shutil.copy(tokenizer, place)
                    found = measured(Pair(opened(place), opened(original)))
                rows.append({"copy": copy, "sigma": sigma, "seed": seed, "checks": found})
    return rows


def curves(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Share found, mean z and mean effect of each check, kind of copy and amount of noise."""
    found = []
    for check in CHECKS:
        for copy in COPIES:
            for sigma in SIGMAS:
                chosen = [row["checks"][check] for row in rows if (row["copy"], row["sigma"]) == (copy, sigma)]
                means = [
                    None if any(one[name] is None for one in chosen) else sum(one[name] for one in chosen) / len(chosen)
                    for name in ("found", "z", "effect")
                ]
                found.append(
                    {"check": check, "copy": copy, "sigma": sigma, "found": means[0]}
                    | {
                        name: None if one is None else round(one, 4)
                        for name, one in zip(("z", "effect"), means[1:], strict=True)
                    }
                )
    return found


def tables(points: Sequence[dict[str, Any]], innocents: Sequence[dict[str, Any]], notes: Sequence[str]) -> str:
    """Share found, with mean z, in Markdown."""
    head = " | ".join(f"{sigma:g}" for sigma in SIGMAS)
    lines = [*notes, "", f"| check | copy | {head} |", f"|---|---|{'---|' * len(SIGMAS)}"]
    for check in CHECKS:
        for copy in COPIES:
            shown = [
                f"{one['found']:.0%} ({'-' if one['z'] is None else format(one['z'], '.1f')})"
                for one in points
                if (one["check"], one["copy"]) == (check, copy)
            ]
            lines.append(f"| {check} | {copy} | {' | '.join(shown)} |")
    lines += ["", "Independent models beside the same original: z (effect).", ""]
    lines += [f"| model | {' | '.join(CHECKS)} |", f"|---|{'---|' * len(CHECKS)}"]
    for row in innocents:
        shown = [
            f"{'found, ' if one['found'] else ''}{one['z']:.1f} ({one['effect']:.3f})" for one in row["checks"].values()
        ]
        lines.append(f"| {row['model']} | {' | '.join(shown)} |")
    return "\n".join(lines)


def plot(points: Sequence[dict[str, Any]], innocents: Sequence[dict[str, Any]], path: Path) -> None:
    """Share found and z over the noise, a panel for each kind of copy; grey: the largest z of an independent model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(COPIES), figsize=(12, 7), sharex=True, sharey="row")
    chance = max(abs(one["z"]) for row in innocents for one in row["checks"].values())
    for column, copy in enumerate(COPIES):
        for number, check in enumerate(CHECKS):
            chosen = [one for one in points if (one["check"], one["copy"]) == (check, copy)]
            sigmas = [one["sigma"] for one in chosen]
            # Lines that lie on each other show all the same.
            style = {"marker": "o", "markersize": 3, "linewidth": 5 - number, "label": check.partition(".")[2]}
            axes[0, column].plot(sigmas, [one["found"] for one in chosen], **style)
            scores = [float("nan") if one["z"] is None else one["z"] for one in chosen]
            axes[1, column].plot(sigmas, scores, **style)
        axes[1, column].axhline(chance, color="grey", linewidth=0.8, linestyle="--")
        axes[0, column].set_title(f"copy: {copy}")
        axes[1, column].set_xlabel("noise / standard deviation of the tensor")
    axes[0, 0].set_ylabel("share found")
    axes[1, 0].set_ylabel("z")
    axes[1, 0].set_xscale("log")
    axes[1, 0].set_yscale("symlog", linthresh=3)
    axes[0, 0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Make the copies, judge them, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoo", type=Path)
    parser.add_argument("--model", default="llama", help="of the half setting")
    parser.add_argument("--repeats", type=int, default=3, help="copies of each kind with each amount of noise")
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started = time.process_time()
    original = arguments.zoo / "setting" / arguments.model
    innocents = [
        {"model": name, "checks": measured(Pair(opened(arguments.zoo / "setting" / name), opened(original)))}
        for name in INNOCENTS
        if name != arguments.model
    ]
    rows = copies(arguments.zoo, arguments.model, arguments.repeats)
    points = curves(rows)
    seconds = round(time.process_time() - started)
    notes = [
        f"Share of {arguments.repeats} copies of {arguments.model} that each check finds (mean z), by noise over "
        f"standard deviation of the tensor; level of a claim with {CASES} calibrated cases. {seconds} CPU-seconds."
    ]
    text = tables(points, innocents, notes)
    print(text)
    if arguments.save:
        document = {
            "machine": machine(),
            "model": arguments.model,
            "repeats": arguments.repeats,
            "cases": CASES,
            "cpu_seconds": seconds,
            "curves": points,
            "copies": rows,
            "independent": innocents,
        }
        RESULTS.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        RESULTS.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
        plot(points, innocents, RESULTS.with_suffix(".png"))


if __name__ == "__main__":
    main()
