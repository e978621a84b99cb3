"""The distance is one, and the nearest architectures are the ones that people compared."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checks.catalog.architecture import FIELD_TYPES, Architecture
from checks.catalog.entry import keys, load, load_all, main_component
from checks.catalog.nearest import SCALAR, SHAPE, STRUCTURE, WEIGHTS, Neighbour, distance, nearest

VALUES: dict[str, st.SearchStrategy[Any]] = {
    "int": st.integers(0, 10**6),
    "float": st.floats(0, 1e9),
    "str": st.sampled_from(["silu", "gelu", "G"]),
    "bool": st.booleans(),
    "tuple[int, ...]": st.tuples(st.integers(0, 9)),
}


def architectures() -> st.SearchStrategy[Architecture]:
    fields = {name: st.none() | VALUES[kind] for name, kind in FIELD_TYPES.items() if name in WEIGHTS}
    made = st.fixed_dictionaries(fields).map(lambda row: Architecture(**row))
    known = [part for entry in load_all().values() for part in entry.components.values()]
    return made | st.sampled_from(known)


def text(key: str) -> Architecture:
    components = load(key).components
    return components[main_component(components)]


def names(key: str, n: int) -> list[str]:
    return [neighbour.key for neighbour in nearest(text(key), n, exclude=(key,))]


@given(architectures(), architectures())
def test_range_and_symmetry(first: Architecture, second: Architecture) -> None:
    assert 0 <= distance(first, second) <= 1
    assert distance(first, second) == distance(second, first)


@given(architectures())
def test_identity(architecture: Architecture) -> None:
    assert distance(architecture, architecture) == 0
    assert distance(architecture, dataclasses.replace(architecture)) == 0


@pytest.mark.parametrize("change", [{"model_type": "other"}, {"norm_eps": 0.5}, {"dtype": "other"}])
def test_names_and_eps_weigh_nothing(change: dict[str, Any]) -> None:
    row = text("solar_open_100b")
    assert distance(row, dataclasses.replace(row, **change)) == 0


def test_weights() -> None:
    assert set(WEIGHTS) <= set(FIELD_TYPES)
    assert SHAPE > STRUCTURE > SCALAR
    assert WEIGHTS["rope_theta"] == SCALAR
    assert WEIGHTS["hidden_size"] == SHAPE


def test_a_factor_of_two_is_as_far_as_it_gets() -> None:
    one = Architecture(hidden_size=64)
    assert distance(one, Architecture(hidden_size=128)) == 1
    assert distance(one, Architecture(hidden_size=6400)) == 1
    assert distance(one, Architecture(hidden_size=90)) == pytest.approx(0.4919, abs=1e-4)


def test_what_is_unknown_is_left_out() -> None:
    one = Architecture(hidden_size=64, vocab_size=100)
    assert distance(one, Architecture(hidden_size=64)) == 0
    assert distance(one, Architecture(intermediate_size=64)) == 1  # nothing in common to compare


def test_what_one_side_cannot_have_is_different() -> None:
    dense = Architecture(hidden_size=64, intermediate_size=160)
    mixture = dataclasses.replace(dense, n_routed_experts=8, moe_intermediate_size=32)
    assert distance(dense, mixture) == 2 / 4
    grouped = Architecture(hidden_size=64, num_key_value_heads=2, head_dim=16)
    latent = Architecture(hidden_size=64, kv_lora_rank=16)
    assert distance(grouped, latent) == 3 / 4


def test_counts_that_may_be_zero() -> None:
    row = Architecture(intermediate_size=8, n_routed_experts=8, n_shared_experts=0, first_k_dense_replace=0)
    assert distance(row, dataclasses.replace(row, n_shared_experts=1)) == pytest.approx(0.5 / 3)


def test_neighbours_of_solar() -> None:
    assert names("solar_open_100b", 2) == ["glm_4_5_air", "qwen3_235b_a22b"]


def test_neighbours_of_axk1() -> None:
    assert names("axk1", 3) == ["kimi_k2", "deepseek_v3", "deepseek_v2"]


def test_neighbours_of_the_other_korean_models() -> None:
    assert "deepseek_v3" in names("vaetki", 3)
    assert {"exaone_3_5_32b", "qwen2_5_32b"} <= set(names("hyperclovax_seed_think_32b", 3))
    assert {"solar_open_100b", "glm_4_5_air", "glm_4_5"} == set(names("k_exaone_236b_a23b", 3))


def test_nearest_vision_tower() -> None:
    tower = load("hyperclovax_seed_think_32b").components["vision"]
    found = nearest(tower, 2, exclude=("hyperclovax_seed_think_32b",), component="vision")
    assert [neighbour.key for neighbour in found] == ["qwen2_5_vl_32b", "qwen2_5_vl_7b"]
    assert {neighbour.component for neighbour in found} == {"vision"}


def test_an_architecture_is_nearest_to_itself() -> None:
    for key in keys():
        row = text(key)
        if row.hidden_size is not None:
            # Of a derived model with its base's architecture the base is the nearest.
            assert nearest(row, 1)[0].distance == 0, key


def test_ties_are_in_the_order_of_the_keys() -> None:
    found = nearest(text("llama_3_70b"), 1000)
    assert found == sorted(found, key=lambda neighbour: (neighbour.distance, neighbour.key))


def test_a_derived_model_of_the_same_architecture_is_represented_by_its_base() -> None:
    found = nearest(text("deepseek_r1"), 1000)
    assert found[0] == Neighbour("deepseek_v3", "model", 0.0)
    assert "deepseek_r1" not in {neighbour.key for neighbour in found}


def test_number_and_exclusion() -> None:
    row = text("solar_open_100b")
    assert nearest(row, 0) == []
    assert len(nearest(row, 1000)) == len(nearest(row, 1000, exclude=("solar_open_100b",))) + 1
    assert "hyperclovax_seed_think_14b" not in {neighbour.key for neighbour in nearest(row, 1000)}
