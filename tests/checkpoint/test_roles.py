from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checks.checkpoint.roles import CATEGORIES, Role, role_of

LLAMA = {
    "model.embed_tokens.weight": Role("embedding"),
    "model.norm.weight": Role("norm"),
    "lm_head.weight": Role("output"),
    "model.layers.0.input_layernorm.weight": Role("norm", 0),
    "model.layers.11.post_attention_layernorm.weight": Role("norm", 11),
    "model.layers.2.self_attn.q_proj.weight": Role("attention", 2),
    "model.layers.2.self_attn.k_proj.weight": Role("attention", 2),
    "model.layers.2.self_attn.v_proj.weight": Role("attention", 2),
    "model.layers.2.self_attn.o_proj.weight": Role("attention", 2),
    "model.layers.31.mlp.gate_proj.weight": Role("mlp", 31, "gate"),
    "model.layers.31.mlp.up_proj.weight": Role("mlp", 31, "up"),
    "model.layers.31.mlp.down_proj.weight": Role("mlp", 31, "down"),
}
META_LLAMA = {
    "tok_embeddings.weight": Role("embedding"),
    "output.weight": Role("output"),
    "norm.weight": Role("norm"),
    "layers.3.attention.wq.weight": Role("attention", 3),
    "layers.3.attention_norm.weight": Role("norm", 3),
    "layers.3.ffn_norm.weight": Role("norm", 3),
    "layers.3.feed_forward.w1.weight": Role("mlp", 3, "gate"),
    "layers.3.feed_forward.w3.weight": Role("mlp", 3, "up"),
    "layers.3.feed_forward.w2.weight": Role("mlp", 3, "down"),
}
QWEN2 = {
    "model.layers.5.self_attn.q_proj.bias": Role("bias", 5, index_has_meaning=True),
    "model.layers.5.self_attn.k_proj.bias": Role("bias", 5, index_has_meaning=True),
    "model.layers.5.self_attn.v_proj.bias": Role("bias", 5, index_has_meaning=True),
}
MIXTRAL = {
    "model.layers.7.block_sparse_moe.gate.weight": Role("router", 7),
    "model.layers.7.block_sparse_moe.experts.0.w1.weight": Role("routed expert", 7, "gate", 0),
    "model.layers.7.block_sparse_moe.experts.3.w2.weight": Role("routed expert", 7, "down", 3),
    "model.layers.7.block_sparse_moe.experts.63.w3.weight": Role("routed expert", 7, "up", 63),
}
QWEN2_MOE = {
    "model.layers.1.mlp.gate.weight": Role("router", 1),
    "model.layers.1.mlp.experts.59.gate_proj.weight": Role("routed expert", 1, "gate", 59),
    "model.layers.1.mlp.experts.59.down_proj.weight": Role("routed expert", 1, "down", 59),
    "model.layers.1.mlp.shared_expert.up_proj.weight": Role("shared expert", 1, "up"),
    "model.layers.1.mlp.shared_expert_gate.weight": Role("shared expert", 1),
}
DEEPSEEK = {
    "model.layers.60.self_attn.q_a_proj.weight": Role("attention", 60),
    "model.layers.60.self_attn.q_b_proj.weight": Role("attention", 60),
    "model.layers.60.self_attn.kv_a_proj_with_mqa.weight": Role("attention", 60),
    "model.layers.60.self_attn.kv_b_proj.weight": Role("attention", 60),
    # The index of a latent dimension has no meaning of its own, unlike that of a rotary frequency.
    "model.layers.60.self_attn.q_a_layernorm.weight": Role("norm", 60),
    "model.layers.60.self_attn.kv_a_layernorm.weight": Role("norm", 60),
    "model.layers.60.mlp.shared_experts.down_proj.weight": Role("shared expert", 60, "down"),
    "model.layers.60.mlp.experts.255.up_proj.weight": Role("routed expert", 60, "up", 255),
    "model.layers.60.mlp.gate.e_score_correction_bias": Role("bias", 60, index_has_meaning=True),
    "model.layers.60.post_mlp_layernorm.weight": Role("norm", 60),
}
QWEN_VISION = {
    "patch_embed.proj.weight": Role("embedding"),
    "blocks.31.norm1.weight": Role("norm", 31),
    "blocks.31.attn.qkv.weight": Role("attention", 31),
    "blocks.31.attn.qkv.bias": Role("bias", 31, index_has_meaning=True),
    "blocks.31.attn.proj.weight": Role("attention", 31),
    "blocks.31.mlp.gate_proj.weight": Role("mlp", 31, "gate"),
    "blocks.31.mlp.gate_proj.bias": Role("bias", 31, index_has_meaning=True),
    "blocks.31.mlp.down_proj.weight": Role("mlp", 31, "down"),
    "merger.ln_q.weight": Role("norm"),
    "merger.mlp.0.weight": Role("mlp"),
    "merger.mlp.2.bias": Role("bias", index_has_meaning=True),
}
ROTARY_NORMS = {
    "model.layers.4.self_attn.q_norm.weight": Role("norm", 4, index_has_meaning=True),
    "model.layers.4.self_attn.k_norm.weight": Role("norm", 4, index_has_meaning=True),
    "model.layers.4.self_attn.q_layernorm.weight": Role("norm", 4, index_has_meaning=True),
}
GPT2 = {
    "transformer.wte.weight": Role("embedding"),
    "transformer.h.9.ln_1.weight": Role("norm", 9),
    "transformer.h.9.ln_2.bias": Role("norm", 9),
    "transformer.ln_f.weight": Role("norm"),
    "transformer.h.9.attn.c_attn.weight": Role("attention", 9),
    "transformer.h.9.attn.bias": Role("bias", 9, index_has_meaning=True),
}
KNOWN = LLAMA | META_LLAMA | QWEN2 | MIXTRAL | QWEN2_MOE | DEEPSEEK | QWEN_VISION | ROTARY_NORMS | GPT2


@pytest.mark.parametrize(("name", "role"), KNOWN.items(), ids=list(KNOWN))
def test_role_of_a_known_name(name: str, role: Role) -> None:
    assert role_of(name) == role


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.", "thinker."])
@pytest.mark.parametrize("name", [name for name in KNOWN if name not in META_LLAMA])
def test_a_component_prefix_does_not_change_the_role(prefix: str, name: str) -> None:
    assert role_of(prefix + name) == KNOWN[name]


@pytest.mark.parametrize(
    ("name", "category"),
    [
        # DBRX keeps its attention in a module called norm_attn_norm.
        ("transformer.blocks.3.norm_attn_norm.attn.Wqkv.weight", "attention"),
        ("transformer.blocks.3.norm_attn_norm.attn.out_proj.weight", "attention"),
        ("transformer.blocks.3.norm_attn_norm.norm_1.weight", "norm"),
        # transformers 5 fuses the experts of a layer into one tensor without expert numbers.
        ("model.layers.3.mlp.experts.gate_up_proj", "routed expert"),
        ("model.layers.3.mlp.experts.down_proj", "routed expert"),
    ],
)
def test_category_of_fused_and_nested_names(name: str, category: str) -> None:
    assert role_of(name).category == category


def test_matrices_of_an_mlp_are_known_by_kind_and_nothing_else_is() -> None:
    kinds = {name: role_of(name).kind for name in KNOWN}
    for kind in ("gate", "up", "down"):
        assert kinds[f"model.layers.31.mlp.{kind}_proj.weight"] == kind
    assert kinds["model.layers.7.block_sparse_moe.experts.3.w2.weight"] == "down"
    assert kinds["model.layers.1.mlp.shared_expert.up_proj.weight"] == "up"
    for name in ("model.layers.1.mlp.gate.weight", "blocks.31.mlp.gate_proj.bias", "lm_head.weight"):
        assert kinds[name] is None


def test_the_stack_is_what_precedes_the_layer_number() -> None:
    assert role_of("model.layers.31.mlp.up_proj.weight").stack == "model.layers."
    assert role_of("visual.blocks.3.mlp.up_proj.weight").stack == "visual.blocks."
    assert role_of("lm_head.weight").stack == ""


def test_bias_of_an_mlp_matrix_is_no_matrix_of_it() -> None:
    assert role_of("model.layers.0.mlp.up_proj.bias").kind is None


def test_name_that_says_nothing_is_other() -> None:
    assert role_of("weights_0") == Role("other")
    assert role_of("") == Role("other")


def test_number_that_is_no_layer_number_is_not_taken_for_one() -> None:
    assert role_of("model.layers.12345678.self_attn.q_proj.weight").layer is None
    assert role_of("model.mylayers.3.weight").layer is None
    assert role_of("model.layers.3a.weight").layer is None
    assert role_of("visual.merger.mlp.0.weight").layer is None


@given(st.text())
def test_any_string_has_a_role(name: str) -> None:
    role = role_of(name)
    assert role.category in CATEGORIES
    assert role.kind in (None, "gate", "up", "down")
    assert role == role_of(name)


_PARTS = st.sampled_from(
    [*{part for name in KNOWN for part in name.split(".")}, "experts", "layers", "7", "٣", "İ", "", "bias", "norm"]
)


@given(st.lists(_PARTS, max_size=8).map(".".join))
def test_any_mixture_of_known_parts_has_a_consistent_role(name: str) -> None:
    role = role_of(name)
    assert role.category in CATEGORIES
    assert role.kind in (None, "gate", "up", "down")
    if role.category == "bias":
        assert role.kind is None
        assert role.index_has_meaning


@given(layer=st.integers(0, 999_999), expert=st.integers(0, 999_999))
def test_layer_and_expert_numbers_are_read_from_the_name(layer: int, expert: int) -> None:
    role = role_of(f"model.layers.{layer}.mlp.experts.{expert}.up_proj.weight")
    assert (role.layer, role.expert, role.kind) == (layer, expert, "up")
