"""Tokenizer checks: a match asks the weights, which clear it, confirm it or leave it open."""

from __future__ import annotations

import argparse
import asyncio.base_events
import inspect
import json
import pdb
import random
import tarfile
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest

from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.hub_access import HubAccess
from checks.checkpoint.model import Model
from checks.claim.model import ModelSource
from checks.evidence.record import CONTRADICTS, INCONCLUSIVE, NOT_APPLICABLE, SUPPORTS, Evidence
from checks.pair.pair import Pair
from checks.tokens import bases as bases_module
from checks.tokens.normal import byte_alphabet
from checks.tokens.segment import fixed_text

Judged = Callable[..., Evidence]
Tensors = dict[str, Any]
CHECKS = ("vocabulary", "ranks", "special_tokens", "segmentation")
SPECIAL = ("<|one|>", "<|two|>", "<|three|>", "<|four|>")


def trained(documents: Sequence[str], merges: int, special: tuple[str, ...] = SPECIAL) -> bytes:
    """A byte-level tokenizer trained on some text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=256 + len(special) + merges,
        special_tokens=list(special),
        initial_alphabet=sorted(byte_alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return str(tokenizer.to_str()).encode()


# Two kinds of English that ship with the interpreter, and Korean of which each tokenizer sees one half.
HELP = [text for _, text in sorted(topics.items())]
CODE = [inspect.getsource(module) for module in (argparse, asyncio.base_events, inspect, pdb, tarfile, typing)]
KOREAN = fixed_text()["korean"].splitlines()
ENGLISH = trained([*HELP, *KOREAN[::2] * 20], 3000)
OTHER = trained([*CODE, *KOREAN[1::2] * 20], 3000, ("<|a|>", "<|b|>", "<|c|>"))


def changed(tokenizer: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    document = json.loads(tokenizer)
    change(document)
    return json.dumps(document).encode()


def extended(document: dict[str, Any]) -> None:
    """Safety tokens added at the end."""
    size = len(document["model"]["vocab"])
    for index in range(5):
        document["added_tokens"].append({"id": size + index, "content": f"<|safety_{index}|>", "special": True})


def renumbered(document: dict[str, Any]) -> None:
    """New ids for every token, the same merges."""
    vocabulary = document["model"]["vocab"]
    ids = list(vocabulary.values())
    random.Random(3).shuffle(ids)
    document["model"]["vocab"] = dict(zip(vocabulary, ids, strict=True))
    for added in document["added_tokens"]:
        added["id"] = document["model"]["vocab"][added["content"]]


def cut_down(document: dict[str, Any]) -> None:
    """The later two fifths of the merges and their tokens dropped."""
    model = document["model"]
    kept = model["merges"][: 3 * len(model["merges"]) // 5]
    dropped = {"".join(merge) for merge in model["merges"][len(kept) :]} - {"".join(merge) for merge in kept}
    model["merges"] = kept
    model["vocab"] = {text: index for text, index in model["vocab"].items() if text not in dropped}


@pytest.fixture
def pair_of(
    examples: Path, save_checkpoint: Callable[..., Path], open_pair: Callable[..., Pair]
) -> Callable[..., Pair]:
    """A pair of example weights with the given tokenizers."""
    from safetensors.torch import load_file

    def make(
        ours: bytes | None, theirs: bytes | None, candidate: str | None = "independent", reference: str | None = "base"
    ) -> Pair:
        directories = []
        for name, weights, tokenizer in (("candidate", candidate, ours), ("reference", reference, theirs)):
            tensors = load_file(examples / weights / "model.safetensors") if weights else {}
            directory = save_checkpoint(name, tensors)
            if not weights:
                (directory / "model.safetensors").unlink()
            if tokenizer is not None:
                (directory / "tokenizer.json").write_bytes(tokenizer)
            directories.append(directory)
        return open_pair(*directories)

    return make


@pytest.fixture(scope="module")
def opened() -> dict[str, Pair]:
    """The pairs of `equal_pair` that were asked for before."""
    return {}


@pytest.fixture
def equal_pair(opened: dict[str, Pair], pair_of: Callable[..., Pair]) -> Callable[[str], Pair]:
    """An example model beside the base, both with the English tokenizer; measured once for all checks."""

    def make(candidate: str) -> Pair:
        if candidate not in opened:
            opened[candidate] = pair_of(ENGLISH, ENGLISH, candidate=candidate)
        return opened[candidate]

    return make


@pytest.mark.parametrize("check", CHECKS)
def test_an_equal_tokenizer_is_cleared_by_independent_weights(
    check: str, equal_pair: Callable[[str], Pair], judged: Judged
) -> None:
    evidence = judged(f"tokenizer.{check}", equal_pair("independent"))
    assert (evidence.outcome, evidence.value) == (SUPPORTS, 1)
    assert "independent weights" in evidence.reason
    assert evidence.details["weights"]


@pytest.mark.parametrize("check", CHECKS)
def test_an_equal_tokenizer_is_confirmed_by_inherited_weights(
    check: str, equal_pair: Callable[[str], Pair], judged: Judged
) -> None:
    evidence = judged(f"tokenizer.{check}", equal_pair("derived"))
    assert evidence.outcome == CONTRADICTS
    assert "inherited weights" in evidence.reason


@pytest.mark.parametrize("check", CHECKS)
def test_an_equal_tokenizer_without_weights_stays_open(
    check: str, pair_of: Callable[..., Pair], judged: Judged
) -> None:
    evidence = judged(f"tokenizer.{check}", pair_of(ENGLISH, ENGLISH, reference=None))
    assert evidence.outcome == INCONCLUSIVE
    assert "no weights to ask" in evidence.reason


@pytest.mark.parametrize("check", CHECKS)
def test_another_tokenizer_supports_without_asking_the_weights(
    check: str, pair_of: Callable[..., Pair], judged: Judged
) -> None:
    evidence = judged(f"tokenizer.{check}", pair_of(ENGLISH, OTHER, candidate=None, reference=None))
    assert evidence.outcome == SUPPORTS, evidence.reason
    assert "weights" not in evidence.details


@pytest.mark.parametrize(
    ("change", "numbering", "checks"),
    [
        (extended, "extended at the end", CHECKS),
        (renumbered, "renumbered", ("vocabulary", "ranks", "segmentation")),
    ],
)
def test_disguises_of_a_vocabulary_are_seen(
    change: Callable[[dict[str, Any]], None],
    numbering: str,
    checks: tuple[str, ...],
    pair_of: Callable[..., Pair],
    judged: Judged,
) -> None:
    pair = pair_of(changed(ENGLISH, change), ENGLISH, candidate="derived")
    found = {check: judged(f"tokenizer.{check}", pair) for check in checks}
    assert {one.outcome for one in found.values()} == {CONTRADICTS}
    assert found["vocabulary"].details["numbering"] == numbering


def test_a_vocabulary_that_was_cut_down_does_not_support(pair_of: Callable[..., Pair], judged: Judged) -> None:
    pair = pair_of(changed(ENGLISH, cut_down), ENGLISH, candidate="derived")
    evidence = judged("tokenizer.vocabulary", pair)
    assert evidence.outcome == INCONCLUSIVE
    assert "cut down" in evidence.reason
    assert evidence.value is not None
    assert evidence.value < 0.9 < evidence.details["of_candidate"]
    assert judged("tokenizer.ranks", pair).outcome == CONTRADICTS


def test_both_directions_and_the_files_are_in_the_record(pair_of: Callable[..., Pair], judged: Judged) -> None:
    evidence = judged("tokenizer.vocabulary", pair_of(ENGLISH, OTHER))
    details = evidence.details
    assert 0 < details["jaccard"] < min(details["of_candidate"], details["of_reference"])
    assert evidence.value == details["of_reference"]
    assert evidence.band is not None
    assert "scratch" in evidence.band
    assert set(evidence.read["candidate"]["sha256"]) == {"tokenizer.json"}
    assert json.loads(evidence.as_json())["details"]["tokens"]


def test_a_common_public_base_is_named(
    pair_of: Callable[..., Pair], judged: Judged, monkeypatch: pytest.MonkeyPatch
) -> None:
    from checks.statistics.vocabulary import fingerprint
    from checks.tokens import read_vocabulary

    sample = fingerprint(read_vocabulary({"tokenizer.json": ENGLISH}).ids(), 100)
    monkeypatch.setattr(bases_module, "public_bases", lambda: {"a_public_base": sample})
    evidence = judged("tokenizer.vocabulary", pair_of(changed(ENGLISH, extended), ENGLISH))
    assert evidence.outcome == SUPPORTS
    assert "both contain the public a_public_base" in evidence.reason


@pytest.mark.parametrize("outcome", [SUPPORTS, INCONCLUSIVE])
def test_a_common_public_base_is_named_where_the_value_decides_nothing(
    outcome: str, pair_of: Callable[..., Pair], judged: Judged, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bases_module, "bases_inside", lambda vocabulary: {"a_public_base": 0.99})
    theirs = OTHER if outcome == SUPPORTS else changed(ENGLISH, tiny)
    evidence = judged("tokenizer.vocabulary", pair_of(ENGLISH, theirs, candidate=None, reference=None))
    assert evidence.outcome == outcome
    assert evidence.details["shared_public_bases"] == ["a_public_base"]
    assert ("both contain the public a_public_base" in evidence.reason) is ((evidence.value or 0) >= 0.5)
    monkeypatch.setattr("checks.tokenizer.NAMES_BASES_FROM", 0.0)
    again = judged("tokenizer.vocabulary", pair_of(ENGLISH, theirs, candidate=None, reference=None))
    assert "both contain the public a_public_base" in again.reason


def test_the_level_of_unrelated_tokenizers_stands_beside_the_value(
    pair_of: Callable[..., Pair], judged: Judged
) -> None:
    similar = judged("tokenizer.vocabulary", pair_of(ENGLISH, OTHER))
    assert similar.details["unrelated"]["share_of_the_reference"] == [0.34, 0.74]
    assert "unrelated vocabularies of such sizes 34% to 74%" in similar.reason
    smaller = judged("tokenizer.vocabulary", pair_of(changed(ENGLISH, cut_down), OTHER))
    assert smaller.details["unrelated"]["share_of_the_reference"] == [0.17, 0.44]
    larger = judged("tokenizer.vocabulary", pair_of(OTHER, changed(ENGLISH, cut_down)))
    assert larger.details["unrelated"]["share_of_the_reference"] == [0.57, 0.92]


def without_merges(document: dict[str, Any]) -> None:
    document["model"]["merges"] = []


@pytest.mark.parametrize("side", [0, 1])
def test_a_vocabulary_without_merges_has_no_power(side: int, pair_of: Callable[..., Pair], judged: Judged) -> None:
    tokenizers = [ENGLISH, OTHER]
    tokenizers[side] = changed(tokenizers[side], without_merges)
    pair = pair_of(*tokenizers, candidate=None, reference=None)
    ranks, segmentation = judged("tokenizer.ranks", pair), judged("tokenizer.segmentation", pair)
    assert (ranks.outcome, segmentation.outcome) == (INCONCLUSIVE, NOT_APPLICABLE)
    for one in (ranks, segmentation):
        assert f"without merges: the {('candidate', 'reference')[side]}'s" in one.reason


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("component", ["vision", "projector"])
def test_components_beside_the_text_decoder_are_not_asked(
    check: str, component: str, examples: Path, judged: Judged
) -> None:
    source = ModelSource("model", path=str(examples / "base"))
    pair = Pair(Model(source, component, ("",)), Model(source, component, ("",)))
    evidence = judged(f"tokenizer.{check}", pair)
    assert evidence.outcome == NOT_APPLICABLE
    assert "text decoder" in evidence.reason


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("side", [0, 1])
def test_no_tokenizer_is_not_applicable(check: str, side: int, pair_of: Callable[..., Pair], judged: Judged) -> None:
    tokenizers: list[bytes | None] = [ENGLISH, ENGLISH]
    tokenizers[side] = None
    evidence = judged(f"tokenizer.{check}", pair_of(*tokenizers))
    assert evidence.outcome == NOT_APPLICABLE
    assert ("candidate", "reference")[side] in evidence.reason


def known_only(path: Path | None, key: str, repo: str | None = None) -> Pair:
    """A candidate at a path (None: as unreachable as the reference), and a reference of the catalogue."""
    hub = HubAccess(offline=True)
    candidate = ModelSource("candidate", path=str(path)) if path else ModelSource("vaetki", catalog_key="vaetki")
    reference = ModelSource(key, catalog_key=key, repo=repo)
    return Pair(Model(candidate, None, ("",), hub), Model(reference, None, ("",), hub))


@pytest.mark.parametrize("repo", [None, "meta-llama/Meta-Llama-3-70B"])
def test_of_a_tokenizer_that_cannot_be_had_the_catalogue_says_what_it_knows(
    repo: str | None, examples: Path, judged: Judged, hub: Any
) -> None:
    evidence = judged("tokenizer.vocabulary", known_only(examples / "base", "llama_3_70b", repo))
    assert evidence.outcome == INCONCLUSIVE
    assert evidence.value is None
    assert "the reference's is byte-level BPE (tiktoken), 128000 entries, 256 special tokens" in evidence.reason
    facts = evidence.details["catalogue"]
    assert set(facts) == {"reference"}
    assert (facts["reference"]["entries"]["value"], facts["reference"]["embedding_rows"]["value"]) == (128000, 128256)
    assert facts["reference"]["entries"]["source"]
    assert json.loads(evidence.as_json())["details"]["catalogue"]
    assert not hub.requests


def test_of_both_sides_where_neither_can_be_had(judged: Judged) -> None:
    evidence = judged("tokenizer.vocabulary", known_only(None, "qwen2_5_72b"))
    assert evidence.outcome == INCONCLUSIVE
    assert set(evidence.details["catalogue"]) == {"candidate", "reference"}
    assert evidence.details["catalogue"]["reference"]["entries"]["note"] == "plus special tokens"


@pytest.mark.parametrize("check", CHECKS)
def test_what_neither_files_nor_catalogue_tell_is_unavailable(check: str, examples: Path, judged: Judged) -> None:
    key = "solar_10_7b" if check == "vocabulary" else "llama_3_70b"
    with pytest.raises(CheckpointUnavailable, match="no path and no repository"):
        judged(f"tokenizer.{check}", known_only(examples / "base", key))


def tiny(document: dict[str, Any]) -> None:
    """The alphabet and five merges."""
    model = document["model"]
    model["merges"] = model["merges"][:5]
    kept = {"".join(merge) for merge in model["merges"]} | set(byte_alphabet()) | set(SPECIAL)
    model["vocab"] = {text: index for text, index in model["vocab"].items() if text in kept}


@pytest.mark.parametrize("check", ["vocabulary", "ranks"])
def test_an_alphabet_alone_has_no_power(check: str, pair_of: Callable[..., Pair], judged: Judged) -> None:
    small = changed(ENGLISH, tiny)
    evidence = judged(f"tokenizer.{check}", pair_of(small, small))
    assert evidence.outcome == INCONCLUSIVE
    assert "no power" in evidence.reason


def test_common_names_are_no_evidence(pair_of: Callable[..., Pair], judged: Judged) -> None:
    tokenizer = trained(HELP[:5], 300, ("<s>", "</s>", "<unk>", "<|endoftext|>"))
    evidence = judged("tokenizer.special_tokens", pair_of(tokenizer, tokenizer))
    assert evidence.outcome == INCONCLUSIVE
    assert len(evidence.details["common_names"]) == 4


def test_word_pieces_are_not_cut(pair_of: Callable[..., Pair], judged: Judged) -> None:
    vocabulary = {f"word{index}": index for index in range(600)}
    wordpiece = json.dumps({"model": {"type": "WordPiece", "vocab": vocabulary}}).encode()
    evidence = judged("tokenizer.segmentation", pair_of(wordpiece, wordpiece))
    assert evidence.outcome == NOT_APPLICABLE


def test_the_examples_share_a_tokenizer_and_their_weights_decide(
    examples: Path, open_pair: Callable[..., Pair], judged: Judged
) -> None:
    for name, outcome in (("independent", SUPPORTS), ("derived", CONTRADICTS)):
        pair = open_pair(examples / name, examples / "base")
        assert judged("tokenizer.vocabulary", pair).outcome == outcome
        assert judged("tokenizer.ranks", pair).outcome == outcome
