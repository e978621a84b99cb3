"""What names, shapes and configurations that do not fit come to."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checks.checkpoint import template
from checks.checkpoint.roles import CATEGORIES, role_of
from checks.checkpoint.template import LARGEST_COUNT, MISSING_NAMED, assign_roles, load
from tests.checkpoint.template_shapes import Shapes, released


def test_missing_tensors_are_named() -> None:
    shapes, config = released("tiny_qwen3_moe")
    gone = ("model.layers.1.mlp.experts.2.up_proj.weight", "model.layers.0.self_attn.q_norm.weight", "lm_head.weight")
    for name in gone:
        del shapes[name]
    assigned = assign_roles(shapes, config)
    assert (set(assigned.missing), assigned.missing_count) == (set(gone), 3)
    assert assign_roles(shapes, config | {"tie_word_embeddings": True}).missing_count == 2
    assert assign_roles(*released("tiny_llama", attention_bias=True)).missing_count == 8
    assert assign_roles(*released("tiny_llama", num_hidden_layers=3)).missing_count == 9


def test_a_layer_less_in_the_configuration_is_reported() -> None:
    shapes, config = released("tiny_llama")
    assigned = assign_roles(shapes, config | {"num_hidden_layers": 1})
    assert len(assigned.problems) == 9
    assert "layer 1" in assigned.problems["model.layers.1.mlp.up_proj.weight"]
    assert set(assigned.problems) == set(assigned.unassigned)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"model.layers.999999.mlp.up_proj.weight": (48, 32)}, "model.layers.999999.mlp.up_proj.weight"),
        ({"model.layers.0.mlp.experts.3.up_proj.weight": (20, 32)}, "model.layers.0.mlp.experts.3.up_proj.weight"),
        ({"model.layers.0.mlp.experts.gate_up_proj": (4, 40, 32)}, "model.layers.0.mlp.experts.gate_up_proj"),
        ({"model.language_model.norm.weight": (32,)}, "model.norm.weight"),
        ({"model.language_model.norm.weight": (32,)}, "model.language_model.norm.weight"),
        ({"model.layers.0.mlp.experts.gate_up_proj": (3, 40, 32)}, "model.layers.0.mlp.experts.0.up_proj.weight"),
        ({"model.norm.weight": (32, 32)}, "model.norm.weight"),
        ({"model.norm.weight": ()}, "model.norm.weight"),
    ],
)
def test_a_name_that_contradicts_the_configuration_has_no_role(change: Shapes, name: str) -> None:
    shapes, config = released("tiny_qwen3_moe")
    assigned = assign_roles(shapes | change, config)
    assert name in assigned.problems
    assert name in assigned.unassigned


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.01.mlp.up_proj.weight",
        "model.layers.-1.mlp.up_proj.weight",
        "model.layers.\N{ARABIC-INDIC DIGIT ONE}.mlp.up_proj.weight",
        "model.layers.#.mlp.up_proj.weight",
        "model.layers.{layer}.mlp.up_proj.weight",
        f"model.layers.{'9' * 5000}.mlp.up_proj.weight",
        "model.layers.0.mlp.up_proj.lora_A.weight",
        "model.layers.0.mlp.up_proj",
        "../model.norm.weight",
        "",
    ],
)
def test_a_name_that_only_resembles_a_pattern_has_no_role(name: str) -> None:
    shapes, config = released("tiny_llama")
    assert assign_roles(shapes | {name: (48, 32)}, config).unassigned == (name,)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda one: st.lists(one, max_size=3) | st.dictionaries(st.text(max_size=5), one, max_size=3),
    max_leaves=5,
)
KEYS = ["num_hidden_layers", "num_experts", "n_routed_experts", "ffn_config", "text_config", "vision_config"]
KEYS += ["mlp_layer_types", "moe_layers", "moe_layer_freq", "first_k_dense_replace", "mlp_only_layers", "hidden_size"]
KEYS += ["decoder_sparse_step", "num_nextn_predict_layers", "tie_word_embeddings", "vocab_size", "q_lora_rank"]
WORDS = ["model", "layers", "0", "7", "999999", "mlp", "experts", "gate_proj", "up_proj", "weight", "bias"]
WORDS += ["mtp", "lm_head", "visual", "blocks", "attn", "#", "{layer}", "qweight", "weight_scale", "norm"]
NAMES = st.lists(st.sampled_from(WORDS) | st.text(max_size=4), max_size=8).map(".".join)
SHAPE = st.lists(st.integers(0, 4), max_size=4).map(tuple)


@given(
    shapes=st.dictionaries(NAMES, SHAPE, max_size=6),
    config=st.dictionaries(st.sampled_from(KEYS), JSON, max_size=6),
    model_type=st.sampled_from(sorted({model_type for _, model_type in load()[1]})) | JSON,
)
def test_nothing_in_a_checkpoint_raises(shapes: Shapes, config: dict[str, Any], model_type: object) -> None:
    assigned = assign_roles(shapes, config | {"model_type": model_type})
    assert set(assigned.unassigned) == shapes.keys() - assigned.roles.keys()
    assert assigned.roles.keys() <= shapes.keys()
    assert assigned.missing_count >= len(assigned.missing)
    for role in assigned.roles.values():
        assert role.category in CATEGORIES
        assert (role.layer or 0) <= 2 * LARGEST_COUNT
        assert (role.expert or 0) <= 999_999


@given(names=st.lists(NAMES, max_size=5))
def test_junk_beside_a_model_changes_nothing_of_it(names: list[str]) -> None:
    shapes, config = released("tiny_llama")
    junk = {f"junk.{name}": (1,) for name in names}
    assigned = assign_roles(shapes | junk, config)
    assert set(assigned.unassigned) == junk.keys()
    assert assigned.roles == assign_roles(shapes, config).roles


def test_a_hostile_configuration_names_a_bounded_number_of_tensors() -> None:
    """Were all of them listed, the test would not end."""
    shapes, _ = released("tiny_qwen3_moe")
    config = {"model_type": "qwen3_moe", "num_hidden_layers": LARGEST_COUNT, "num_experts": LARGEST_COUNT}
    assigned = assign_roles(shapes, config | {"mlp_only_layers": list(range(100_000))})
    assert len(assigned.missing) == MISSING_NAMED < assigned.missing_count
    assert assign_roles(shapes, config | {"num_hidden_layers": 10**18}).missing_count > 0


def test_an_unknown_model_type_falls_back_on_names_and_shapes() -> None:
    shapes, config = released("tiny_llama")
    assigned = assign_roles(shapes, config | {"model_type": "someones_own"})
    assert "someones_own" in str(assigned.inferred_because)
    assert (assigned.templates, assigned.missing, assigned.unassigned) == ({}, (), ())
    for name, role in assigned.roles.items():
        plain = role_of(name)
        assert {key: getattr(role, key) for key in vars(plain)} == vars(plain)
    assert assigned.roles["model.layers.1.self_attn.v_proj.weight"].part == "v"
    assert assigned.roles["model.layers.1.mlp.down_proj.weight"].part == "down"


def test_the_fallback_reads_stacks_and_tables_from_shapes() -> None:
    stacks = {"layers.0.moe.experts.gate_up_proj": (3, 32, 40), "layers.0.moe.experts.down_proj": (3, 20, 32)}
    shapes = stacks | {"layers.1.moe.experts.gate_up_proj": (3, 40, 32), "lookup": (64, 32), "rest": (5, 5)}
    config = {"model_type": "someones_own", "hidden_size": 32, "vocab_size": 64}
    assigned = assign_roles(shapes, config)
    assert assigned.unassigned == ("rest",)
    assert assigned.roles["lookup"].category == "embedding"
    for name in stacks:
        layout = assigned.roles[name].layout
        assert (layout.stacked, layout.transposed, assigned.roles[name].kind) == ("axis", True, None)
    assert not assigned.roles["layers.1.moe.experts.gate_up_proj"].layout.transposed
    assert (
        "layer 1"
        in assign_roles(shapes, config | {"num_hidden_layers": 1}).problems["layers.1.moe.experts.gate_up_proj"]
    )


def test_names_that_do_not_follow_the_template_fall_back_too() -> None:
    shapes, config = released("tiny_llama")
    other = {name.replace("model.layers.", "stages.h."): shape for name, shape in shapes.items()}
    assigned = assign_roles(other, config)
    assert "3 of 21" in str(assigned.inferred_because)
    assert assigned.roles["stages.h.1.mlp.up_proj.weight"].kind == "up"


def test_without_a_configuration_the_names_count() -> None:
    shapes, _ = released("tiny_qwen3_moe")
    assigned = assign_roles(shapes, {"model_type": "qwen3_moe"})
    assert (assigned.missing_count, assigned.problems, assigned.unassigned) == (0, {}, ())


def test_each_of_a_hundred_thousand_names_gets_a_role() -> None:
    shapes, config = released("kimi_k2")
    shapes |= {f"{name}_scale_inv": (1, 1) for name in list(shapes)[-30_000:] if name.endswith(".weight")}
    assert len(shapes) > 99_000
    assigned = assign_roles(shapes, config)
    assert (assigned.unassigned, assigned.missing_count) == ((), 0)


def test_matrices_of_one_mlp_share_a_place_and_no_others_do() -> None:
    for known in ("tiny_qwen3_moe", "qwen2_moe", "k_exaone"):
        roles = assign_roles(*released(known)).roles.values()
        found = Counter(role.mlp_place for role in roles if role.part in ("gate", "up", "down"))
        assert set(found.values()) == {3}
    assert ("mtp", 48, None, None) in found


def test_which_names_follow_a_template() -> None:
    shapes, config = released("tiny_qwen3_moe")
    known = template.follows_template(config)
    assert all(map(known, shapes))
    assert known("model.layers.7.mlp.experts.900.up_proj.weight_scale_inv")
    assert not known("model.layers.7.mlp.experts.up.up_proj.weight")
    assert not template.follows_template({"model_type": "someones_own"})("model.norm.weight")


def test_the_summary_of_a_checkpoint_that_fits() -> None:
    summary = assign_roles(*released("tiny_llama")).summary()
    nothing = {"count": 0, "tensors": []}
    assert summary == {
        "templates": {"text": "llama"},
        "inferred_because": None,
        "problems": {"count": 0, "tensors": {}},
        "missing": nothing,
        "unassigned": nothing,
    }


def test_scales_beside_a_stack_of_experts() -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    shapes = {name: (3, 40, 32), f"{name}_scale_inv": (3, 1, 1), f"{name}_scale": (3, 40, 1)}
    roles = assign_roles(shapes, {"model_type": "qwen3_moe", "num_hidden_layers": 1, "num_experts": 3}).roles
    assert {one.removeprefix(name): role.companion_of for one, role in roles.items()} == {
        "": None,
        "_scale_inv": "gate_up_proj",
        "_scale": "gate_up_proj",
    }


def test_what_configurations_call_the_numbers_of_heads() -> None:
    assert template.stated_count({"n_head": 12}, "heads", 0) == 12
    assert template.stated_count({"attn_config": {"kv_n_heads": 8}}, "key_heads", 3) == 8
    assert template.stated_count({"num_attention_heads": -1}, "heads", 3) == 3
    assert template.component_config({"text_config": {"a": 1}}, "text") == {"a": 1}
    assert template.component_config({"a": 1}, "text") == {"a": 1}
    assert template.component_config({"a": 1, "text_config": 3}, "vision") == {}
