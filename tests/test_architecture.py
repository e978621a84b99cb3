from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from checks.catalog.architecture import Architecture, from_config
from checks.catalog.entry import load
from checks.checkpoint.model import Model
from checks.claim.model import ModelSource
from checks.claim.training import Training
from checks.evidence.record import CONTRADICTS, INCONCLUSIVE, NOT_APPLICABLE, SUPPORTS, Evidence
from checks.pair.candidate import Candidate
from checks.pair.pair import Pair

Tensors = dict[str, torch.Tensor]
Llama = Callable[..., Tensors]
Save = Callable[..., Path]
Judged = Callable[..., Evidence]
BY_CONFIGURATION = ("architecture.identical", "architecture.overlap")


def known(key: str, path: Path | None = None) -> Model:
    """A model of the catalogue, with weights at `path`."""
    where = None if path is None else str(path)
    source = ModelSource(key, catalog_key=key, path=where, repo=load(key).repo, architectures=load(key).components)
    return Model(source, None, ("",))


def row(architecture: Architecture | None, name: str = "model", path: Path | None = None) -> Model:
    """A model of one architecture."""
    where = None if path is None else str(path)
    return Model(
        ModelSource(name, path=where, architectures={"model": architecture} if architecture else {}), None, ("",)
    )


def example(examples: Path, name: str, **changes: Any) -> Model:
    """A trained example, its architecture changed."""
    architecture = from_config(json.loads((examples / name / "config.json").read_text()))["model"]
    return row(replace(architecture, **changes), name, examples / name)


# Five keys


def test_five_equal_keys_without_weights_are_inconclusive_and_say_so(judged: Judged) -> None:
    evidence = judged("architecture.identical", Pair(known("axk1"), known("kimi_k2")))
    assert evidence.outcome == INCONCLUSIVE
    assert evidence.value == 5
    assert not evidence.powered
    assert "5 of 5 keys are equal" in evidence.reason
    assert "no weights to ask" in evidence.reason
    assert "skt/A.X-K1" in evidence.reason


def test_five_equal_keys_are_cleared_by_independent_weights(
    llama_tensors: Llama, save_checkpoint: Save, judged: Judged
) -> None:
    ours, theirs = save_checkpoint("ours", llama_tensors(1)), save_checkpoint("theirs", llama_tensors(2))
    evidence = judged("architecture.identical", Pair(known("axk1", ours), known("kimi_k2", theirs)))
    assert evidence.outcome == SUPPORTS
    assert evidence.value == 5
    assert evidence.powered
    assert "independent weights" in evidence.reason
    assert {"identity.sha256", "similarity.category", "independence.units"} <= set(evidence.details["weights"])


def test_five_equal_keys_are_confirmed_by_inherited_weights(
    llama_tensors: Llama, save_checkpoint: Save, judged: Judged
) -> None:
    theirs = llama_tensors(1)
    ours = {
        name: tensor + 0.1 * tensor.std() * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1))
        for name, tensor in theirs.items()
    }
    pair = Pair(known("axk1", save_checkpoint("ours", ours)), known("kimi_k2", save_checkpoint("theirs", theirs)))
    evidence = judged("architecture.identical", pair)
    assert evidence.outcome == CONTRADICTS
    assert "inherited weights" in evidence.reason


def test_trained_examples_are_told_apart_by_their_weights(examples: Path, judged: Judged) -> None:
    """All three share one configuration."""
    independent = Pair(example(examples, "independent"), example(examples, "base"))
    derived = Pair(example(examples, "derived"), example(examples, "base"))
    for check in BY_CONFIGURATION:
        assert judged(check, independent).outcome == SUPPORTS
        assert judged(check, derived).outcome == CONTRADICTS


@pytest.mark.parametrize("name", ["nowhere", "broken"])
def test_weights_of_one_side_are_not_enough(name: str, examples: Path, tmp_path: Path, judged: Judged) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"broken")
    reference = example(examples, "base")
    reference = row(reference.architecture, name, tmp_path / name)
    evidence = judged("architecture.identical", Pair(example(examples, "derived"), reference))
    assert evidence.outcome == INCONCLUSIVE
    assert "no weights to ask" in evidence.reason
    assert name in evidence.reason


@pytest.mark.parametrize(
    ("candidate", "reference", "equal", "outcome"),
    [
        ("axk1", "deepseek_v3", 4, INCONCLUSIVE),
        ("solar_open_100b", "solar_10_7b", 3, INCONCLUSIVE),
        ("hyperclovax_seed_think_32b", "exaone_4_0_32b", 3, INCONCLUSIVE),
        ("solar_open_100b", "mixtral_8x7b", 2, SUPPORTS),
        ("solar_open_100b", "glm_4_5_air", 2, SUPPORTS),
        ("solar_open_100b", "deepseek_v2", 1, SUPPORTS),
        ("solar_open_100b", "qwen2_57b_a14b", 1, SUPPORTS),
        ("hyperclovax_seed_think_32b", "qwen2_5_72b", 1, SUPPORTS),
    ],
)
def test_five_keys_of_the_catalogue(candidate: str, reference: str, equal: int, outcome: str, judged: Judged) -> None:
    evidence = judged("architecture.identical", Pair(known(candidate), known(reference)))
    assert evidence.value == equal
    assert evidence.outcome == outcome
    assert "weights" not in evidence.details
    assert evidence.details["known_keys"] == 5


def test_the_five_keys_are_in_the_record(judged: Judged) -> None:
    keys = judged("architecture.identical", Pair(known("axk1"), known("deepseek_v3"))).details["keys"]
    assert list(keys) == [
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "hidden_act",
    ]
    assert keys["num_attention_heads"] == {"candidate": 64, "reference": 128, "equal": False}


FIVE = Architecture(
    hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=176, hidden_act="silu"
)


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        ({"hidden_act": None}, INCONCLUSIVE),
        ({"hidden_size": 65, "hidden_act": None}, INCONCLUSIVE),
        ({"hidden_size": 65, "num_hidden_layers": 4, "num_attention_heads": 5, "hidden_act": None}, SUPPORTS),
        ({"hidden_size": 65, "num_hidden_layers": 4, "num_attention_heads": None, "hidden_act": None}, INCONCLUSIVE),
        ({"hidden_size": 65, "num_hidden_layers": 4, "num_attention_heads": 5, "intermediate_size": None}, SUPPORTS),
    ],
)
def test_unknown_key_leaves_open_what_it_could_change(changes: dict[str, Any], outcome: str, judged: Judged) -> None:
    evidence = judged("architecture.identical", Pair(row(replace(FIVE, **changes)), row(FIVE)))
    assert evidence.outcome == outcome
    assert evidence.details["unknown_keys"] == sum(value is None for value in changes.values())


@pytest.mark.parametrize("check", BY_CONFIGURATION)
def test_unknown_configuration_is_not_applicable(check: str, judged: Judged) -> None:
    for ours, theirs in ((None, FIVE), (FIVE, None), (Architecture(), FIVE), (None, None)):
        evidence = judged(check, Pair(row(ours, "ours"), row(theirs, "theirs")))
        assert evidence.outcome == NOT_APPLICABLE
    assert "theirs" in judged(check, Pair(row(FIVE, "ours"), row(None, "theirs"))).reason


# All keys


@pytest.mark.parametrize(
    ("candidate", "reference", "equal"),
    [
        ("solar_open_100b", "mixtral_8x7b", "3/7"),
        ("solar_open_100b", "deepseek_v2", "0/7"),
        ("solar_open_100b", "qwen2_57b_a14b", "1/7"),
        ("hyperclovax_seed_think_32b", "llama_3_1_70b", "2/7"),
        ("hyperclovax_seed_think_32b", "qwen2_5_72b", "1/7"),
    ],
)
def test_seven_key_tables_of_the_documents_corrected(
    candidate: str, reference: str, equal: str, judged: Judged
) -> None:
    """What docs/sources.md lists as corrected."""
    evidence = judged("architecture.overlap", Pair(known(candidate), known(reference)))
    assert evidence.details["seven_keys_equal"] == equal
    assert len(evidence.details["seven_keys"]) == 7


def test_seven_keys_that_solar_and_mixtral_share(judged: Judged) -> None:
    rows = judged("architecture.overlap", Pair(known("solar_open_100b"), known("mixtral_8x7b"))).details["seven_keys"]
    assert {key for key, one in rows.items() if one["equal"]} == {"hidden_size", "num_key_value_heads", "rope_theta"}


def test_unique_values_are_counted_and_not_claimed(judged: Judged) -> None:
    evidence = judged("architecture.overlap", Pair(known("solar_open_100b"), known("solar_10_7b")))
    sharing, total = evidence.details["shared_by"]["num_hidden_layers"].split(" of ")
    assert int(sharing) >= 5  # "48 layers unique", the documents said
    assert int(total) > 25


def test_latent_attention_is_not_taken_for_many_heads(judged: Judged) -> None:
    keys = judged("architecture.overlap", Pair(known("axk1"), known("solar_open_100b"))).details["keys"]
    assert keys["attention_kind"] == {"candidate": "MLA", "reference": "GQA", "equal": False}
    assert keys["num_key_value_heads"]["candidate"] == "does not apply"


def test_share_between_the_bounds_is_inconclusive_and_below_supports(judged: Judged) -> None:
    near = judged("architecture.overlap", Pair(known("solar_open_100b"), known("glm_4_5_air")))
    assert near.outcome == INCONCLUSIVE
    assert 0.5 < float(near.value or 0) < 1
    far = judged("architecture.overlap", Pair(known("solar_open_100b"), known("deepseek_v2")))
    assert far.outcome == SUPPORTS


def test_all_keys_equal_ask_the_weights(judged: Judged) -> None:
    evidence = judged("architecture.overlap", Pair(known("kimi_k2"), known("kimi_k2")))
    assert evidence.value == 1
    assert evidence.outcome == INCONCLUSIVE
    assert "no weights to ask" in evidence.reason


# Declared sizes


def candidate_of(model: Model, stated: float | None = None, panel: tuple[str, ...] = ()) -> Candidate:
    return Candidate(model.source, None, ("",), Training(total=stated), frozenset(panel))


@pytest.mark.parametrize("name", ["base", "independent", "derived"])
def test_declared_sizes_of_the_examples_agree(name: str, examples: Path, judged: Judged) -> None:
    evidence = judged("architecture.declared", candidate_of(example(examples, name), 1_000_576))
    assert evidence.outcome == SUPPORTS
    assert evidence.value == 0
    assert evidence.details["totals"] == {"claim": 1_000_576, "configuration": 1_000_576, "shapes": 1_000_576}


@pytest.mark.parametrize(
    ("changes", "outcome"),
    [
        ({"vocab_size": 2048}, CONTRADICTS),
        ({"hidden_size": 256}, CONTRADICTS),
        ({"num_hidden_layers": 5}, CONTRADICTS),
        ({"num_hidden_layers": 3}, CONTRADICTS),
        ({"intermediate_size": 704}, CONTRADICTS),
        ({"intermediate_size": 384}, INCONCLUSIVE),
        ({"tie_word_embeddings": True}, SUPPORTS),
    ],
)
def test_configuration_of_another_model_is_noticed(
    changes: dict[str, Any], outcome: str, examples: Path, judged: Judged
) -> None:
    assert judged("architecture.declared", candidate_of(example(examples, "base", **changes))).outcome == outcome


def test_checkpoint_without_one_layer_contradicts_its_configuration(
    llama_tensors: Llama, llama_config: Callable[..., dict[str, Any]], save_checkpoint: Save, judged: Judged
) -> None:
    tensors = {name: tensor for name, tensor in llama_tensors().items() if ".layers.1." not in name}
    architecture = from_config(llama_config())["model"]
    evidence = judged("architecture.declared", candidate_of(row(architecture, path=save_checkpoint("c", tensors))))
    assert evidence.outcome == CONTRADICTS
    assert evidence.details["dimensions"] == {"num_hidden_layers": "configured 3, stored 2"}


@pytest.mark.parametrize(
    ("stated", "outcome"), [(1.0e6, SUPPORTS), (1.05e6, INCONCLUSIVE), (1.2e6, CONTRADICTS), (1.0e9, CONTRADICTS)]
)
def test_stated_total_may_be_rounded_but_not_of_another_size(
    stated: float, outcome: str, examples: Path, judged: Judged
) -> None:
    assert judged("architecture.declared", candidate_of(example(examples, "base"), stated)).outcome == outcome


@pytest.mark.parametrize("key", ["solar_open_100b", "axk1", "mixtral_8x7b", "glm_4_5_air", "deepseek_v3"])
def test_catalogue_agrees_with_itself(key: str, judged: Judged) -> None:
    evidence = judged("architecture.declared", candidate_of(known(key)))
    assert evidence.outcome == SUPPORTS
    assert "stored shapes" in evidence.details["missing"]


def test_nothing_declared_is_not_applicable(judged: Judged) -> None:
    assert judged("architecture.declared", candidate_of(row(None))).outcome == NOT_APPLICABLE


# The panel

NEIGHBOURS = ("glm_4_5_air", "qwen3_235b_a22b", "k_exaone_236b_a23b")


def test_panel_with_all_neighbours_supports(judged: Judged) -> None:
    evidence = judged("architecture.panel", candidate_of(known("solar_open_100b"), panel=NEIGHBOURS))
    assert evidence.outcome == SUPPORTS
    assert evidence.value == 0
    assert tuple(evidence.details["nearest"]) == NEIGHBOURS


@pytest.mark.parametrize("left_out", [1, 2, 3])
def test_missing_neighbours_are_named_and_never_contradict(left_out: int, judged: Judged) -> None:
    panel = NEIGHBOURS[left_out:]
    evidence = judged("architecture.panel", candidate_of(known("solar_open_100b"), panel=panel))
    assert evidence.outcome == INCONCLUSIVE
    assert evidence.value == left_out
    assert evidence.details["missing"] == list(NEIGHBOURS[:left_out])
    assert all(name in evidence.reason for name in NEIGHBOURS[:left_out])


def test_hand_picked_panel_of_the_documents_left_out_the_nearest(judged: Judged) -> None:
    panel = ("mixtral_8x7b", "deepseek_v2", "qwen2_57b_a14b")
    evidence = judged("architecture.panel", candidate_of(known("solar_open_100b"), panel=panel))
    assert evidence.outcome == INCONCLUSIVE
    assert "glm_4_5_air" in evidence.details["missing"]


def test_far_architectures_are_no_neighbours(judged: Judged) -> None:
    lonely = Architecture(hidden_size=7, num_hidden_layers=999, num_attention_heads=1, intermediate_size=3)
    evidence = judged("architecture.panel", candidate_of(row(lonely)))
    assert evidence.outcome == SUPPORTS
    assert evidence.details["nearest"] == {}


def test_model_is_no_neighbour_of_itself(judged: Judged) -> None:
    evidence = judged("architecture.panel", candidate_of(known("kimi_k2")))
    assert "kimi_k2" not in evidence.details["nearest"]
    assert "axk1" in evidence.details["nearest"]


def test_panel_of_an_unknown_configuration_is_not_applicable(judged: Judged) -> None:
    assert judged("architecture.panel", candidate_of(row(None))).outcome == NOT_APPLICABLE


def test_rows_that_rest_on_no_primary_source_are_marked(judged: Judged) -> None:
    pair = Pair(known("hyperclovax_seed_think_32b"), known("solar_open_100b"))
    details = judged("architecture.overlap", pair).details
    assert "rope_theta" in details["unverified"]["candidate"]
    assert "hidden_size" not in details["unverified"]["reference"]
    assert set(details["unverified"]["candidate"]) <= set(details["keys"])
