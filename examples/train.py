"""Train the example checkpoints: small language models of about one million parameters, and a smaller one.

    python examples/train.py [--output examples/checkpoints] [--only base|independent|derived|continued|control]

``base``         trained from random weights on one half of Python's own documentation,
``independent``  trained from other random weights on the other half (same shape, same tokenizer),
``derived``      ``base`` trained further on the source code of the standard library,
``continued``    ``base`` trained further on its own text, its log numbered on from where ``base`` ended,
``control``      a quarter of the size, trained from random weights on the same half as ``independent``.

All text ships with the interpreter; nothing is downloaded. One run takes about ten minutes on one CPU core.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import inspect
import json
import math
import os
import platform
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB_SIZE = 1024
END_OF_TEXT = "<|endoftext|>"
CONTEXT = 128
BATCH = 16
HOLD_OUT_EVERY = 16
LOG_EVERY = 10
SKIPPED_PACKAGES = {"encodings", "idlelib", "lib2to3", "pydoc_data", "this", "turtledemo"}
SKIPPED_FOLDERS = {"test", "tests"}


@dataclass(frozen=True)
class Recipe:
    """How one model is trained."""

    text: str
    """Which part of the text it is trained on: docs_a, docs_b or code."""
    seed: int
    """Seeds the initial weights (where there is no parent) and the order of the data."""
    steps: int
    learning_rate: float
    warmup: int
    parent: str | None = None
    """The example checkpoint whose weights it starts from; None: random weights."""
    first_step: int = 1
    """The number of its first step; a continued training counts on."""
    width: int = 128
    layers: int = 4


RECIPES = {
    "base": Recipe(text="docs_a", seed=1, steps=1200, learning_rate=3e-3, warmup=60),
    "independent": Recipe(text="docs_b", seed=2, steps=1200, learning_rate=3e-3, warmup=60),
    "derived": Recipe(text="code", seed=3, steps=400, learning_rate=1e-3, warmup=20, parent="base"),
    # base ends at this learning rate
    "continued": Recipe(text="docs_a", seed=4, steps=200, learning_rate=3e-4, warmup=0, parent="base", first_step=1201),
    "control": Recipe(text="docs_b", seed=5, steps=300, learning_rate=3e-3, warmup=30, width=64, layers=2),
}


# --- text -----------------------------------------------------------------------------------------


def library_files() -> list[Path]:
    """The standard library's Python files in sorted order, without its tests and without installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        known = parts[0] in sys.stdlib_module_names and parts[0] not in SKIPPED_PACKAGES
        if known and not SKIPPED_FOLDERS.intersection(parts):
            found.append(path)
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def docstrings(source: str) -> str:
    """All docstrings of one module, in the order of the file."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, documented) and (text := ast.get_docstring(node)):
            found.append((getattr(node, "lineno", 0), text))
    return "\n\n".join(text for _, text in sorted(found))


def collect_text() -> dict[str, list[str]]:
    """The three parts of the text, each a list of documents in a fixed order.

    docs_a and docs_b take turns through the help topics and the modules' docstrings; code is the modules' source.
    """
    from pydoc_data.topics import topics

    code = [path.read_text(encoding="utf-8") for path in library_files()]
    documents = [inspect.cleandoc(topics[name]) for name in sorted(topics)]
    documents += [text for source in code if (text := docstrings(source))]
    return {"docs_a": documents[0::2], "docs_b": documents[1::2], "code": code}


def describe_text(parts: dict[str, list[str]]) -> dict[str, dict[str, Any]]:
    """Number of documents, size and SHA-256 of every part, enough to tell whether another run has the same text."""
    described = {}
    for name, documents in parts.items():
        data = "\0".join(documents).encode("utf-8")
        described[name] = {"documents": len(documents), "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    return described


# --- tokenizer and data ---------------------------------------------------------------------------


def train_tokenizer(documents: list[str], vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; every text survives encoding and decoding unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return wrap(tokenizer)


def wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Make a transformers tokenizer of a bare one."""
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call, unused-ignore]
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token streams for training and for validation (every sixteenth document)."""
    train: list[int] = []
    held_out: list[int] = []
    for index, encoding in enumerate(tokenizer.backend_tokenizer.encode_batch(documents)):
        stream = held_out if index % HOLD_OUT_EVERY == HOLD_OUT_EVERY - 1 else train
        stream += [tokenizer.eos_token_id, *encoding.ids]
    return torch.tensor(train), torch.tensor(held_out)


def batches(stream: torch.Tensor, seed: int) -> Iterator[torch.Tensor]:
    """Endless random windows of the stream, always the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.arange(CONTEXT)
    while True:
        starts = torch.randint(len(stream) - CONTEXT + 1, (BATCH, 1), generator=generator)
        yield stream[starts + offsets]


# --- model and training ---------------------------------------------------------------------------


def new_model(seed: int, tokenizer: PreTrainedTokenizerFast, width: int = 128, layers: int = 4) -> LlamaForCausalLM:
    """A Llama-shaped model with random weights: by default about one million parameters with the full vocabulary."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(seed)
    return LlamaForCausalLM(config)


def learning_rate_at(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine down to a tenth of the peak; steps count from 1."""
    if step <= recipe.warmup:
        return recipe.learning_rate * step / recipe.warmup
    progress = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


@torch.no_grad()
def validation_loss(model: LlamaForCausalLM, held_out: torch.Tensor, windows: int = 256) -> float:
    """Mean loss over evenly spread windows of the held-out text."""
    whole = held_out[: len(held_out) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    chosen = whole[:: max(1, len(whole) // windows)][:windows]
    model.train(False)
    losses = [model(input_ids=part, labels=part).loss.item() * len(part) for part in torch.split(chosen, BATCH)]
    model.train()
    return float(sum(losses) / len(chosen))


def train_model(model: LlamaForCausalLM, stream: torch.Tensor, recipe: Recipe) -> list[dict[str, float]]:
    """Train the model in place and return its log; a logged loss is the one before that step's update."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    log: list[dict[str, float]] = []
    model.train()
    for step, batch in zip(range(1, recipe.steps + 1), batches(stream, recipe.seed), strict=False):
        rate = learning_rate_at(step, recipe)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step == 1 or step % LOG_EVERY == 0 or step == recipe.steps:
            number = recipe.first_step + step - 1
            entry = {"step": number, "tokens": number * batch.numel(), "loss": loss.item(), "learning_rate": rate}
            log.append({key: round(value, 6) for key, value in entry.items()})
        if step % 100 == 0:
            print(f"step {step} of {recipe.steps}: loss {loss.item():.3f}", flush=True)
    return log


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, log: list[dict[str, float]], to: Path) -> None:
    """Write weights (bfloat16), configuration, tokenizer and training log to one directory."""
    model.bfloat16().save_pretrained(to)
    tokenizer.save_pretrained(to)
    lines = [json.dumps(entry) + "\n" for entry in log]
    (to / "training_log.jsonl").write_text("".join(lines), encoding="utf-8")


def make_checkpoint(name: str, recipe: Recipe, parts: dict[str, list[str]], output: Path) -> dict[str, Any]:
    """Train one example from its recipe, write its directory and return what training.json records about it.

    A model with a parent takes the parent's tokenizer; the others share one trained on all the documentation.
    """
    started = time.perf_counter()
    if recipe.parent is None:
        tokenizer = train_tokenizer(parts["docs_a"] + parts["docs_b"])
        model = new_model(recipe.seed, tokenizer, recipe.width, recipe.layers)
    else:
        tokenizer = wrap(Tokenizer.from_file(str(output / recipe.parent / "tokenizer.json")))
        model = LlamaForCausalLM.from_pretrained(output / recipe.parent, dtype=torch.float32)
    stream, held_out = encode(tokenizer, parts[recipe.text])
    before = validation_loss(model, held_out)
    log = train_model(model, stream, recipe)
    record = {
        **asdict(recipe),
        "parameters": model.num_parameters(),
        "text_tokens": len(stream),
        "trained_tokens": recipe.steps * BATCH * CONTEXT,
        "validation_loss_before": round(before, 4),
        "validation_loss": round(validation_loss(model, held_out), 4),
        "seconds": round(time.perf_counter() - started),
    }
    save(model, tokenizer, log, output / name)
    return record


def main() -> None:
    """Train the requested examples and record them in training.json next to the checkpoints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "checkpoints")
    parser.add_argument(
        "--only", choices=sorted(RECIPES), help="train this one only (derived and continued need base in place)"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (the stored checkpoints used 1)")
    arguments = parser.parse_args()

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call, unused-ignore]
    arguments.output.mkdir(parents=True, exist_ok=True)
    record_path = arguments.output / "training.json"
    known = json.loads(record_path.read_text(encoding="utf-8")) if record_path.exists() else {}
    environment = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }
    parts = collect_text()
    for name in [arguments.only] if arguments.only else RECIPES:
        record = make_checkpoint(name, RECIPES[name], parts, arguments.output)
        known[name] = {**record, **environment, "text_parts": describe_text(parts)}
        record_path.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
        print(f"{name}: {json.dumps(record)}", flush=True)


if __name__ == "__main__":
    main()
