"""Reading config.json: aliases, defaults, parts; hostile input gives a ConfigError and nothing else."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checks.catalog.architecture import (
    FIELD_TYPES,
    Architecture,
    ConfigError,
    applies,
    attention_kind,
    expert_layout,
    from_config,
    moe_layout,
)
from checks.catalog.configuration import FLAGS, INTEGERS, NUMBERS, TEXTS
from checks.catalog.model_types import MODEL_TYPES
from checks.catalog.parameters import UncountableError, count

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 160,
    "vocab_size": 100,
    "rope_theta": 10000,
    "tie_word_embeddings": False,
}
LATENT: dict[str, Any] = {
    **LLAMA,
    "model_type": "deepseek_v3",
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
}


def one(**changes: Any) -> Architecture:
    return from_config({**LLAMA, **changes})["model"]


def test_a_plain_config() -> None:
    assert one() == Architecture(
        model_type="llama",
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=160,
        hidden_act="silu",
        vocab_size=100,
        rope_theta=10000.0,
        rope_scaling="none",
        norm="RMSNorm",
        norm_bias=False,
        norms_per_layer=2,
        qk_norm=False,
        attention_bias=False,
        attention_output_bias=False,
        mlp_bias=False,
        mlp_gated=True,
        tie_word_embeddings=False,
        layer_pattern="G",
    )


@pytest.mark.parametrize("name", ["n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts"])
def test_names_of_the_number_of_experts(name: str) -> None:
    architecture = one(model_type="mixtral", num_experts_per_tok=2, **{name: 8})
    assert architecture.n_routed_experts == 8
    assert architecture.moe_intermediate_size == 160
    assert moe_layout(architecture) == "8 top-2"


def test_names_of_gpt2() -> None:
    architecture = from_config({"model_type": "gpt2", "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128})
    assert architecture["model"] == Architecture(
        model_type="gpt2",
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=128,
    )


def test_names_of_dbrx() -> None:
    architecture = from_config(
        {
            "model_type": "dbrx",
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 128,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 500000},
            "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
        }
    )["model"]
    assert (architecture.num_key_value_heads, architecture.rope_theta) == (2, 500000)
    assert (architecture.moe_intermediate_size, moe_layout(architecture)) == (96, "4 top-2")
    assert architecture.norm == "LayerNorm"


@pytest.mark.parametrize(
    ("changes", "scaling", "theta"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 2}}, "yarn 2.0", 10000),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "llama3 8.0", 10000),
        ({"rope_scaling": {"rope_type": "longrope"}}, "longrope", 10000),
        ({"rope_scaling": {"type": "default", "mrope_section": [1, 2]}}, "none", 10000),
        ({"rope_scaling": None}, "none", 10000),
        ({"rope_theta": None, "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 7}}, "yarn 4.0", 7),
        ({"rope_theta": None}, None, None),
    ],
)
def test_rope(changes: dict[str, Any], scaling: str | None, theta: float | None) -> None:
    architecture = one(**changes)
    assert (architecture.rope_scaling, architecture.rope_theta) == (scaling, theta)


def test_two_rotary_bases() -> None:
    kinds = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"}}
    architecture = one(rope_theta=None, rope_parameters=kinds)
    assert (architecture.rope_theta, architecture.rope_theta_global) == (1e4, 1e6)
    architecture = one(rope_theta=1e6, rope_local_base_freq=1e4)
    assert (architecture.rope_theta, architecture.rope_theta_global) == (1e4, 1e6)


@pytest.mark.parametrize(
    ("changes", "pattern", "window"),
    [
        ({"sliding_window": 8, "sliding_window_pattern": "LLLG"}, "LLLG", 8),
        ({"sliding_window": 8, "sliding_window_pattern": 4}, "LLLG", 8),
        ({"layer_types": ["sliding_attention", "full_attention"] * 3}, "LG", None),
        ({"layer_types": ["full_attention"] * 5}, "G", None),
        ({"layer_types": ["linear_attention"] * 3 + ["full_attention"]}, "XXXG", None),
        ({"sliding_window": 8, "use_sliding_window": False}, "G", None),
        ({"sliding_window": 8, "model_type": "mistral"}, "L", 8),
        ({"sliding_window": None}, "G", None),
        ({"model_type": "something_new"}, None, None),
    ],
)
def test_layer_pattern(changes: dict[str, Any], pattern: str | None, window: int | None) -> None:
    architecture = one(**changes)
    assert (architecture.layer_pattern, architecture.sliding_window) == (pattern, window)


@pytest.mark.parametrize(
    ("changes", "dense", "frequency"),
    [
        ({}, 1, 1),
        ({"first_k_dense_replace": None, "decoder_sparse_step": 2, "moe_layer_freq": None}, 0, 2),
        ({"moe_layer_freq": [0, 1]}, 1, 1),
        ({"mlp_layer_types": ["dense", "sparse"]}, 1, 1),
        ({"mlp_layer_types": ["sparse", "dense"]}, None, None),
        ({"moe_layer_freq": None, "mlp_only_layers": [0]}, 1, 1),
        ({"moe_layer_freq": None, "mlp_only_layers": [1]}, None, None),
    ],
)
def test_where_the_mixtures_are(changes: dict[str, Any], dense: int | None, frequency: int | None) -> None:
    architecture = from_config({**LATENT, **changes})["model"]
    assert (architecture.first_k_dense_replace, architecture.moe_layer_frequency) == (dense, frequency)


def test_latent_attention_has_no_key_value_heads() -> None:
    architecture = from_config({**LATENT, "head_dim": 64})["model"]
    assert architecture.num_key_value_heads is None
    assert architecture.head_dim is None
    assert attention_kind(architecture) == "MLA"
    assert applies(architecture, "num_key_value_heads") is False


def test_shared_experts() -> None:
    assert expert_layout(from_config(LATENT)["model"]) == "8+1"
    qwen = {**LLAMA, "model_type": "qwen2_moe", "num_experts": 8, "shared_expert_intermediate_size": 96}
    architecture = from_config(qwen)["model"]
    assert expert_layout(architecture) == "8+1"
    assert architecture.shared_expert_gate is True
    assert expert_layout(one(model_type="minimax_m2", num_local_experts=8, shared_intermediate_size=0)) == "8"
    assert expert_layout(one()) is None
    assert moe_layout(one(num_experts=0)) is None


@pytest.mark.parametrize(("heads", "kind"), [(4, "MHA"), (2, "GQA"), (1, "MQA"), (None, "MHA")])
def test_attention_kind(heads: int | None, kind: str) -> None:
    assert attention_kind(one(num_key_value_heads=heads)) == kind


def test_attention_kind_of_a_catalogue_row_with_both() -> None:
    assert attention_kind(Architecture(num_attention_heads=64, num_key_value_heads=64, kv_lora_rank=512)) == "MLA"
    assert attention_kind(Architecture(num_attention_heads=64)) is None


def test_biases() -> None:
    assert one(model_type="qwen2").attention_bias is True
    assert one(model_type="qwen2").attention_output_bias is False
    assert one(attention_bias=True).attention_output_bias is True
    assert one(model_type="glm4_moe", attention_bias=True).attention_output_bias is False


def test_parts() -> None:
    vision = {"model_type": "qwen2_5_vl", "depth": 3, "num_heads": 2, "hidden_size": 32, "patch_size": 14}
    nested = from_config(
        {"model_type": "vlm", "text_config": LLAMA, "vision_config": vision, "audio_config": {"hidden_size": 8}}
    )
    assert set(nested) == {"text", "vision", "audio"}
    assert nested["text"] == one()
    assert (nested["vision"].num_hidden_layers, nested["vision"].num_attention_heads) == (3, 2)
    beside = from_config({**LLAMA, "vision_config": vision})
    assert beside == {"text": one(), "vision": nested["vision"]}
    assert from_config({**LLAMA, "vision_config": None}) == {"model": one()}


def test_output_width_of_qwen2_vl() -> None:
    vision = from_config({**LLAMA, "vision_config": {"embed_dim": 32, "hidden_size": 64}})["vision"]
    assert (vision.hidden_size, vision.out_hidden_size) == (32, 64)


def test_tying_is_inherited_from_the_wrapper() -> None:
    text = {key: value for key, value in LLAMA.items() if key != "tie_word_embeddings"}
    assert from_config({"text_config": text, "tie_word_embeddings": True})["text"].tie_word_embeddings is True


def test_a_model_type_without_defaults_cannot_be_counted() -> None:
    with pytest.raises(UncountableError, match="norms_per_layer"):
        count(one(model_type="something_new"))


@pytest.mark.parametrize("name", sorted(MODEL_TYPES))
def test_defaults_are_fields(name: str) -> None:
    Architecture(**MODEL_TYPES[name])  # type: ignore[arg-type]
    for key, value in MODEL_TYPES[name].items():
        assert FIELD_TYPES[key] == type(value).__name__


@pytest.mark.parametrize(
    ("changes", "key", "expected"),
    [
        ({"hidden_size": "64"}, "hidden_size", "an integer"),
        ({"hidden_size": 64.0}, "hidden_size", "an integer"),
        ({"hidden_size": True}, "hidden_size", "an integer"),
        ({"hidden_size": [64]}, "hidden_size", "an integer"),
        ({"hidden_size": 0}, "hidden_size", "from 1"),
        ({"hidden_size": -1}, "hidden_size", "from 1"),
        ({"hidden_size": 10**5000}, "hidden_size", "from 1"),
        ({"num_experts": [10**5000]}, "num_experts", "an integer"),
        ({"rope_theta": float("nan")}, "rope_theta", "a finite number"),
        ({"rope_theta": 10**400}, "rope_theta", "a number from"),
        ({"rope_theta": "10000"}, "rope_theta", "a number"),
        ({"rope_scaling": "yarn"}, "rope_scaling", "a mapping"),
        ({"rope_scaling": {"type": 3}}, "type", "a string"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings", "true or false"),
        ({"model_type": ["llama"]}, "model_type", "a string"),
        ({"text_config": "llama"}, "text_config", "a mapping"),
        ({"vision_config": {"fullatt_block_indexes": ["7"]}}, "fullatt_block_indexes", "a list of integers"),
    ],
)
def test_hostile_input_names_the_key(changes: dict[str, Any], key: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_config({**LLAMA, **changes})
    assert caught.value.key == key
    assert expected in caught.value.expected
    assert str(caught.value).startswith(f"{key}: expected ")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("config", [None, [], "text", 3])
def test_not_a_mapping(config: Any) -> None:
    with pytest.raises(ConfigError, match="expected a mapping"):
        from_config(config)


NAMES = sorted(
    {alias for table in (INTEGERS, NUMBERS, FLAGS, TEXTS) for aliases in table.values() for alias in aliases}
    | {"text_config", "vision_config", "audio_config", "attn_config", "ffn_config", "rope_scaling", "rope_parameters"}
    | {"rope_theta", "layer_types", "sliding_window_pattern", "use_sliding_window", "fullatt_block_indexes"}
    | {"mlp_layer_types", "mlp_only_layers", "moe_layer_freq", "embed_dim", "multi_query", "full_attention", "type"}
)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.just(10**100)
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(sorted(MODEL_TYPES))
)
JUNK = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=4), JUNK, max_size=8))
def test_junk_raises_nothing_but_a_config_error(junk: dict[str, Any]) -> None:
    try:
        found = from_config(junk)
    except ConfigError:
        return
    assert all(isinstance(architecture, Architecture) for architecture in found.values())


@given(st.sampled_from(NAMES), JUNK, st.sampled_from([LLAMA, LATENT]))
def test_one_bad_key_raises_nothing_but_a_config_error(name: str, value: Any, base: dict[str, Any]) -> None:
    try:
        architectures = from_config({**base, name: value})
    except ConfigError:
        return
    for architecture in architectures.values():
        with contextlib.suppress(UncountableError):
            assert count(architecture).total > 0
