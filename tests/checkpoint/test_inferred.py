from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from checks.checkpoint.canonical import CanonicalModel
from checks.checkpoint.checkpoint import Checkpoint
from checks.checkpoint.template import RoleAssignment, assign_roles
from tests.checkpoint.tiny_models import GATELESS, build

LAYER = {
    "input_layernorm.weight": (32,),
    "self_attn.q_proj.weight": (32, 32),
    "self_attn.o_proj.weight": (32, 32),
    "post_attention_layernorm.weight": (32,),
    "mlp.gate_proj.weight": (48, 32),
    "mlp.up_proj.weight": (48, 32),
    "mlp.down_proj.weight": (32, 48),
}
MODEL = {"embed_tokens.weight": (64, 32), "norm.weight": (32,), "lm_head.weight": (64, 32)}
MODEL |= {f"layers.{layer}.{name}": shape for layer in (0, 1) for name, shape in LAYER.items()}


def inferred(shapes: dict[str, tuple[int, ...]], **config: Any) -> RoleAssignment:
    assigned = assign_roles(shapes, {"model_type": "someones_own", "hidden_size": 32, "vocab_size": 64, **config})
    assert assigned.inferred_because is not None
    return assigned


def test_the_plain_arrangement_of_norms_is_recognised() -> None:
    roles = inferred(MODEL).roles
    layouts = {name: role.layout for name, role in roles.items()}
    assert layouts["layers.1.self_attn.q_proj.weight"].norm == "attention_norm"
    assert layouts["layers.1.mlp.up_proj.weight"].norm == "mlp_norm"
    assert layouts["lm_head.weight"].norm == "final_norm"
    assert layouts["layers.1.mlp.down_proj.weight"].norm is None
    assert layouts["layers.1.mlp.down_proj.weight"].residual == "writer"
    assert layouts["layers.0.input_layernorm.weight"].norm_function == "rms"
    assert roles["embed_tokens.weight"].part == "embedding"


def test_norms_with_a_bias_are_layer_norms() -> None:
    roles = inferred(MODEL | {"layers.0.input_layernorm.bias": (32,), "layers.1.input_layernorm.bias": (32,)}).roles
    assert roles["layers.0.input_layernorm.weight"].layout.norm_function == "layer"
    assert roles["layers.0.self_attn.q_proj.weight"].layout.norm == "attention_norm"


@pytest.mark.parametrize(
    "changes",
    [
        {"layers.0.pre_feedforward_layernorm.weight": (32,)},
        {"layers.0.my_own_norm.weight": (32,)},
        {"layers.0.input_layernorm.weight": None},
        {f"layers.{layer}.{name}": None for layer in (0, 1) for name in LAYER if "norm" in name},
    ],
)
def test_any_other_arrangement_is_left_open(changes: dict[str, tuple[int, ...] | None]) -> None:
    shapes = {name: shape for name, shape in (MODEL | changes).items() if shape is not None}
    assert {role.layout.norm for role in inferred(shapes).roles.values()} == {None}


def test_norms_of_heads_and_of_a_tower_do_not_matter() -> None:
    more = {f"layers.{layer}.self_attn.q_norm.weight": (8,) for layer in (0, 1)}
    more |= {f"visual.blocks.{layer}.norm3.weight": (16,) for layer in range(30)}
    roles = inferred(MODEL | more).roles
    assert roles["layers.1.self_attn.q_proj.weight"].layout.norm == "attention_norm"
    assert roles["visual.blocks.3.norm3.weight"].component == "vision"


def test_components_by_the_words_of_a_name() -> None:
    names = {"mtp.layers.0": "mtp", "visual.blocks.0": "vision", "audio_tower.layers.0": "audio", "layers.0": "text"}
    shapes = {f"{start}.mlp.up_proj.weight": (48, 32) for start in names}
    roles = inferred(shapes, num_hidden_layers=1).roles
    assert {name.removesuffix(".mlp.up_proj.weight"): role.component for name, role in roles.items()} == names


def test_a_block_that_predicts_further_tokens_may_be_numbered_anyhow() -> None:
    assigned = inferred({"mtp.layers.7.mlp.up_proj.weight": (48, 32)}, num_hidden_layers=1)
    assert assigned.problems == {}
    assert "layers.7.mlp.up_proj.weight" in inferred({"layers.7.mlp.up_proj.weight": (48, 32)}, num_layers=1).problems


def test_experts_packed_values_and_their_companions() -> None:
    stem = "layers.0.mlp.experts.3.up_proj."
    shapes = {f"{stem}weight_packed": (48, 4), f"{stem}weight_scale": (48, 1), f"{stem}weight_shape": (2,)}
    shapes |= {"layers.0.mlp.shared_expert.gate_proj.weight": (48, 32), "layers.0.mlp.gate_up_proj.weight": (96, 32)}
    roles = inferred(shapes).roles
    packed, scale = roles[f"{stem}weight_packed"], roles[f"{stem}weight_scale"]
    assert (packed.packed, packed.kind, packed.part, packed.layout.experts) == ("weight_packed", None, "up", "routed")
    assert (scale.companion_of, scale.category) == ("weight", "other")
    assert packed.mlp_place == ("text", 0, "routed", 3)
    assert roles["layers.0.mlp.shared_expert.gate_proj.weight"].mlp_place == ("text", 0, "shared", None)
    assert roles["layers.0.mlp.gate_up_proj.weight"].layout.fused == ("gate", "up")


def test_a_table_of_positions_is_no_embedding_of_tokens() -> None:
    roles = inferred({"wpe.weight": (64, 32), "embed_positions.weight": (64, 32), "wte.weight": (64, 32)}).roles
    assert {name: role.part for name, role in roles.items()} == {
        "wpe.weight": None,
        "embed_positions.weight": None,
        "wte.weight": "embedding",
    }


def test_the_summary_names_what_did_not_fit() -> None:
    shapes = MODEL | {f"layers.{layer}.mlp.up_proj.weight": (48, 32) for layer in range(2, 30)}
    summary = inferred(shapes | {"rest": (5, 5)}, num_hidden_layers=2).summary()
    assert summary["problems"]["count"] == 28
    assert len(summary["problems"]["tensors"]) == 10
    assert "someones_own" in summary["inferred_because"]
    assert summary["unassigned"]["count"] == 29
    assert (summary["templates"], summary["missing"]) == ({}, {"count": 0, "tensors": []})


@pytest.mark.parametrize("model_type", GATELESS)
def test_mlps_without_a_gate_are_those_of_the_template(tmp_path: Path, model_type: str) -> None:
    build(model_type).save_pretrained(tmp_path)
    known = CanonicalModel(Checkpoint(tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "someones_own"}))
    unknown = CanonicalModel(Checkpoint(tmp_path))
    assert "someones_own" in unknown.notes[0]
    for layer in (0, 1):
        (place,) = unknown.mlps(layer)
        assert unknown.mlps(layer) == known.mlps(layer)
        assert (place.has_gate, place.units) == (False, known.mlps(layer)[0].units)
        assert torch.equal(unknown.mlp(place).up, known.mlp(place).up)
        assert torch.equal(unknown.mlp(place).down, known.mlp(place).down)
        assert torch.equal(unknown.matrix("o", layer), known.matrix("o", layer))
    if model_type in ("gpt2", "gpt_neox", "starcoder2"):  # one norm before attention, one before the MLP
        assert torch.equal(unknown.mlp(place, folded=True).up, known.mlp(place, folded=True).up)


@pytest.mark.parametrize(
    ("up", "down", "attention"),
    [
        ("mlp.c_fc", "mlp.c_proj", "attn.c_proj"),
        ("mlp.fc_in", "mlp.fc_out", "attn.out_proj"),
        ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "self_attention.dense"),
        ("fc1", "fc2", "self_attn.out_proj"),
        ("ffn.up_proj", "ffn.down_proj", "attn.out_proj"),
    ],
)
def test_names_of_mlps_without_a_gate(up: str, down: str, attention: str) -> None:
    shapes = {
        f"{up}.weight": (48, 32),
        f"{up}.bias": (48,),
        f"{down}.weight": (32, 48),
        f"{attention}.weight": (32, 32),
    }
    roles = inferred({f"h.1.{name}": shape for name, shape in shapes.items()}).roles
    found = {name: (role.part, role.kind, role.category) for name, role in roles.items()}
    assert found == {
        f"h.1.{up}.weight": ("up", "up", "mlp"),
        f"h.1.{up}.bias": ("up_bias", None, "bias"),
        f"h.1.{down}.weight": ("down", "down", "mlp"),
        f"h.1.{attention}.weight": ("o", None, "attention"),
    }


def test_matrices_that_are_stored_input_first() -> None:
    shapes = {"mlp.c_fc.weight": (32, 48), "mlp.c_proj.weight": (48, 32), "attn.c_proj.weight": (32, 32)}
    shapes |= {"attn.c_attn.weight": (32, 96)}
    roles = inferred({f"h.{layer}.{name}": shape for layer in (0, 1) for name, shape in shapes.items()}).roles
    assert {role.layout.transposed for role in roles.values()} == {True}
    assert {role.kind for role in roles.values()} == {None}
    assert not roles["h.0.mlp.c_fc.weight"].layout.fused


@pytest.mark.parametrize("config", [{"hidden_size": None}, {"hidden_size": 48}, {"hidden_size": [32]}])
def test_which_side_comes_first_is_not_guessed_without_the_width(config: dict[str, Any]) -> None:
    shapes = {"h.0.mlp.c_fc.weight": (48, 32), "h.0.mlp.c_proj.weight": (48, 32)}
    roles = inferred(shapes, **config).roles
    assert {role.layout.transposed for role in roles.values()} == {False}


def test_a_tower_whose_mlp_is_as_wide_as_the_text_is_not_turned() -> None:
    shapes = {"visual.blocks.0.mlp.fc1.weight": (32, 8), "visual.blocks.0.mlp.fc2.weight": (8, 32)}
    roles = inferred(MODEL | shapes).roles
    assert not any(role.layout.transposed for role in roles.values())


def test_a_gate_within_what_is_called_up() -> None:
    """ChatGLM's `dense_h_to_4h` holds both halves of a gated MLP."""
    names = {"dense_h_to_4h.weight": (96, 32), "dense_4h_to_h.weight": (32, 48)}
    roles = inferred({f"layers.0.mlp.{name}": shape for name, shape in names.items()}).roles
    role = roles["layers.0.mlp.dense_h_to_4h.weight"]
    assert (role.part, role.kind, role.layout.fused) == ("gate_up", None, ("gate", "up"))
    assert roles["layers.0.mlp.dense_4h_to_h.weight"].part == "down"
    turned = {"c_fc.weight": (32, 96), "c_proj.weight": (48, 32)}
    roles = inferred({f"layers.0.mlp.{name}": shape for name, shape in turned.items()}).roles
    assert roles["layers.0.mlp.c_fc.weight"].layout.fused == ("gate", "up")
