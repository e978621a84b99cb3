"""The parameter count: by hand on small rows, and against every published figure of the catalogue."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from checks.catalog.architecture import Architecture, is_mixture
from checks.catalog.entry import CatalogEntry, load, load_all, main_component
from checks.catalog.parameters import ParameterCount, UncountableError, count

DENSE = Architecture(
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=2,
    intermediate_size=16,
    vocab_size=10,
    norm="RMSNorm",
    norms_per_layer=2,
    qk_norm=False,
    attention_bias=False,
    attention_output_bias=False,
    mlp_bias=False,
    mlp_gated=True,
    tie_word_embeddings=False,
)
MIXTURE = dataclasses.replace(
    DENSE,
    n_routed_experts=4,
    n_shared_experts=1,
    num_experts_per_tok=2,
    moe_intermediate_size=6,
    first_k_dense_replace=1,
    moe_layer_frequency=1,
    router_bias=False,
)
#: attention 8*8 + 2*8*4 + 8*8, MLP 3*8*16, norms 2*8; embedding, head, final norm
LAYER, OUTSIDE = 192 + 384 + 16, 80 + 80 + 8
#: Published figures that the rows cannot reproduce, and why. Nothing else may be missing.
HOLES = {
    ("hyperclovax_seed_think_14b", "total"): "hidden size, layers, heads and vocabulary were not found",
    ("exaone_4_5_32b", "total"): "the vision tower's dimensions were not found",
    ("llama_4_scout", "total"): "no count for its vision tower",
    ("llama_4_maverick", "total"): "no count for its vision tower",
}
#: In units of 1e9, from the row alone, as the reference table of this project gives them.
REFERENCE = {
    "solar_open_100b": ("102.65", "12.05"),
    "hyperclovax_seed_think_32b": ("32.60", "32.60"),
    "axk1": ("518.98", "32.8"),
    "vaetki": ("112.19", "10.3"),
    "k_exaone_236b_a23b": ("236.571", "23.7"),
    "mixtral_8x7b": ("46.70", "12.9"),
    "deepseek_v2": ("235.7", "21.4"),
    "qwen2_57b_a14b": ("57.41", "14.2"),
    "llama_3_70b": ("70.55", "70.55"),
    "llama_3_1_70b": ("70.55", "70.55"),
    "qwen2_5_72b": ("72.71", "72.71"),
    "deepseek_v3": ("671.0", "37.6"),
    "phi_3_5_moe": ("41.87", "6.6"),
    "qwen3_30b_a3b": ("30.5", "3.4"),
    "qwen3_235b_a22b": ("235.1", "22.2"),
    "glm_4_5_air": ("106.9", "13.4"),
}


def figures() -> list[tuple[str, str]]:
    return [(key, name) for key, entry in load_all().items() for name in entry.parameters]


def computed(entry: CatalogEntry, name: str) -> float:
    """The figure as the row makes it: the whole model, one part, or what a token uses of the language model."""
    figure = entry.parameters[name]
    main = entry.components[main_component(entry.components)]
    if name == "active":
        value, counts = count(main).active, count(main)
    elif name in entry.components:
        value, counts = count(entry.components[name]).total, count(entry.components[name])
    else:
        known = [part for part in entry.components.values() if part != Architecture()]
        value, counts = sum(count(part).total for part in known), count(main)
    taken_off = {"embedding": counts.embedding, "head": counts.head}
    return value - sum(taken_off[part] for part in figure.without) + (_mtp(counts) if figure.adding else 0)


def _mtp(counts: ParameterCount) -> int:
    assert counts.next_token_prediction
    return counts.next_token_prediction


@pytest.mark.parametrize(("key", "name"), figures())
def test_published_figures_agree_with_the_row(key: str, name: str) -> None:
    entry = load(key)
    figure = entry.parameters[name]
    if (key, name) in HOLES:
        with pytest.raises(UncountableError):
            computed(entry, name)
        return
    assert figure.within is not None
    found = computed(entry, name)
    assert abs(found - figure.value) <= figure.within, f"{found / 1e9:.3f}e9 against {figure.value / 1e9:g}e9"


def test_every_model_has_published_figures() -> None:
    assert set(HOLES) <= set(figures())
    for entry in load_all().values():
        assert "total" in entry.parameters, entry.key
        if is_mixture(entry.components[main_component(entry.components)]):
            assert "active" in entry.parameters, entry.key


@pytest.mark.parametrize(("key", "name"), figures())
def test_the_tolerance_is_the_rounding_of_the_figure(key: str, name: str) -> None:
    figure = load(key).parameters[name]
    digits = f"{figure.value:.12e}".split("e")[0].rstrip("0").rstrip(".").replace(".", "")
    unit = 10.0 ** (len(str(int(figure.value))) - len(digits))
    assert figure.within is not None
    assert figure.within <= unit / 2 * (1 + 1e-9) or figure.note is not None
    assert not (figure.without or figure.adding) or figure.note or name == "checkpoint" or figure.within <= unit


@pytest.mark.parametrize("key", sorted(REFERENCE))
def test_reference_table(key: str) -> None:
    entry = load(key)
    counts = count(entry.components[main_component(entry.components)])
    for value, text in zip((counts.total, counts.active), REFERENCE[key], strict=True):
        assert f"{value / 1e9:.{len(text.split('.')[1])}f}" == text


def test_a_dense_model_by_hand() -> None:
    assert count(DENSE) == ParameterCount(OUTSIDE + 2 * LAYER, OUTSIDE + 2 * LAYER, 80, 80, 0)


def test_a_mixture_by_hand() -> None:
    expert = 3 * 8 * 6
    fixed = OUTSIDE + 2 * (192 + 16) + 384 + 8 * 4 + expert
    assert count(MIXTURE) == ParameterCount(fixed + 4 * expert, fixed + 2 * expert, 80, 80, 0)


@pytest.mark.parametrize(
    ("base", "changes", "more"),
    [
        (DENSE, {"tie_word_embeddings": True}, -80),
        (DENSE, {"lm_head_bias": True}, 10),
        (DENSE, {"attention_bias": True}, 2 * (8 + 4 + 4)),
        (DENSE, {"attention_output_bias": True}, 2 * 8),
        (DENSE, {"attention_sinks": True}, 2 * 4),
        (DENSE, {"mlp_bias": True}, 2 * (16 + 16 + 8)),
        (DENSE, {"mlp_gated": False}, -2 * 128),
        (DENSE, {"norm_bias": True}, 5 * 8),
        (DENSE, {"norms_per_layer": 4}, 4 * 8),
        (DENSE, {"qk_norm": True, "qk_norm_shape": "head"}, 2 * (2 + 2)),
        (DENSE, {"qk_norm": True, "qk_norm_shape": "all"}, 2 * (8 + 4)),
        (DENSE, {"qk_norm": True, "qk_norm_shape": "weightless"}, 0),
        (MIXTURE, {"router_bias": True}, 4),
        (MIXTURE, {"shared_expert_gate": True}, 8),
        (MIXTURE, {"shared_expert_intermediate_size": 7}, 24),
        (MIXTURE, {"n_shared_experts": 0}, -144),
        (MIXTURE, {"norms_per_moe_layer": 3}, 8),
        (MIXTURE, {"dense_intermediate_size": 17}, 24),
        (MIXTURE, {"first_k_dense_replace": 0, "moe_layer_frequency": 2}, 0),
    ],
)
def test_each_part(base: Architecture, changes: dict[str, Any], more: int) -> None:
    assert count(dataclasses.replace(base, **changes)).total == count(base).total + more


def test_latent_attention_by_hand() -> None:
    latent = dataclasses.replace(
        DENSE,
        num_key_value_heads=None,
        head_dim=None,
        q_lora_rank=5,
        kv_lora_rank=3,
        qk_nope_head_dim=2,
        qk_rope_head_dim=1,
        v_head_dim=2,
    )
    attention = 8 * 5 + 5 + 5 * 4 * 3 + 8 * (3 + 1) + 3 + 3 * 4 * (2 + 2) + 4 * 2 * 8
    assert count(latent).total == OUTSIDE + 2 * (LAYER - 192 + attention)
    direct = dataclasses.replace(latent, q_lora_rank=None)
    assert count(direct).total == count(latent).total - 2 * (8 * 5 + 5 + 60) + 2 * 8 * 12


def test_next_token_prediction_is_counted_apart() -> None:
    block = dataclasses.replace(MIXTURE, num_nextn_predict_layers=1)
    assert count(block).total == count(MIXTURE).total
    assert count(block).next_token_prediction is None
    extra = 192 + 16 + 2 * 64 + 3 * 8
    assert count(dataclasses.replace(block, nextn_dense=True)).next_token_prediction == extra + 384
    assert count(dataclasses.replace(block, nextn_dense=False)).next_token_prediction == extra + 32 + 5 * 144


def test_the_block_of_k_exaone() -> None:
    counts = count(load("k_exaone_236b_a23b").components["model"])
    assert counts.next_token_prediction is not None
    assert round(counts.next_token_prediction / 1e6, 1) == 528.5
    assert round((counts.total + counts.next_token_prediction) / 1e9, 4) == 237.0997


def test_a_vision_tower_by_hand() -> None:
    tower = Architecture(
        model_type="qwen2_5_vl",
        hidden_size=4,
        num_hidden_layers=2,
        intermediate_size=6,
        patch_size=2,
        temporal_patch_size=2,
        in_channels=3,
        spatial_merge_size=2,
        out_hidden_size=5,
        attention_bias=True,
        attention_output_bias=True,
        mlp_bias=True,
        mlp_gated=True,
    )
    block = 8 + (4 * 12 + 12) + (16 + 4) + 2 * (24 + 6) + (24 + 4)
    assert count(tower).total == 4 * 24 + 2 * block + 4 + (16 * 16 + 16) + (16 * 5 + 5)
    with pytest.raises(UncountableError, match="vision tower of type 'other'"):
        count(dataclasses.replace(tower, model_type="other"))


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "vocab_size", "norms_per_layer", "mlp_gated"])
def test_what_is_missing_is_named(key: str) -> None:
    with pytest.raises(UncountableError, match=key) as caught:
        count(dataclasses.replace(MIXTURE, **{key: None}))
    assert caught.value.missing == (key,)


def test_everything_missing_is_named() -> None:
    with pytest.raises(UncountableError, match=r"hidden_size.*vocab_size"):
        count(Architecture())


def test_other_kinds_of_layers_are_not_guessed() -> None:
    with pytest.raises(UncountableError, match="neither sliding nor full"):
        count(dataclasses.replace(DENSE, layer_pattern="XXXG"))


def test_the_seed_row_of_qwen2_5_72b_is_another_model() -> None:
    row = load("qwen2_5_72b").components["model"]
    wrong = dataclasses.replace(row, hidden_size=12288, num_attention_heads=128, head_dim=96)
    assert count(wrong).total > 1.5 * count(row).total
