"""Make the lineage zoo, or what is missing of it.

    python -m tests.zoo.build --output DIR [--part full|small] [--only NAME ...] [--jobs 2]

Models that stand under DIR are left as they are, so a build that was stopped goes on where it was. The full zoo (the
halves `setting` and `scoring`) takes one to two hours on one core and half of that with --jobs 2, which makes the
halves side by side; the small one takes less than a minute. Every directory DIR/half/model is a Hugging Face checkpoint
with its tokenizer, and zoo.json says how it was made and how it went.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from examples.train import wrap
from tests.zoo import derive, symmetry
from tests.zoo.ancestry import Ancestry, ZooModel, load_ancestry
from tests.zoo.text import make_tokenizer, token_streams
from tests.zoo.train import train, validation_loss
from tests.zoo.weights import Weights, read_weights, write_weights

PARTS = {"full": ("setting", "scoring"), "small": ("small",)}
RECORD = "zoo.json"


def prepare() -> None:
    """Settings of the libraries that a build needs; called once in each process."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call, unused-ignore]
    transformers.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call, unused-ignore]


def build_order(ancestry: Ancestry, halves: tuple[str, ...]) -> list[ZooModel]:
    """The models of some halves: bases first, then by the length of their training, innocents before derivations.

    A model never stands before one that it needs.
    """

    def cost(model: ZooModel) -> tuple[bool, int, bool]:
        origin = model.kind in ("base", "initial", "snapshot")
        return not origin, model.training.steps if model.training and not origin else 0, model.kind == "derived"

    waiting = sorted((model for half in halves for model in ancestry.of_half(half)), key=cost)
    ordered: list[ZooModel] = []
    while waiting:
        known = {model.name for model in ordered}
        ready = next(model for model in waiting if known.issuperset(model.needs))
        waiting.remove(ready)
        ordered.append(ready)
    return ordered


def with_needs(ancestry: Ancestry, names: list[str]) -> set[str]:
    """These models and all that they are made of."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in ancestry.models:
            raise SystemExit(f"no model {name!r}; names are half/model, as in setting/llama")
        if name not in found:
            found.add(name)
            waiting += ancestry.models[name].needs
    return found


def build(output: Path, halves: tuple[str, ...], only: list[str] | None = None, quiet: bool = False) -> list[Path]:
    """Make what is missing of these halves, or of the models named; returns the directories of all of them."""
    prepare()
    ancestry = load_ancestry()
    wanted = with_needs(ancestry, only) if only else None
    chosen = [model for model in build_order(ancestry, halves) if wanted is None or model.name in wanted]
    for number, model in enumerate(chosen, 1):
        if (output / model.name / RECORD).is_file():
            continue
        record = make_model(model, ancestry, output)
        if not quiet:
            loss = f"{record['validation_loss_before']} -> {record['validation_loss']}"
            sys.stdout.write(f"{number}/{len(chosen)} {model.name}: loss {loss}, {record['seconds']} s\n")
            sys.stdout.flush()
    return [output / model.name for model in chosen]


def make_model(model: ZooModel, ancestry: Ancestry, output: Path) -> dict[str, Any]:
    """Make one model whose needs stand under `output`, and return what zoo.json records of it.

    The directory gets its name when it is complete, so a model is there or not.
    """
    started = time.perf_counter()
    directory = output / f"{model.name}.unfinished"
    if model.kind != "snapshot":
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
    elif not directory.is_dir():
        raise SystemExit(f"{directory} is missing: delete {output / model.parents[0]}, whose training writes it")
    tokenizer = tokenizer_of(model, output)
    tokenizer.save_pretrained(directory)
    if model.kind != "snapshot":
        write_weights(starting_weights(model, len(tokenizer), output, directory), directory, torch.float32)
    network: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    text = model.training or _training_of_origin(model, ancestry)
    stream, held_out = token_streams(tokenizer, text.text, text.characters)
    before = validation_loss(network, held_out, text.batch)
    log: list[tuple[int, float]] = []
    if model.training:
        teacher = None
        if model.training.teacher:
            teacher = AutoModelForCausalLM.from_pretrained(output / model.training.teacher, dtype=torch.float32)
        steps = {
            other.step: other for other in ancestry.models.values() if other.parents == (model.name,) and other.step
        }

        def keep(step: int, network: Any) -> None:
            if step in steps:
                network.save_pretrained(output / f"{steps[step].name}.unfinished")

        log = train(network, stream, model.training, ancestry.models[model.order].seed, teacher, keep)
        network.to(torch.bfloat16).save_pretrained(directory)
        network = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    elif model.kind != "initial":  # initial weights stay as they were drawn, bit for bit
        write_weights(read_weights(directory), directory)
    record = {
        "name": model.name,
        "kind": model.kind,
        "derivation": model.derivation,
        "parents": list(model.parents),
        "changes": [[name, dict(options)] for name, options in model.changes],
        "seed": model.seed,
        "initial": model.initial,
        "initial_seed": ancestry.models[model.initial].seed if model.initial else None,
        "text": text.text,
        "steps": model.training.steps if model.training else 0,
        "trained_tokens": model.training.tokens if model.training else 0,
        "text_tokens": len(stream),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "validation_loss_before": round(before, 4),
        "validation_loss": round(validation_loss(network, held_out, text.batch) if model.training else before, 4),
        "training_loss": log,
        "seconds": round(time.perf_counter() - started, 1),
        "versions": {library.__name__: library.__version__ for library in (torch, transformers, tokenizers)},
    }
    (directory / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(output / model.name, ignore_errors=True)
    directory.rename(output / model.name)
    return record


def _training_of_origin(model: ZooModel, ancestry: Ancestry) -> Any:
    """The training whose text judges a model that is not trained: the nearest one among its parents, or of llama."""
    for parent in model.parents:
        found = ancestry.models[parent]
        return found.training or _training_of_origin(found, ancestry)
    return ancestry.models[f"{model.half}/llama"].training


def tokenizer_of(model: ZooModel, output: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a model: made from text, or its first parent's."""
    if model.tokenizer:
        return make_tokenizer(**model.tokenizer)
    return wrap(tokenizers.Tokenizer.from_file(str(output / model.parents[0] / "tokenizer.json")))


def starting_weights(model: ZooModel, vocabulary: int, output: Path, scratch: Path) -> Weights:
    """The weights of a model before it is trained: random ones, or its parents' with the changes made.

    Random weights: torch.Generator().manual_seed(seed), then one tensor after the other by sorted name.
    """
    if model.shape:
        seed = load_ancestry().models[model.initial].seed if model.initial else model.seed
        return derive.fresh_like(empty_weights(model, vocabulary, scratch), seed)
    weights = [read_weights(output / parent) for parent in model.parents]
    for index, (name, options) in enumerate(model.changes):
        change = getattr(symmetry, name, None) or getattr(derive, name)
        given = dict(options)
        if "seed" in inspect.signature(change).parameters:
            given["seed"] = model.seed + index
        if change is derive.replace_vocabulary:
            given["size"] = vocabulary
        weights = [change(*weights, **given)]
    return weights[0]


def empty_weights(model: ZooModel, vocabulary: int, scratch: Path) -> Weights:
    """Configuration and tensors of a shape as transformers stores them; the values are of no use."""
    assert model.shape is not None
    shape = {"max_position_embeddings": 256, "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0}
    config = AutoConfig.for_model(**{**shape, **model.shape, "vocab_size": vocabulary})
    AutoModelForCausalLM.from_config(config).save_pretrained(scratch)  # type: ignore[no-untyped-call, unused-ignore]
    return read_weights(scratch)


def main() -> None:
    """Build the part that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory of the zoo")
    parser.add_argument("--part", choices=sorted(PARTS), default="full")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these models, and what they are made of")
    parser.add_argument("--jobs", type=int, default=1, choices=(1, 2), help="2: one process for each half")
    arguments = parser.parse_args()
    halves = PARTS[arguments.part]
    if arguments.only:
        halves = tuple(dict.fromkeys(name.partition("/")[0] for name in arguments.only))
    if arguments.jobs == 1 or len(halves) == 1:
        build(arguments.output, halves, arguments.only)
        return
    with ProcessPoolExecutor(max_workers=arguments.jobs) as pool:
        for future in [pool.submit(build, arguments.output, (half,), arguments.only) for half in halves]:
            future.result()


if __name__ == "__main__":
    main()
