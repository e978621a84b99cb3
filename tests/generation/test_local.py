"""Local models: the greedy text of real small checkpoints, and what cannot or must not be run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from checks.checkpoint.errors import CheckpointUnavailable
from checks.generation.local import LocalTextModel
from checks.generation.prompts import continuations
from checks.generation.text_model import LocalModelUnavailable, NotOffered

TEMPLATE = "{% for message in messages %}User: {{ message['content'] }}\n{% endfor %}Assistant:"


@pytest.fixture
def copied(examples: Path, tmp_path: Path) -> Path:
    """A copy of the base model that a test may spoil."""
    return Path(shutil.copytree(examples / "base", tmp_path / "copy"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_the_text_is_the_greedy_one(examples: Path) -> None:
    text = "The interpreter of the language reads the"
    tokenizer = AutoTokenizer.from_pretrained(examples / "base")
    network = AutoModelForCausalLM.from_pretrained(examples / "base")
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.inference_mode():
        for _ in range(6):
            ids = torch.cat([ids, network(ids).logits[:, -1:].argmax(-1)], dim=1)
    expected = tokenizer.decode(ids[0])[len(text) :]
    with LocalTextModel(examples / "base", "base") as model:
        assert model.complete(text, 6) == expected
        assert model.complete(text, 6) == expected
        assert expected.startswith(model.complete(text, 2))


def test_many_texts_are_answered_as_one_by_one_and_in_order(examples: Path) -> None:
    texts = [prompt.text for prompt in continuations().prompts[:40:2]]
    with LocalTextModel(examples / "base", "base") as model:
        together = model.complete_all(texts, 3)
        assert together == model.complete_all(texts, 3)
        alone = [model.complete(text, 3) for text in texts]
        assert model.complete_all([], 3) == []
    # Sums in another order may tip a near tie.
    assert sum(one == other for one, other in zip(together, alone, strict=True)) >= 19
    assert len(set(alone)) > 5


def test_decoding_of_the_checkpoint_does_not_count(copied: Path, examples: Path) -> None:
    """Sampling, penalties and forced tokens in generation_config.json would hide the model."""
    edit(copied / "generation_config.json", do_sample=True, temperature=3.0, repetition_penalty=9.0, num_beams=3)
    texts = []
    for directory in (copied, examples / "base"):
        with LocalTextModel(directory, "model") as model:
            texts.append(model.complete("This module provides functions for", 6))
    assert texts[0] == texts[1]


def test_chat_needs_a_template(copied: Path, examples: Path) -> None:
    with LocalTextModel(examples / "base", "base") as model, pytest.raises(NotOffered, match="no chat template"):
        model.reply("Who are you?", 4)
    edit(copied / "tokenizer_config.json", chat_template=TEMPLATE)
    with LocalTextModel(copied, "base") as model:
        assert model.reply("Who are you?", 4) == model.complete("User: Who are you?\nAssistant:", 4)


def test_a_template_that_fails(copied: Path) -> None:
    edit(copied / "tokenizer_config.json", chat_template="{{ raise_exception('no') }}")
    with LocalTextModel(copied, "base") as model, pytest.raises(LocalModelUnavailable, match="chat template"):
        model.reply("Who are you?", 4)


def remove_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def remove_tensor(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def widen(directory: Path) -> None:
    edit(directory / "config.json", intermediate_size=360)


def cut(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100_000])


def ask_for_code(directory: Path) -> None:
    edit(directory / "config.json", model_type="unknown", auto_map={"AutoModelForCausalLM": "evil.Model"})
    (directory / "evil.py").write_text("raise SystemExit('code of a checkpoint was run')")


def pickle_only(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def remove_tokenizer(directory: Path) -> None:
    for path in directory.glob("tokenizer*"):
        path.unlink()


@pytest.mark.parametrize(
    "spoil", [remove_weights, remove_tensor, widen, cut, ask_for_code, pickle_only, remove_tokenizer]
)
def test_what_cannot_be_run_is_unavailable(copied: Path, spoil: Callable[[Path], None]) -> None:
    spoil(copied)
    with LocalTextModel(copied, "spoilt") as model, pytest.raises(LocalModelUnavailable, match="spoilt") as failure:
        model.complete("The", 2)
    assert isinstance(failure.value, CheckpointUnavailable)


def test_weights_beyond_the_memory_are_not_loaded(copied: Path) -> None:
    with (copied / "more.safetensors").open("wb") as file:
        file.truncate(2**43)
    with LocalTextModel(copied, "huge") as model, pytest.raises(LocalModelUnavailable, match=r"need about .* GB"):
        model.complete("The", 2)


def test_nothing_is_printed(examples: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with LocalTextModel(examples / "base", "base") as model:
        model.complete("The", 2)
    assert capfd.readouterr() == ("", "")
