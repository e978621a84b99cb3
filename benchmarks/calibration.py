"""Are the p-values of the exact tests uniform where nothing was inherited?

    python -m tests.zoo.build --output ZOO                       # once
    python benchmarks/calibration.py ZOO [--only mixtral …] [--draws 300] [--pairs 200] [--seed 0] [--save]

Two kinds of draws that are independent of each other, as a Kolmogorov-Smirnov test asks:

renumbered   a trained model of the zoo's half `setting` whose neurons or residual channels are renumbered at random,
             beside itself or beside an independent model. Every draw has permutations of its own.
trained      pairs of small models, each of its own random weights, all trained on the same text in the same order. No
             model is in two pairs.

The unit test (independence.units), the channel test (independence.channels) and the test of nameless tensors
(independence.tensors) are made of each. The last one takes the smaller z of rows and columns, so that its p may be too
large, and never too small: that is tested one-sided; of the axis that was renumbered two-sided. One-sided as well are
the joint tests of mixtures: the experts of a layer count as one observation there. Pairs of independent models of the
zoo share models with each other: they are listed, and not tested for uniformity.

Prints a table in Markdown; `--save` writes benchmarks/results/calibration.md, .json (with every z) and .png. `--only`:
the renumbered models of these names, without the trained pairs; saved beside what an earlier run found of the others.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from scipy.stats import kstest, norm
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from changed_checkpoint import ChangedCheckpoint  # noqa: E402
from stream import machine  # noqa: E402

from checks.checkpoint.canonical import CanonicalModel  # noqa: E402
from checks.checkpoint.checkpoint import Checkpoint  # noqa: E402
from checks.pair.channel_views import channel_tests  # noqa: E402
from checks.pair.neurons import NeuronGroup, joint_tests  # noqa: E402
from checks.statistics.ordinary import ordinary_reason  # noqa: E402
from checks.statistics.shape_pairing import ShapeSample, pair_by_shape, shape_sample  # noqa: E402
from checks.statistics.units import unit_permutation_test  # noqa: E402
from tests.zoo import derive, symmetry  # noqa: E402
from tests.zoo.ancestry import Training  # noqa: E402
from tests.zoo.weights import Mlp, Weights, read_weights, write_weights  # noqa: E402

RESULTS = HERE / "results" / "calibration"
UNITS, GATES, ONE_MLP = "units, all MLPs", "units, gates of all MLPs", "units, each MLP"
EXPERTS, EXPERT_GATES = "units, all layers of experts", "units, gates of all layers of experts"
CHANNELS = "channels, whole model"
AXES = ("tensors, channels of one pair", "tensors, neurons of one pair")
ONE_PAIR, STRONGEST = "tensors, one pair", "tensors, strongest pair, corrected"
# The p of these may be larger than uniform.
AT_LEAST_UNIFORM = (EXPERTS, EXPERT_GATES, ONE_PAIR, STRONGEST)
# Renumbered model and its reference.
SOURCES = (("llama", "llama"), ("llama_distilled", "llama"), ("qwen", "qwen"), ("mixtral", "mixtral"))
INDEPENDENT = ("llama", "llama_other_seed", "llama_other_data", "llama_distilled")
SMALL = {
    "hidden_size": 48,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "vocab_size": 512,
}
SMALL_TRAINING = Training("docs_a", steps=60, rate=3e-3, batch=(4, 64), characters=200_000)


@dataclass
class Series:
    """p-values of one test over draws that are independent of each other; z where it has one."""

    test: str
    draws_of: str
    p: list[float] = field(default_factory=list)
    z: list[float] = field(default_factory=list)

    def add(self, z: float) -> None:
        """One draw by its z."""
        self.z.append(z)
        self.p.append(float(2 * norm.sf(abs(z))))

    def row(self) -> dict[str, Any]:
        """What the p-values show."""
        one_sided = self.test in AT_LEAST_UNIFORM
        # "greater": is the distribution function anywhere above the uniform one, which small p-values would make it?
        found = kstest(self.p, "uniform", alternative="greater" if one_sided else "two-sided")
        scores = torch.tensor(self.z, dtype=torch.float64)
        return {
            "test": self.test,
            "draws_of": self.draws_of,
            "draws": len(self.p),
            "ks": round(float(found.statistic), 4),
            "ks_p": float(f"{found.pvalue:.3g}"),
            "one_sided": one_sided,
            "below_0.05": round(sum(one < 0.05 for one in self.p) / len(self.p), 4),
            "below_0.01": round(sum(one < 0.01 for one in self.p) / len(self.p), 4),
            "mean_z": round(float(scores.mean()), 3) if self.z else None,
            "sd_z": round(float(scores.std()), 3) if self.z else None,
            "largest_z": round(float(scores.abs().max()), 2) if self.z else None,
        }


class Draws:
    """All series of one kind of draws."""

    def __init__(self, draws_of: str) -> None:
        self.draws_of = draws_of
        self.series: dict[str, Series] = {}

    def add(self, test: str, z: float | None) -> None:
        """One draw of a test by its z."""
        if z is not None:
            self.series.setdefault(test, Series(test, self.draws_of)).add(z)

    def add_units(self, ours: Weights, theirs: Weights) -> None:
        """The unit test as independence.units makes it: every MLP, all of them together, and the gates alone."""
        groups = []
        for number, (one, other) in enumerate(zip(ours.mlps(), theirs.mlps(), strict=True)):
            a, b = _views(ours, one), _views(theirs, other)
            expert = number if ".experts." in one.up else None
            tests = unit_permutation_test(a, b), unit_permutation_test(a[-1:], b[-1:])
            groups.append(NeuronGroup(one.up, one.layer, "", expert, 0, *tests))
            self.add(ONE_MLP, tests[0].z)
        is_mixture = any(group.expert is not None for group in groups)
        together, gates = joint_tests(groups)
        self.add(EXPERTS if is_mixture else UNITS, together.z)
        self.add(EXPERT_GATES if is_mixture else GATES, gates.z)

    def add_channels(self, ours: CanonicalModel, theirs: CanonicalModel, vocabulary: int) -> None:
        """The channel test; all tokens are shared."""
        ids = list(range(vocabulary))
        found = channel_tests(ours, theirs, (ids, ids), permutations=0)
        self.add(CHANNELS, found and found.whole.z)

    def add_tensors(self, ours: Sequence[ShapeSample], theirs: Sequence[ShapeSample], mlp: tuple[int, int]) -> None:
        """The test of nameless tensors; `mlp`: channels and neurons, the shape whose first pair stands for one pair."""
        pairing = pair_by_shape(ours, theirs)
        chosen = next(pair for pair in pairing.pairs if ours[pair.index].shape == mlp)
        for test, z in zip((*AXES, ONE_PAIR), (chosen.z_rows, chosen.z_columns, chosen.z), strict=True):
            self.add(test, z)
        strongest = self.series.setdefault(STRONGEST, Series(STRONGEST, self.draws_of))
        strongest.p.append(math.exp(pairing.log_p or 0.0))


def _views(weights: Weights, mlp: Mlp) -> list[Tensor]:
    """Down, up and gate of an MLP with its neurons as rows."""
    return [weights.tensors[mlp.down].T, weights.tensors[mlp.up], weights.tensors[mlp.gate]]


def _samples(weights: Weights) -> list[ShapeSample]:
    return [shape_sample(tensor) for tensor in weights.tensors.values() if ordinary_reason(tensor) is None]


def _mlp_shape(weights: Weights) -> tuple[int, int]:
    neurons, channels = weights.tensors[next(weights.mlps()).up].shape
    return channels, neurons


def renumbered(zoo: Path, name: str, reference: str, draws: int, seed: int) -> Draws:
    """Draws of one trained model, renumbered at random, beside itself or another one."""
    found = Draws(f"{name} renumbered / {reference}")
    stored, other = (Checkpoint(zoo / "setting" / one) for one in (name, reference))
    ours, theirs = (read_weights(zoo / "setting" / one) for one in (name, reference))
    their_model, their_samples = CanonicalModel(other), _samples(theirs)
    for draw in range(draws):
        key = seed * 1_000_003 + draw
        neurons = symmetry.permute_neurons(ours, key)
        channels = symmetry.permute_residual(ours, key)
        both = symmetry.permute_residual(neurons, key + 500_000)
        found.add_units(neurons, theirs)
        found.add_channels(CanonicalModel(ChangedCheckpoint(stored, channels)), their_model, len(ours.tensors[EMBED]))
        found.add_tensors(_samples(both), their_samples, _mlp_shape(ours))
    return found


EMBED = "model.embed_tokens.weight"


def small_model(number: int, directory: Path) -> tuple[Weights, float, float]:
    """A small model of its own random weights, trained on the text that all share; its first and last loss."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests.zoo.text import make_tokenizer, token_streams
    from tests.zoo.train import train

    tokenizer = make_tokenizer(SMALL_TRAINING.text, SMALL["vocab_size"], SMALL_TRAINING.characters)
    stream, _ = token_streams(tokenizer, SMALL_TRAINING.text, SMALL_TRAINING.characters)
    network: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", tie_word_embeddings=False, **SMALL))
    shapes = Weights(network.config.to_dict(), {name: one.detach() for name, one in network.state_dict().items()})
    network.load_state_dict(derive.fresh_like(shapes, number).tensors)
    log = train(network, stream, SMALL_TRAINING, order=0)
    trained = Weights(shapes.config, {name: one.detach().clone() for name, one in network.state_dict().items()})
    if not (directory / "config.json").is_file():
        write_weights(trained, directory)
    return trained, log[0][1], log[-1][1]


def trained(pairs: int, seed: int, directory: Path) -> tuple[Draws, list[float]]:
    """Draws of pairs of small trained models, and the mean loss before and after training."""
    found, losses = Draws("pairs of small trained models"), []
    for pair in range(pairs):
        made = [small_model(seed * 1_000_003 + 2 * pair + side, directory) for side in (0, 1)]
        losses += [one[1:] for one in made]
        ours, theirs = (one[0] for one in made)
        stored = Checkpoint(directory)
        found.add_units(ours, theirs)
        models = [CanonicalModel(ChangedCheckpoint(stored, weights)) for weights in (ours, theirs)]
        found.add_channels(models[0], models[1], SMALL["vocab_size"])
        found.add_tensors(_samples(ours), _samples(theirs), _mlp_shape(ours))
    return found, [round(sum(one) / len(losses), 3) for one in zip(*losses, strict=True)]


def zoo_pairs(zoo: Path) -> list[dict[str, Any]]:
    """Every pair of the zoo's independent models of one shape, as trained; the pairs share models."""
    rows = []
    for name, reference in combinations(INDEPENDENT, 2):
        one = Draws(f"{name} / {reference}")
        ours, theirs = (read_weights(zoo / "setting" / side) for side in (name, reference))
        models = [CanonicalModel(Checkpoint(zoo / "setting" / side)) for side in (name, reference)]
        one.add_units(ours, theirs)
        one.add_channels(models[0], models[1], len(ours.tensors[EMBED]))
        one.add_tensors(_samples(ours), _samples(theirs), _mlp_shape(ours))
        rows.append(
            {"pair": one.draws_of}
            | {test: [round(z, 2) for z in series.z] for test, series in one.series.items() if series.z}
            | {STRONGEST: round(one.series[STRONGEST].p[0], 3)}
        )
    return rows


def tables(rows: Sequence[dict[str, Any]], pairs: Sequence[dict[str, Any]], notes: Sequence[str]) -> str:
    """The results in Markdown."""
    lines = [
        *notes,
        "",
        "| draws of | test | draws | KS | p of KS | p < .05 | p < .01 | mean z | sd z | largest abs. z |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        side = " (one-sided)" if row["one_sided"] else ""
        numbers = [row[name] for name in ("mean_z", "sd_z", "largest_z")]
        lines.append(
            f"| {row['draws_of']} | {row['test']} | {row['draws']} | {row['ks']}{side} | {row['ks_p']:.2g} "
            f"| {row['below_0.05']:.3f} | {row['below_0.01']:.3f} "
            f"| {' | '.join('' if one is None else str(one) for one in numbers)} |"
        )
    lines += ["", "Independent models of the zoo, as trained (they share models, hence no KS):", ""]
    lines += [f"| pair | {UNITS} | {CHANNELS} | {ONE_PAIR} | {STRONGEST} |", "|---|---|---|---|---|"]
    lines += [
        f"| {row['pair']} | {row[UNITS][0]} | {row[CHANNELS][0]} | {row[ONE_PAIR][0]} | p = {row[STRONGEST]} |"
        for row in pairs
    ]
    return "\n".join(lines)


def plot(series: Sequence[Series], path: Path) -> None:
    """How far each distribution of p-values lies from the uniform one, with the bounds of a KS test at 1 %."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = ("units", "channels", "tensors")
    colours = {name: f"C{number}" for number, name in enumerate(dict.fromkeys(one.draws_of for one in series))}
    figure, axes = pyplot.subplots(1, len(kinds), figsize=(13, 4.5))
    for axis, kind in zip(axes, kinds, strict=True):
        # One MLP each: of these there are more draws, and their bounds are others.
        shown = [one for one in series if one.test.startswith(kind) and one.test != ONE_MLP]
        styles = dict(zip(dict.fromkeys(one.test for one in shown), ("-", "--", ":", "-."), strict=False))
        for one in shown:
            p = sorted(one.p)
            deviation = [(rank + 1) / len(p) - value for rank, value in enumerate(p)]
            axis.plot(p, deviation, styles[one.test], color=colours[one.draws_of], linewidth=0.9)
        for test, style in styles.items():
            axis.plot([], [], style, color="black", label=test.partition(", ")[2])
        bound = 1.628 / math.sqrt(min(len(one.p) for one in shown))
        for side in (bound, -bound):
            axis.axhline(side, color="grey", linewidth=0.6)
        axis.set_title(f"independence.{kind}")
        axis.set_xlabel("p")
        axis.legend(fontsize=7, loc="lower left")
    axes[0].set_ylabel("share of draws with a smaller p, less p")
    lines = [pyplot.Line2D([], [], color=colour, label=name) for name, colour in colours.items()]
    axes[1].add_artist(axes[1].get_legend())
    axes[1].legend(handles=lines, fontsize=7, loc="upper left")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def all_draws(
    zoo: Path, draws: int, pairs: int, seed: int, directory: Path, only: Sequence[str] | None
) -> Iterator[tuple[Draws, list[float]]]:
    """One kind of draws after the other; of the trained ones their losses."""
    for name, reference in SOURCES:
        if only is None or name in only:
            yield renumbered(zoo, name, reference, draws, seed), []
    if pairs and only is None:
        yield trained(pairs, seed, directory)


def with_earlier(series: Sequence[Series], known: Sequence[dict[str, Any]]) -> list[Series]:
    """Series of this run with the saved ones of other draws, in their order."""
    fresh = dict.fromkeys(one.draws_of for one in series)
    earlier = [Series(row["test"], row["draws_of"]) for row in known if row["draws_of"] not in fresh]
    for one, row in zip(earlier, (row for row in known if row["draws_of"] not in fresh), strict=True):
        one.p += row["p"]
        for z in row["z"]:
            one.add(z)
    order = list(dict.fromkeys([*(row["draws_of"] for row in known), *fresh]))
    return sorted([*earlier, *series], key=lambda one: order.index(one.draws_of))


def main() -> None:
    """Draw, and print what the p-values look like."""
    import tempfile

    from tests.zoo.build import prepare

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoo", type=Path)
    parser.add_argument("--only", nargs="+", choices=[name for name, _ in SOURCES])
    parser.add_argument("--draws", type=int, default=300, help="of every renumbered model")
    parser.add_argument("--pairs", type=int, default=200, help="of small models that are trained for it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    prepare()
    torch.use_deterministic_algorithms(False)
    started = time.process_time()
    known = {}
    if arguments.only and RESULTS.with_suffix(".json").is_file():
        known = json.loads(RESULTS.with_suffix(".json").read_text(encoding="utf-8"))
    series: list[Series] = []
    losses: list[float] = known.get("small_models", {}).get("loss", [])
    with tempfile.TemporaryDirectory() as directory:
        for found, of_training in all_draws(
            arguments.zoo, arguments.draws, arguments.pairs, arguments.seed, Path(directory), arguments.only
        ):
            series += found.series.values()
            losses = of_training or losses
            print(f"{found.draws_of}: {time.process_time() - started:.0f} CPU-seconds", file=sys.stderr)
        pairs = known.get("independent_models_of_the_zoo") or zoo_pairs(arguments.zoo)
    seconds = round(time.process_time() - started) + known.get("cpu_seconds", 0)
    fresh = dict.fromkeys(one.draws_of for one in series)
    series = with_earlier(series, known.get("series", []))
    stated = {(row["test"], row["draws_of"]): row for row in known.get("series", []) if row["draws_of"] not in fresh}
    rows = [stated.get((one.test, one.draws_of)) or one.row() for one in series]
    smallest = min(row["ks_p"] for row in rows)
    notes = [
        f"{len(rows)} series, smallest p of a KS test {smallest:.2g} (expected of so many about {1 / len(rows):.2g}); "
        f"seed {arguments.seed}; {seconds} CPU-seconds.",
        f"Small models: {SMALL['hidden_size']} channels, {SMALL['intermediate_size']} neurons, "
        f"{SMALL['num_hidden_layers']} layers, {SMALL_TRAINING.tokens:,} training tokens each, "
        f"mean loss {' -> '.join(str(one) for one in losses)}.",
    ]
    text = tables(rows, pairs, notes)
    print(text)
    if arguments.save:
        document = {
            "machine": machine(),
            "seed": arguments.seed,
            "cpu_seconds": seconds,
            "small_models": {**SMALL, "tokens": SMALL_TRAINING.tokens, "loss": losses},
            "series": [
                {**row, "z": [round(z, 3) for z in one.z], "p": [] if one.z else [round(p, 4) for p in one.p]}
                for row, one in zip(rows, series, strict=True)
            ],
            "independent_models_of_the_zoo": pairs,
        }
        RESULTS.with_suffix(".json").write_text(json.dumps(document) + "\n", encoding="utf-8")
        RESULTS.with_suffix(".md").write_text(text + "\n", encoding="utf-8")
        plot(series, RESULTS.with_suffix(".png"))


if __name__ == "__main__":
    main()
