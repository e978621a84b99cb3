"""Rows of shared tokens where weights are read in part: what is found by them, and what is not read for them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from checks.checkpoint.index import ByteSource
from checks.checkpoint.model import Model
from checks.claim.model import ModelSource
from checks.pair import measures
from checks.pair.pair import Pair
from checks.pair.reading import Reading
from checks.pair.shared_tokens import shared_tokens_of
from checks.streaming.read_plan import byte_ranges

SHARED = 96
VOCABULARIES = (4000, 4096)
SIZE = {
    "hidden_size": 512,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
CHECKS = ("embedding.rows", "embedding.centroids", "embedding.moments", "independence.channels")
SCREENING, SAMPLE = ("--read", "screen", "--budget", "6MB"), ("--read", "sample", "--budget", "6MB")
TABLES = ("model.embed_tokens.weight", "lm_head.weight")
Models = dict[str, Path]


def words(vocabulary: int, seed: int, name: str) -> list[str]:
    """A vocabulary of one's own, with the shared words in another order, in six places."""
    order = torch.randperm(SHARED, generator=torch.Generator().manual_seed(seed)).tolist()
    places = [600 * (place // 16) + 100 * seed + place % 16 for place in order]
    found = [f"{name}{number}" for number in range(vocabulary)]
    for number, place in enumerate(places):
        found[place] = f"shared{number}"
    return found


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    """The words of both vocabularies."""
    return {"own": words(VOCABULARIES[0], 1, "own"), "theirs": words(VOCABULARIES[1], 2, "theirs")}


@pytest.fixture
def models(save_checkpoint: Any, llama_tensors: Any, llama_config: Any, made: dict[str, Any]) -> Models:
    """A base; a model with a vocabulary of its own; and that model with the base's rows for the shared tokens."""
    tensors = {
        "base": llama_tensors(0, torch.bfloat16, vocab_size=VOCABULARIES[1], **SIZE),
        "independent": llama_tensors(1, torch.bfloat16, vocab_size=VOCABULARIES[0], **SIZE),
    }
    taken = {word: index for index, word in enumerate(made["theirs"]) if word.startswith("shared")}
    tensors["copied"] = {name: tensor.clone() for name, tensor in tensors["independent"].items()}
    for name in TABLES:
        for index, word in enumerate(made["own"]):
            if word in taken:
                tensors["copied"][name][index] = tensors["base"][name][taken[word]]
    found = {}
    for name, weights in tensors.items():
        config = llama_config(vocab_size=len(weights[TABLES[0]]), **SIZE)
        found[name] = save_checkpoint(name, weights, config)
        (found[name] / "vocab.txt").write_text("\n".join(made["theirs" if name == "base" else "own"]))
    return found


@pytest.fixture
def run(pytester: pytest.Pytester, models: Models) -> Callable[..., dict[str, Any]]:
    """Runs a claim about one of the models against the base, and returns its report."""

    def make(name: str, *options: str, checks: Sequence[str] = CHECKS) -> dict[str, Any]:
        claim = {
            "claim": "example",
            "statement": "The example model was trained from scratch.",
            "model": {"name": name, "path": str(models[name])},
            "references": [{"name": "base", "path": str(models["base"])}],
            "nearest": 0,
            "checks": {"only": list(checks)},
        }
        (pytester.path / "example.yaml").write_text(yaml.safe_dump(claim, sort_keys=False))
        pytester.runpytest("example.yaml", "--report", "out", "--store", "none", *options)
        report = json.loads((pytester.path / "out" / "verdict.json").read_text())
        found: dict[str, Any] = report["claims"]["example"]
        return found

    return make


def evidence(claim: dict[str, Any], check: str) -> dict[str, Any]:
    found: dict[str, Any] = claim["cases"][f"{check}[base]"]["evidence"]
    return found


@pytest.mark.parametrize("options", [SCREENING, SAMPLE], ids=["screen", "sample"])
def test_rows_of_another_model_are_found_under_a_new_vocabulary(run: Any, options: tuple[str, ...]) -> None:
    claim = run("copied", *options)
    assert claim["verdict"] == "REFUTED"
    rows, channels = evidence(claim, "embedding.rows"), evidence(claim, "independence.channels")
    assert rows["outcome"] == channels["outcome"] == "contradicts"
    assert rows["details"]["rows"]["embedding"]["tokens"] == SHARED
    assert rows["details"]["rows"]["head"]["cosine"] == pytest.approx(1)
    assert channels["details"]["tests"]["embedding"]["effect"] == pytest.approx(1)
    read = rows["read"]
    assert read["shared_tokens"] == SHARED
    both = [read[side]["read"] for side in ("candidate", "reference")]
    assert sum(one["bytes"] for one in both) <= 6_000_000
    assert [one["token_row_bytes"] for one in both] == [2 * SHARED * 1024] * 2  # of two tables


@pytest.mark.parametrize("options", [SCREENING, SAMPLE], ids=["screen", "sample"])
def test_independent_models_are_not_accused(run: Any, options: tuple[str, ...]) -> None:
    claim = run("independent", *options)
    outcomes = {check: evidence(claim, check)["outcome"] for check in CHECKS}
    assert "contradicts" not in outcomes.values()
    if options is SCREENING:
        assert claim["verdict"] == "INCONCLUSIVE"
        assert set(outcomes.values()) == {"inconclusive"}
        assert "a screening may refute, not support" in evidence(claim, "embedding.rows")["reason"]
    else:
        assert outcomes["embedding.rows"] == outcomes["independence.channels"] == "supports"


def test_without_a_tokenizer_rows_stay_open_and_channels_do_without(run: Any, models: Models) -> None:
    (models["copied"] / "vocab.txt").unlink()
    claim = run("copied", *SCREENING)
    rows, channels = evidence(claim, "embedding.rows"), evidence(claim, "independence.channels")
    assert rows["outcome"] == "inconclusive"
    assert rows["reason"] == "no tokenizer of copied"
    assert rows["read"]["shared_tokens"] == 0
    assert channels["details"]["tests"].keys() == {"whole", "norms", "layers"}


def test_a_tokenizer_that_cannot_be_read_stops_no_other_check(run: Any, models: Models) -> None:
    (models["copied"] / "vocab.txt").write_bytes(b"\xff\xfe")
    claim = run("copied", *SCREENING, checks=("embedding.rows", "similarity.layer"))
    assert evidence(claim, "embedding.rows")["outcome"] == "error"
    assert "vocab.txt" in evidence(claim, "embedding.rows")["reason"]
    assert claim["cases"]["similarity.layer[base-0]"]["outcome"] == "inconclusive"


def test_no_room_for_rows_is_said(run: Any) -> None:
    least = 1_600_000  # headers, norms and a layer of each model, and not much more
    claim = run("copied", "--read", "screen", "--budget", str(least))
    rows = evidence(claim, "embedding.rows")
    assert rows["outcome"] == "inconclusive"
    assert f"--read screen reads no rows of the {SHARED} shared tokens" in rows["reason"]


class Recording:
    """Notes which bytes are read."""

    def __init__(self, source: ByteSource) -> None:
        self.source = source
        self.reads: list[tuple[str, int, int]] = []

    def read_into(self, shard: str, start: int, buffer: memoryview) -> None:
        self.reads.append((shard, start, start + buffer.nbytes))
        self.source.read_into(shard, start, buffer)


@pytest.mark.parametrize("mode", ["screen", "sample"])
def test_no_byte_is_read_but_what_is_planned(models: Models, mode: str) -> None:
    sides = [Model(ModelSource(name, path=str(models[name])), None, ("",)) for name in ("copied", "base")]
    recorded = [Recording(side.checkpoint.source) for side in sides]
    for side, recording in zip(sides, recorded, strict=True):
        side.checkpoint.source = recording
    pair = Pair(sides[0], sides[1], reading=Reading(mode, 6_000_000))
    assert len(pair.once(measures.tables)) == 2
    assert pair.once(measures.channels) is not None
    assert pair.plan is not None
    for side, recording, planned in zip(
        sides, recorded, (pair.plan.candidate.reads, pair.plan.reference.reads), strict=True
    ):
        ranges = [*byte_ranges(side.checkpoint.index, planned)]
        assert recording.reads
        for shard, start, stop in recording.reads:
            assert any(one == shard and first <= start and stop <= last for one, first, last in ranges)
        # The tables are not read as wholes.
        size = side.checkpoint.tensors[TABLES[0]].stored
        assert all(stop - start < (size.stop - size.start) / 4 for _, start, stop in recording.reads)


def test_a_table_of_positions_has_no_rows_of_tokens(tmp_path: Path, save_checkpoint: Any, made: dict[str, Any]) -> None:
    """GPT-2 has 1024 positions beside its tokens: shared tokens of larger ids have rows all the same."""
    sides = []
    for name, rows in (("own", 4000), ("theirs", 2600)):
        config = {"model_type": "gpt2", "n_embd": 64, "n_layer": 1, "n_head": 2, "vocab_size": rows}
        tensors = {
            "transformer.wte.weight": torch.randn(rows, 64),
            "transformer.wpe.weight": torch.randn(256, 64),
            "transformer.ln_f.weight": torch.ones(64),
            "transformer.h.0.ln_1.weight": torch.ones(64),
            "transformer.h.0.mlp.c_fc.weight": torch.randn(64, 256),
            "transformer.h.0.mlp.c_proj.weight": torch.randn(256, 64),
        }
        directory = save_checkpoint(name, tensors, config)
        (directory / "vocab.txt").write_text("\n".join(made[name]))
        sides.append(Model(ModelSource(name, path=str(directory)), None, ("",)))
    ids = [{word: number for number, word in enumerate(made[name])} for name in ("own", "theirs")]
    there = {word for word in ids[0].keys() & ids[1].keys() if ids[0][word] < 4000 and ids[1][word] < 2600}
    assert 16 < len(there) < SHARED
    found = shared_tokens_of(*sides)
    assert {made["own"][one] for one in found.ids[0]} == there
    assert max(found.ids[0]) > 256


def test_ids_without_a_row_take_no_place_in_the_draw(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("checks.pair.shared_tokens.FEWEST_TOKENS", 40)
    monkeypatch.setattr("checks.pair.shared_tokens.MOST_TOKENS", 40)
    sides = [Model(ModelSource(name, path=str(models[name])), None, ("",)) for name in ("copied", "base")]
    assert len(shared_tokens_of(*sides)) == 40
    more = (models["base"] / "vocab.txt").read_text().split("\n")
    beyond = [f"own{number}" for number in range(3000)]  # tokens of the other model, without rows here
    (models["base"] / "vocab.txt").write_text("\n".join([*more, *beyond]))
    again = [Model(ModelSource(name, path=str(models[name])), None, ("",)) for name in ("copied", "base")]
    assert shared_tokens_of(*again).ids == shared_tokens_of(*sides).ids


def test_a_drawn_seed_is_recorded_and_kept_with_the_store(run: Any) -> None:
    def seed(store: str, *options: str) -> int:
        claim = run("copied", *SCREENING, "--seed", "drawn", "--store", store, *options, checks=("embedding.rows",))
        found: int = evidence(claim, "embedding.rows")["read"]["seed"]
        return found

    kept = seed("kept")
    assert seed("kept") == seed("kept", "-n", "1") == kept
    assert seed("other") != kept
    assert seed("none") != seed("none")


@pytest.mark.parametrize("text", ["", "1.5", "random"])
def test_what_is_no_seed(pytester: pytest.Pytester, text: str) -> None:
    result = pytester.runpytest("--seed", text)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*expected a whole number, or drawn*"])
