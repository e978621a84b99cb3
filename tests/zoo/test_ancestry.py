"""ancestry.yaml is complete, its halves share nothing, and its pairs are what they are said to be."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from tests.zoo import derive, symmetry
from tests.zoo.ancestry import FILE, Ancestry, load_ancestry
from tests.zoo.build import build_order, with_needs


@pytest.fixture(scope="module")
def ancestry() -> Ancestry:
    return load_ancestry()


@pytest.mark.parametrize(
    ("candidate", "reference", "expected"),
    [
        ("llama_fine_tuned", "llama", "derived"),
        ("llama", "llama_fine_tuned", "derived"),
        ("llama_sibling", "llama_fine_tuned", "derived"),
        ("llama_new_tokenizer_rotated_permuted_tuned", "llama", "derived"),
        ("llama_slerped", "llama_other_data", "derived"),
        ("llama_slerped", "llama", "derived"),
        ("llama_slerped", "llama_other_seed", "innocent"),
        ("llama_other_seed", "llama", "innocent"),
        ("llama_distilled", "llama", "innocent"),
        ("llama_shuffled", "llama", "innocent"),
        ("qwen_int4", "llama", "innocent"),
        ("llama_twin", "llama", "shared initialisation"),
        ("llama_twin", "llama_fine_tuned", "shared initialisation"),
        ("llama_initial", "llama", "shared initialisation"),
        ("llama_twin", "llama_other_seed", "innocent"),
        ("llama_second_twin", "llama", "shared initialisation"),
        ("llama_second_twin", "llama_twin", "shared initialisation"),
        ("llama_second_twin", "llama_other_data", "innocent"),
        ("llama_grafted", "llama", "derived"),
        ("llama_grafted", "llama_twin", "shared initialisation"),
        ("llama_grafted", "llama_initial", "shared initialisation"),
        ("llama_grafted", "llama_other_data", "innocent"),
        ("llama_other_data_upcycled", "llama_other_data", "derived"),
        ("llama_other_data_upcycled", "llama_upcycled", "innocent"),
        ("llama_other_data_upcycled", "llama", "innocent"),
        ("llama_other_order", "llama", "innocent"),
        ("llama_continued_twice", "llama", "derived"),
    ],
)
def test_relations(ancestry: Ancestry, candidate: str, reference: str, expected: str) -> None:
    for half in ("setting", "scoring"):
        assert ancestry.relation(f"{half}/{candidate}", f"{half}/{reference}") == expected


def test_the_halves_share_no_model_and_no_seed(ancestry: Ancestry) -> None:
    for model in ancestry.models.values():
        assert all(need.startswith(f"{model.half}/") for need in model.needs)
    seeds = [model.seed for model in ancestry.models.values()]
    assert len(set(seeds)) == len(seeds)
    for setting in ancestry.of_half("setting"):
        scoring = ancestry.models[setting.name.replace("setting/", "scoring/")]
        assert ancestry.relation(setting.name, scoring.name) == "innocent"


def test_every_change_is_defined_and_takes_its_options(ancestry: Ancestry) -> None:
    for model in ancestry.models.values():
        for name, options in model.changes:
            change = getattr(symmetry, name, None) or getattr(derive, name)
            assert set(options) <= set(inspect.signature(change).parameters), f"{model.name}: {name}"


def test_every_pair_is_listed_once(ancestry: Ancestry) -> None:
    pairs = [(candidate.name, reference.name) for candidate, reference, _ in ancestry.pairs("scoring")]
    assert len(set(pairs)) == len(pairs)
    references = {reference for _, reference in pairs}
    assert {"scoring/llama", "scoring/qwen", "scoring/mixtral", "scoring/llama_other_data"} <= references
    assert not any(candidate.endswith(("_initial", "_step_50")) for candidate, _ in pairs)
    relations = {relation for _, _, relation in ancestry.pairs("scoring")}
    assert relations == {"derived", "innocent", "shared initialisation"}


def test_a_model_named_beside_another_is_a_reference_for_it_alone(ancestry: Ancestry) -> None:
    for half in ("setting", "scoring"):
        upcycled = f"{half}/llama_upcycled"
        found = [(one.name, relation) for one, other, relation in ancestry.pairs(half) if other.name == upcycled]
        assert found == [(f"{half}/llama_other_data_upcycled", "innocent")]


def test_independent_upcycled_models_differ_in_nothing_but_the_parent(ancestry: Ancestry) -> None:
    for half in ("setting", "scoring"):
        one, other = (ancestry.models[f"{half}/{name}"] for name in ("llama_upcycled", "llama_other_data_upcycled"))
        assert (one.changes, one.training) == (other.changes, other.training)
        assert one.seed != other.seed


def test_the_second_twin_reads_the_text_of_llama_in_an_order_of_its_own(ancestry: Ancestry) -> None:
    for half in ("setting", "scoring"):
        llama, twin = (ancestry.models[f"{half}/{name}"] for name in ("llama", "llama_second_twin"))
        assert (twin.initial, twin.training, twin.shape) == (llama.initial, llama.training, llama.shape)
        assert twin.order != llama.order


def test_nothing_is_built_before_what_it_needs(ancestry: Ancestry) -> None:
    order = [model.name for model in build_order(ancestry, ("setting", "scoring"))]
    assert len(order) == len(ancestry.of_half("setting")) + len(ancestry.of_half("scoring"))
    for model in ancestry.models.values():
        assert all(order.index(need) < order.index(model.name) for need in model.needs if model.name in order)
    assert {"setting/llama", "scoring/llama", "setting/mixtral", "scoring/qwen"} <= set(order[:14])


def test_a_single_model_brings_its_ancestors(ancestry: Ancestry) -> None:
    expected = {"small/llama_rotated_tuned", "small/llama_rotated", "small/llama", "small/llama_initial"}
    assert with_needs(ancestry, ["small/llama_rotated_tuned"]) == expected
    with pytest.raises(SystemExit, match="no model 'llama'"):
        with_needs(ancestry, ["llama"])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("kind: initial", "kind: inital", "kind 'inital'"),
        ("parents: [llama_rotated]", "parents: [lama]", "needs setting/lama"),
        ("shape: narrow", "shape: tiny", "defines no 'tiny'"),
        ("beside: [llama_upcycled]", "beside: [llama_up]", "needs setting/llama_up,"),
    ],
)
def test_mistakes_in_the_file_are_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    file = tmp_path / "ancestry.yaml"
    text = FILE.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_ancestry(file)
