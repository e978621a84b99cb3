from __future__ import annotations

from typing import Any

import pytest

from checks.checkpoint.template import RoleAssignment, assign_roles

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
