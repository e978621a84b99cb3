from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from checks.catalog.architecture import Architecture, from_config
from checks.checkpoint.checkpoint import Checkpoint
from checks.claim.model import ModelSource
from checks.claim.training import Training
from checks.pair.candidate import Candidate
from checks.pair.declared import declared_differences, mismatched_dimensions

Tensors = dict[str, torch.Tensor]
Make = Callable[..., Candidate]


@pytest.fixture
def candidate(
    llama_config: Callable[..., dict[str, Any]],
    llama_tensors: Callable[..., Tensors],
    save_checkpoint: Callable[..., Path],
) -> Make:
    """A candidate with a Llama configuration (after `changes`) and tensors that fit the unchanged one, or `tensors`."""

    def make(tensors: Tensors | None = None, stated: float | None = None, **changes: Any) -> Candidate:
        directory = save_checkpoint("candidate", llama_tensors() if tensors is None else tensors)
        architectures = from_config(llama_config(**changes))
        source = ModelSource("candidate", path=str(directory), architectures=architectures)
        return Candidate(source, None, ("",), Training(total=stated), frozenset())

    return make


def test_configuration_and_shapes_of_one_model_agree_exactly(candidate: Make) -> None:
    sizes = declared_differences(candidate())
    assert sizes.differences == {"configuration and shapes": 0.0}
    assert sizes.details["dimensions"] == {}
    assert sizes.missing == ""


def test_every_pair_of_totals_is_compared(candidate: Make) -> None:
    total = candidate().checkpoint.parameters
    sizes = declared_differences(candidate(stated=2.0 * total))
    assert sizes.differences == {
        "claim and configuration": 0.5,
        "claim and shapes": 0.5,
        "configuration and shapes": 0.0,
    }
    assert sizes.details["totals"] == {"claim": 2 * total, "configuration": total, "shapes": total}


def test_published_total_is_compared_with_the_configuration() -> None:
    entry = Candidate(
        ModelSource("solar", catalog_key="solar_open_100b"), None, ("",), Training(total=102.6e9), frozenset()
    )
    sizes = declared_differences(entry)
    assert sizes.differences == {"claim and published": 0.0}
    assert "stored shapes" in sizes.missing


def test_size_of_a_component_is_not_compared_with_the_whole_model(
    llama_config: Callable[..., dict[str, Any]],
    llama_tensors: Callable[..., Tensors],
    save_checkpoint: Callable[..., Path],
) -> None:
    tensors = {f"text.{name}": tensor for name, tensor in llama_tensors().items()} | {"vision.a": torch.ones(99)}
    directory = save_checkpoint("vlm", tensors)
    architectures = {"text": from_config(llama_config())["model"], "vision": Architecture(hidden_size=8)}
    source = ModelSource("vlm", catalog_key="solar_open_100b", path=str(directory), architectures=architectures)
    sizes = declared_differences(Candidate(source, "text", ("text.",), Training(total=102.6e9), frozenset()))
    assert sizes.differences == {"configuration and shapes": 0.0}


def test_without_weights_the_missing_side_is_named(llama_config: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    source = ModelSource("gone", path=str(tmp_path / "gone"), architectures=from_config(llama_config()))
    sizes = declared_differences(Candidate(source, None, ("",), Training(), frozenset()))
    assert sizes.differences == {}
    assert "gone" in sizes.missing


def test_configuration_that_cannot_be_counted_is_named(
    candidate: Make, llama_config: Callable[..., dict[str, Any]]
) -> None:
    opened = candidate()
    source = ModelSource("c", path=opened.source.path, architectures={"model": Architecture(hidden_size=64)})
    sizes = declared_differences(Candidate(source, None, ("",), Training(), frozenset()))
    assert sizes.differences == {}
    assert "cannot count the parameters" in sizes.missing


DIMENSIONS = {"vocab_size": 300, "hidden_size": 96, "num_hidden_layers": 5}


@pytest.mark.parametrize(("key", "value"), DIMENSIONS.items())
def test_dimension_that_the_shapes_contradict_is_named(key: str, value: int, candidate: Make) -> None:
    sizes = declared_differences(candidate(**{key: value}))
    assert sizes.differences[key] == 1.0
    assert set(sizes.details["dimensions"]) == {key}
    assert str(value) in sizes.details["dimensions"][key]


def test_missing_layer_is_named(candidate: Make, llama_tensors: Callable[..., Tensors]) -> None:
    tensors = {name: tensor for name, tensor in llama_tensors().items() if ".layers.1." not in name}
    assert declared_differences(candidate(tensors)).differences["num_hidden_layers"] == 1.0


def test_padded_vocabulary_is_no_contradiction(candidate: Make) -> None:
    assert "vocab_size" not in declared_differences(candidate(vocab_size=250)).differences


@pytest.mark.parametrize(("stored", "agrees"), [(3, True), (4, True), (5, False), (2, False)])
def test_prediction_blocks_may_be_stored_or_not(
    stored: int, agrees: bool, llama_tensors: Callable[..., Tensors], save_checkpoint: Callable[..., Path]
) -> None:
    checkpoint = Checkpoint(save_checkpoint("mtp", llama_tensors(num_hidden_layers=stored)))
    found = mismatched_dimensions(checkpoint, Architecture(num_hidden_layers=3, num_nextn_predict_layers=1))
    assert ("num_hidden_layers" not in found) == agrees


@pytest.mark.parametrize(("configured", "agrees"), [(3, True), (4, False), (2, False)])
def test_a_block_that_the_template_knows_is_no_layer(
    configured: int,
    agrees: bool,
    llama_tensors: Callable[..., Tensors],
    llama_config: Callable[..., dict[str, Any]],
    save_checkpoint: Callable[..., Path],
) -> None:
    """Three layers and a block of GLM-4-MoE: four stored numbers are not the four layers of another statement."""
    tensors = llama_tensors(num_hidden_layers=4) | {"model.layers.3.eh_proj.weight": torch.ones(64, 128)}
    directory = save_checkpoint("mtp", tensors)
    config = llama_config(num_hidden_layers=3) | {"model_type": "glm4_moe", "num_nextn_predict_layers": 1}
    (directory / "config.json").write_text(json.dumps(config | {"first_k_dense_replace": 3}))
    architecture = Architecture(num_hidden_layers=configured, num_nextn_predict_layers=1)
    found = mismatched_dimensions(Checkpoint(directory), architecture)
    assert found.get("num_hidden_layers") == (None if agrees else f"configured {configured}, stored 3")


def test_a_block_of_its_own_names_is_no_layer(
    llama_tensors: Callable[..., Tensors], save_checkpoint: Callable[..., Path]
) -> None:
    """K-EXAONE's `mtp.layers.0`, here of an unknown model type."""
    tensors = llama_tensors(num_hidden_layers=3)
    tensors |= {
        name.replace("model.layers.0.", "mtp.layers.0."): value
        for name, value in tensors.items()
        if ".layers.0." in name
    }
    checkpoint = Checkpoint(save_checkpoint("mtp", tensors))
    for configured, agrees in ((3, True), (2, False), (4, False)):
        found = mismatched_dimensions(
            checkpoint, Architecture(num_hidden_layers=configured, num_nextn_predict_layers=1)
        )
        assert ("num_hidden_layers" not in found) == agrees


def test_tied_embeddings_agree_when_they_are_stored_once(
    candidate: Make, llama_tensors: Callable[..., Tensors]
) -> None:
    tied = {name: tensor for name, tensor in llama_tensors().items() if name != "lm_head.weight"}
    assert declared_differences(candidate(tied, tie_word_embeddings=True)).differences["configuration and shapes"] == 0


def test_tied_embeddings_agree_when_they_are_stored_twice(
    candidate: Make, llama_tensors: Callable[..., Tensors]
) -> None:
    """Many published checkpoints store the head as a copy of the tied embedding."""
    twice = llama_tensors()
    twice["lm_head.weight"] = twice["model.embed_tokens.weight"]
    assert declared_differences(candidate(twice, tie_word_embeddings=True)).differences["configuration and shapes"] == 0


def test_vision_tower_deeper_than_the_text_is_no_contradiction(
    candidate: Make, llama_tensors: Callable[..., Tensors]
) -> None:
    """Layer numbers of a vision tower are not those of the text decoder."""
    tensors = llama_tensors() | {f"visual.blocks.{n}.attn.qkv.weight": torch.ones(4, 4) for n in range(8)}
    opened = candidate(tensors)
    architectures = {"text": opened.source.architectures["model"], "vision": Architecture(num_hidden_layers=8)}
    source = ModelSource("vlm", path=opened.source.path, architectures=architectures)
    sizes = declared_differences(Candidate(source, None, ("",), Training(), frozenset()))
    assert "num_hidden_layers" not in sizes.differences


def test_packed_weights_are_not_counted_as_parameters(candidate: Make, llama_tensors: Callable[..., Tensors]) -> None:
    """Eight 4-bit weights in one int32: the sum of the stored shapes is no number of parameters then."""
    packed: Tensors = {}
    for name, tensor in llama_tensors().items():
        if "proj" not in name:
            packed[name] = tensor
            continue
        rows, columns = tensor.shape
        packed[name.replace("weight", "qweight")] = torch.ones(columns // 8, rows, dtype=torch.int32)
    sizes = declared_differences(candidate(packed))
    assert all(difference < 0.1 for difference in sizes.differences.values())


def test_rotary_buffers_do_not_matter(candidate: Make, llama_tensors: Callable[..., Tensors]) -> None:
    extra = {"model.rotary_emb.inv_freq": torch.ones(8)}
    assert declared_differences(candidate(llama_tensors() | extra)).differences["configuration and shapes"] < 1e-3


def test_tensors_that_the_model_type_needs_and_the_checkpoint_lacks_are_named(
    candidate: Make, llama_tensors: Callable[..., Tensors], llama_config: Callable[..., dict[str, Any]]
) -> None:
    directory = candidate().checkpoint.directory
    (directory / "config.json").write_text(json.dumps(llama_config()))
    assert declared_differences(candidate()).details["missing_tensors"] == {"count": 0, "names": []}
    tensors = {name: tensor for name, tensor in llama_tensors().items() if "layers.1.mlp.up_proj" not in name}
    missing = declared_differences(candidate(tensors)).details["missing_tensors"]
    assert missing == {"count": 1, "names": ["model.layers.1.mlp.up_proj.weight"]}
