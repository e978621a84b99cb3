"""Equal keys: the rule of the seed documents, with its tables corrected, and how common each value is."""

from __future__ import annotations

import pytest

from checks.catalog.architecture import Architecture, attention_kind
from checks.catalog.comparison import (
    DOES_NOT_APPLY,
    FIVE_KEYS,
    OVERLAP_KEYS,
    SEVEN_KEYS_DENSE,
    SEVEN_KEYS_MOE,
    KeyComparison,
    compare_keys,
    five_keys,
    overlap,
    prevalence,
    value_of,
)
from checks.catalog.entry import load, main_component


def text(key: str) -> Architecture:
    components = load(key).components
    return components[main_component(components)]


def equal(rows: list[KeyComparison]) -> set[str]:
    return {row.key for row in rows if row.equal}


@pytest.mark.parametrize(
    ("candidate", "reference", "same"),
    [
        ("axk1", "kimi_k2", set(FIVE_KEYS)),
        ("axk1", "deepseek_v3", set(FIVE_KEYS) - {"num_attention_heads"}),
        ("solar_open_100b", "mixtral_8x7b", {"hidden_size", "hidden_act"}),
        ("solar_open_100b", "deepseek_v2", {"hidden_act"}),
        ("solar_open_100b", "qwen2_57b_a14b", {"hidden_act"}),
        ("solar_open_100b", "glm_4_5_air", {"hidden_size", "hidden_act"}),
    ],
)
def test_five_keys(candidate: str, reference: str, same: set[str]) -> None:
    rows = five_keys(text(candidate), text(reference))
    assert tuple(row.key for row in rows) == FIVE_KEYS
    assert equal(rows) == same


@pytest.mark.parametrize(
    ("reference", "same"),
    [
        ("mixtral_8x7b", {"hidden_size", "num_key_value_heads", "rope_theta"}),
        ("deepseek_v2", set()),
        ("qwen2_57b_a14b", {"rope_theta"}),
    ],
)
def test_seven_keys_of_solar(reference: str, same: set[str]) -> None:
    rows = compare_keys(text("solar_open_100b"), text(reference), SEVEN_KEYS_MOE)
    assert equal(rows) == same
    assert all(row.equal is not None for row in rows)


def test_latent_attention_has_no_key_value_heads_to_compare() -> None:
    rows = {row.key: row for row in compare_keys(text("solar_open_100b"), text("deepseek_v2"), SEVEN_KEYS_MOE)}
    assert rows["num_key_value_heads"] == KeyComparison("num_key_value_heads", 8, DOES_NOT_APPLY, False)
    both = compare_keys(text("axk1"), text("kimi_k2"), ["num_key_value_heads"])
    assert both[0].equal is None


@pytest.mark.parametrize(
    ("reference", "values", "same"),
    [
        (
            "llama_3_1_70b",
            ["llama", 8192, 80, 64, 8, 128256, 500000],
            {"num_key_value_heads", "vocab_size"},
        ),
        ("qwen2_5_72b", ["qwen2", 8192, 80, 64, 8, 152064, 1000000], {"num_key_value_heads"}),
    ],
)
def test_seven_keys_of_hyperclovax(reference: str, values: list[object], same: set[str]) -> None:
    rows = compare_keys(text("hyperclovax_seed_think_32b"), text(reference), SEVEN_KEYS_DENSE)
    assert [row.candidate for row in rows] == ["hyperclovax", 5120, 72, 40, 8, 128256, 50000000]
    assert [row.reference for row in rows] == values
    assert equal(rows) == same


def test_unknown_is_not_equal() -> None:
    rows = five_keys(text("hyperclovax_seed_think_14b"), text("hyperclovax_seed_think_32b"))
    assert {row.key: row.equal for row in rows} == {
        "hidden_size": None,
        "num_hidden_layers": None,
        "num_attention_heads": None,
        "intermediate_size": None,
        "hidden_act": True,
    }


def test_overlap_of_axk1_and_deepseek_v3() -> None:
    rows = {row.key: row for row in overlap(text("axk1"), text("deepseek_v3"))}
    for key in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
        assert rows[key].equal, key
    assert rows["attention_kind"] == KeyComparison("attention_kind", "MLA", "MLA", True)
    assert rows["moe_layout"] == KeyComparison("moe_layout", "192+1 top-8", "256+1 top-8", False)
    assert rows["routed_scaling_factor"].equal
    assert rows["scoring_func"].equal
    assert rows["norms_per_moe_layer"].equal is None


def test_overlap_leaves_out_what_neither_side_knows() -> None:
    assert overlap(Architecture(), Architecture()) == []
    rows = overlap(text("llama_3_70b"), text("mistral_7b"))
    assert not {"experts", "kv_lora_rank", "patch_size"} & {row.key for row in rows}
    assert {row.key for row in rows} <= set(OVERLAP_KEYS)


def test_a_dense_model_against_a_mixture() -> None:
    row = compare_keys(text("solar_open_100b"), text("llama_3_70b"), ["experts"])[0]
    assert row == KeyComparison("experts", "128+1", DOES_NOT_APPLY, False)


def test_an_unknown_key() -> None:
    with pytest.raises(ValueError, match="unknown key 'hidden'"):
        value_of(Architecture(), "hidden")


def test_every_latent_model_of_the_catalogue_is_called_mla() -> None:
    assert set(prevalence("attention_kind", "MLA")[2]) == {
        "axk1",
        "deepseek_r1",
        "deepseek_v2",
        "deepseek_v3",
        "kimi_k2",
        "vaetki",
    }
    assert attention_kind(text("vaetki")) == "MLA"


def test_forty_eight_layers_are_not_unique() -> None:
    sharing, known, names = prevalence("num_hidden_layers", 48, exclude=("solar_open_100b",))
    assert {"solar_10_7b", "qwen3_30b_a3b", "llama_4_scout", "vaetki", "k_exaone_236b_a23b", "internlm3_8b"} <= set(
        names
    )
    assert sharing == len(names) <= known


def test_129_experts_are_not_unique() -> None:
    _, known, names = prevalence("experts", "128+1", exclude=("solar_open_100b",))
    assert set(names) == {"glm_4_5_air", "k_exaone_236b_a23b", "llama_4_maverick", "vaetki"}
    assert known < len(prevalence("hidden_act", "silu")[2])  # dense models have no experts to count
    assert set(prevalence("moe_layout", "128+1 top-8", exclude=("solar_open_100b",))[2]) == {
        "glm_4_5_air",
        "k_exaone_236b_a23b",
        "vaetki",
    }


def test_other_values_called_unique() -> None:
    assert "internlm3_8b" in prevalence("rope_theta", 5e7, exclude=("hyperclovax_seed_think_32b",))[2]
    assert prevalence("hidden_size", 6144, exclude=("k_exaone_236b_a23b",))[2] == ("dbrx",)
    assert "llama_4_scout" in prevalence("layer_pattern", "LLLG")[2]
    assert "kimi_k2" in prevalence("vocab_size", 163840, exclude=("axk1",))[2]
    assert set(prevalence("first_k_dense_replace", 3, exclude=("vaetki",))[2]) == {
        "deepseek_r1",
        "deepseek_v3",
        "glm_4_5",
    }


def test_largest_and_smallest_claims() -> None:
    solar = text("solar_open_100b")
    assert any((text(key).num_attention_heads or 0) > 64 for key in ("glm_4_5_air", "deepseek_v2"))
    assert (text("qwen3_30b_a3b").moe_intermediate_size or 0) < (solar.moe_intermediate_size or 0)
    assert all(
        (text(key).vocab_size or 0) > (solar.vocab_size or 0) for key in ("llama_4_scout", "gpt_oss_120b", "minimax_m2")
    )


def test_prevalence_among_vision_towers() -> None:
    sharing, known, names = prevalence("intermediate_size", 3456, "vision", exclude=("hyperclovax_seed_think_32b",))
    assert (sharing, known, names) == (1, 2, ("qwen2_5_vl_32b",))
