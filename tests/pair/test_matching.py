from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from checks.checkpoint.checkpoint import Checkpoint
from checks.pair.comparison import compare
from checks.pair.matching import OUTSIDE_LAYERS, layer_label, mlp_pairs, tensor_pairs
from checks.pair.neurons import neuron_groups

Tensors = dict[str, torch.Tensor]
Llama = Callable[..., Tensors]
Save = Callable[..., Path]
Config = Callable[..., dict[str, Any]]
EXPERTS = 3
KINDS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
MIXTRAL = {"model_type": "mixtral", "num_hidden_layers": 2, "num_local_experts": EXPERTS, "hidden_size": 32}
QWEN = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 2,
    "num_experts": EXPERTS,
    "hidden_size": 32,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mixtral(seed: int) -> Tensors:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (40, 32), "model.norm.weight": (32,)}
    for layer in range(2):
        start = f"model.layers.{layer}."
        shapes |= {f"{start}self_attn.{kind}_proj.weight": (32, 32) for kind in "qkvo"}
        shapes[f"{start}block_sparse_moe.gate.weight"] = (EXPERTS, 32)
        for expert in range(EXPERTS):
            one = f"{start}block_sparse_moe.experts.{expert}."
            shapes |= {f"{one}w1.weight": (48, 32), f"{one}w3.weight": (48, 32), f"{one}w2.weight": (32, 48)}
    return {name: 0.02 * normal(1000 * seed + number, *shape) for number, (name, shape) in enumerate(shapes.items())}


def qwen_name(name: str) -> str:
    """The name of a Mixtral tensor as Qwen3-MoE has it."""
    for theirs, ours in KINDS.items():
        name = name.replace(f".{theirs}.", f".{ours}.")
    return name.replace("block_sparse_moe", "mlp")


@pytest.fixture
def pair_of(save_checkpoint: Save) -> Callable[..., tuple[Checkpoint, Checkpoint]]:
    """Two checkpoints, from tensors and configurations."""

    def make(
        ours: Tensors, theirs: Tensors, our_config: Any = None, their_config: Any = None
    ) -> tuple[Checkpoint, Checkpoint]:
        kind = "with" if our_config else "without"
        candidate = Checkpoint(save_checkpoint(f"ours {kind} config", ours, our_config))
        return candidate, Checkpoint(save_checkpoint(f"theirs {kind} config", theirs, their_config))

    return make


def test_equal_names_and_shapes_are_paired(llama_tensors: Llama, pair_of: Any) -> None:
    theirs = llama_tensors(2, num_hidden_layers=2) | {
        "model.norm.weight": normal(1, 63),
        "lm_head.weight": normal(2, 9),
    }
    theirs["model.layers.0.mlp.up_proj.weight"] = torch.zeros(176, 64, dtype=torch.int8)
    candidate, reference = pair_of(llama_tensors(1), theirs)
    expected = {n for n in candidate.tensors if n in theirs and theirs[n].shape == candidate.tensors[n].shape}
    assert tensor_pairs(candidate, reference) == {
        name: name for name in expected - {"model.layers.0.mlp.up_proj.weight"}
    }


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_other_prefixes_are_paired_by_role(
    prefix: str, llama_tensors: Llama, llama_config: Config, pair_of: Any
) -> None:
    ours = {name.replace("model.", prefix, 1): one for name, one in llama_tensors(1).items() if "lm_head" not in name}
    ours["language_model.lm_head.weight"] = llama_tensors(1)["lm_head.weight"]
    candidate, reference = pair_of(ours, llama_tensors(1), llama_config(), llama_config())
    pairs = tensor_pairs(candidate, reference)
    assert len(pairs) == 30
    assert pairs[f"{prefix}layers.1.mlp.up_proj.weight"] == "model.layers.1.mlp.up_proj.weight"
    comparison = compare(candidate, reference, with_neurons=True)
    assert comparison.mean().cosine == pytest.approx(1)
    assert comparison.mean().coverage == 1
    assert comparison.neurons is not None
    assert [group.layer for group in comparison.neurons] == [0, 1, 2]
    assert min(group.test.effect or 0 for group in comparison.neurons) == pytest.approx(1)
    # Without configurations nothing says that they are the same.
    assert tensor_pairs(*pair_of(ours, llama_tensors(1))) == {}


def test_released_names_of_experts_are_paired_by_role(pair_of: Any) -> None:
    theirs = {qwen_name(name): tensor for name, tensor in mixtral(1).items()}
    candidate, reference = pair_of(mixtral(1), theirs, MIXTRAL, QWEN)
    assert tensor_pairs(candidate, reference) == {name: qwen_name(name) for name in candidate.tensors}
    comparison = compare(candidate, reference, with_neurons=True)
    assert comparison.mean().cosine == pytest.approx(1)
    assert comparison.category("routed expert").coverage == 1
    assert {one.reference_name for one in comparison.compared} == set(reference.tensors)
    assert comparison.neurons is not None
    assert {(group.layer, group.expert) for group in comparison.neurons} == {(n, k) for n in range(2) for k in range(3)}
    assert min(group.test.z or 0 for group in comparison.neurons) > 10
    assert tensor_pairs(*pair_of(mixtral(1), theirs)).keys() == {n for n in theirs if n in mixtral(1)}


def test_mlps_of_other_prefixes_and_modules_are_paired_by_place(pair_of: Any) -> None:
    """By the names alone layer 1 of one would be as good as any; a guess must never pair two of them with one."""
    theirs = {qwen_name(name): tensor for name, tensor in mixtral(2).items()}
    mlps = mlp_pairs(*pair_of(mixtral(1), theirs, MIXTRAL, QWEN))
    assert len(mlps) == 2 * EXPERTS
    for mlp in mlps:
        assert mlp.theirs["up"].name == qwen_name(mlp.ours["up"].name)
        assert mlp.fits
        assert mlp.elements == 3 * 48 * 32
        assert mlp.bytes == 2 * 4 * mlp.elements


def test_a_block_that_predicts_further_tokens_is_no_layer_of_the_mean(
    llama_tensors: Llama, save_checkpoint: Save
) -> None:
    """DeepSeek numbers it like the layer after the last."""
    config = {
        "model_type": "glm4_moe",
        "num_hidden_layers": 2,
        "num_nextn_predict_layers": 1,
        "first_k_dense_replace": 3,
        "hidden_size": 64,
    }
    ours, theirs = llama_tensors(1), llama_tensors(2)
    extra = {f"model.layers.2.{name}.weight": 1 + normal(number, 64) for number, name in enumerate(["enorm", "hnorm"])}
    extra["model.layers.2.eh_proj.weight"] = normal(9, 64, 128)
    theirs |= {name: tensor for name, tensor in ours.items() if ".layers.2." in name}  # inherited
    paths = [save_checkpoint(side, one | extra, config) for side, one in (("ours", ours), ("theirs", theirs))]
    candidate, reference = map(Checkpoint, paths)
    assert candidate.tensors["model.layers.2.mlp.up_proj.weight"].role.component == "mtp"
    comparison = compare(candidate, reference)
    assert comparison.layers() == [0, 1]
    assert abs(comparison.mean().cosine or 1) < 0.05
    assert comparison.mean().coverage < 1  # it is part of the candidate, and was not compared in the mean
    assert len(neuron_groups(candidate, reference)) == 3
    # Without a configuration nobody knows.
    for path in paths:
        (path / "config.json").unlink()
    guessed = compare(*map(Checkpoint, paths))
    assert guessed.layers() == [0, 1, 2]


def test_a_tensor_is_in_one_pair_at_most(pair_of: Any, llama_tensors: Llama, llama_config: Config) -> None:
    """Both names of a tensor in one file: the template gives neither the place, and names decide."""
    ours = llama_tensors(1)
    ours["model.language_model.norm.weight"] = ours["model.norm.weight"] + 1
    pairs = tensor_pairs(*pair_of(ours, llama_tensors(2), llama_config(), llama_config()))
    assert pairs["model.norm.weight"] == "model.norm.weight"
    assert len(set(pairs.values())) == len(pairs) == 30


def test_labels_name_stack_and_layer(llama_tensors: Llama, save_checkpoint: Save, llama_config: Config) -> None:
    for config in (None, llama_config()):
        checkpoint = Checkpoint(save_checkpoint("one", llama_tensors(1), config))
        labels = {name: layer_label(entry) for name, entry in checkpoint.tensors.items()}
        assert labels["model.layers.2.mlp.up_proj.weight"] == "model.layers.2"
        assert labels["lm_head.weight"] == OUTSIDE_LAYERS
        assert set(labels.values()) == {OUTSIDE_LAYERS, *(f"model.layers.{layer}" for layer in range(3))}
