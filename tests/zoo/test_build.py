"""The small zoo is complete and opens like any checkpoint; a build goes on where it was stopped."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.zoo import build as zoo
from tests.zoo.ancestry import load_ancestry
from tests.zoo.derive import draw
from tests.zoo.text import documents, make_tokenizer, token_streams


def record(directory: Path) -> dict[str, Any]:
    """What zoo.json says of a model."""
    content: dict[str, Any] = json.loads((directory / "zoo.json").read_text(encoding="utf-8"))
    return content


def test_the_small_zoo_is_complete_and_opens(small_zoo: Path) -> None:
    models = load_ancestry().of_half("small")
    assert sorted(path.name for path in small_zoo.iterdir()) == sorted(m.name.removeprefix("small/") for m in models)
    for model in models:
        directory = small_zoo / model.name.removeprefix("small/")
        network = AutoModelForCausalLM.from_pretrained(directory)
        ids = AutoTokenizer.from_pretrained(directory)("def main():\n", return_tensors="pt").input_ids
        assert torch.isfinite(network(input_ids=ids).logits).all()
        assert network.config.vocab_size == len(AutoTokenizer.from_pretrained(directory))
        expected = torch.float32 if model.kind == "initial" else torch.bfloat16
        assert {tensor.dtype for tensor in load_file(directory / "model.safetensors").values()} == {expected}
        assert record(directory)["derivation"] == model.derivation


def test_training_lowered_the_loss_and_symmetries_kept_it(small_zoo: Path) -> None:
    losses = {path.name: record(path)["validation_loss"] for path in small_zoo.iterdir()}
    assert losses["llama"] < losses["llama_initial"] - 1
    for name in ("llama_neurons_permuted", "llama_residual_permuted", "llama_rotated"):
        assert losses[name] == pytest.approx(losses["llama"], abs=0.01), name
    assert losses["llama_new_tokenizer_rotated_permuted"] == pytest.approx(losses["llama_new_tokenizer"], abs=0.01)
    assert losses["llama_shuffled"] > losses["llama"] + 1


def test_initial_weights_can_be_drawn_again_from_what_is_recorded(small_zoo: Path) -> None:
    for name in ("llama", "llama_twin"):
        seed = record(small_zoo / name)["initial_seed"]
        generator = torch.Generator().manual_seed(seed)
        initial = load_file(small_zoo / "llama_initial" / "model.safetensors")
        for tensor in sorted(initial):
            assert torch.equal(initial[tensor], draw(tensor, initial[tensor].shape, generator)), tensor


def test_the_twin_starts_where_llama_did_and_the_innocent_does_not(small_zoo: Path) -> None:
    """Weights trained for a short time still point where they started."""

    def weights(name: str) -> torch.Tensor:
        return load_file(small_zoo / name / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].float().flatten()

    def cosine(name: str) -> float:
        return float(torch.nn.functional.cosine_similarity(weights("llama"), weights(name), dim=0))

    assert cosine("llama_twin") > 0.3
    assert abs(cosine("llama_other_data")) < 0.1


def test_the_graft_starts_from_initial_weights_and_two_trained_layers(small_zoo: Path, tmp_path: Path) -> None:
    recipe = load_ancestry().models["scoring/llama_grafted"]
    graft = replace(recipe, parents=("small/llama_initial", "small/llama"))
    started = zoo.starting_weights(graft, 0, small_zoo.parent, tmp_path).tensors
    initial, trained = (load_file(small_zoo / name / "model.safetensors") for name in ("llama_initial", "llama"))
    assert set(started) == set(initial)
    for name, tensor in started.items():
        source = trained if name.startswith(("model.layers.2.", "model.layers.3.")) else initial
        assert torch.equal(tensor, source[name].float()), name


def test_a_build_makes_only_what_is_missing(small_zoo: Path, tmp_path: Path) -> None:
    output = tmp_path / "zoo"
    for name in ("llama_initial", "llama", "llama_rotated"):
        shutil.copytree(small_zoo / name, output / "small" / name)
    stamp = (output / "small/llama/zoo.json").stat().st_mtime_ns
    (output / "small/llama_rotated/zoo.json").unlink()  # a model without its record is not finished
    stopped = output / "small/llama_rotated.unfinished"
    stopped.mkdir()
    (stopped / "model.safetensors").write_bytes(b"half a file")
    zoo.build(output, ("small",), only=["small/llama_rotated"], quiet=True)
    assert not stopped.exists()
    assert (output / "small/llama/zoo.json").stat().st_mtime_ns == stamp
    remade, first = (
        place / "model.safetensors" for place in (output / "small/llama_rotated", small_zoo / "llama_rotated")
    )
    assert remade.read_bytes() == first.read_bytes()
    assert {path.name for path in (output / "small").iterdir()} == {"llama_initial", "llama", "llama_rotated"}


def test_a_lost_snapshot_says_what_to_do(tmp_path: Path) -> None:
    ancestry = load_ancestry()
    with pytest.raises(SystemExit, match=r"delete .*llama, whose training writes it"):
        zoo.make_model(ancestry.models["setting/llama_step_50"], ancestry, tmp_path)


def test_texts_are_disjoint_and_limited() -> None:
    some = {text: [next(found) for found in [documents(text)] for _ in range(20)] for text in ("a", "b", "docs_a")}
    assert not set(some["a"]) & set(some["b"])
    assert some["docs_a"][0] == some["a"][0]
    with pytest.raises(ValueError, match="text 'c'"):
        next(documents("c"))
    tokenizer = make_tokenizer("docs_a", 512, 20_000)
    stream, held_out = token_streams(tokenizer, "docs_a", 20_000)
    assert 3_000 < len(stream) + len(held_out) < 20_000
    assert int(stream.max()) < len(tokenizer) == 512
