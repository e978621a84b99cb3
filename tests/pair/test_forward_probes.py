from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.model import Model
from checks.claim.model import ModelSource
from checks.evidence.record import CONTRADICTS, INCONCLUSIVE, SUPPORTS, Evidence
from checks.pair import measures
from checks.pair.forward_model import NoForwardPass
from checks.pair.forward_probes import (
    PLACES,
    TextTokens,
    common_places,
    forward_probes,
    passages,
    text_sha256,
    tokenise,
    without_common_directions,
)
from checks.pair.pair import Pair
from checks.pair.reading import Reading
from tests.pair.example_models import EXAMPLES, hidden, weights
from tests.zoo import derive
from tests.zoo.weights import Weights, write_weights

FEW = 400


def opened(directory: Path) -> Model:
    return Model(ModelSource(name=directory.name, path=str(directory), architectures={}), None, ("",))


def save_model(directory: Path, changed: Weights, tokenizer: dict[str, Any] | None = None) -> Path:
    directory.mkdir()
    write_weights(changed, directory)
    content = json.loads((EXAMPLES / "base/tokenizer.json").read_text()) if tokenizer is None else tokenizer
    (directory / "tokenizer.json").write_text(json.dumps(content))
    return directory


def with_few_tokens(changed: Weights, count: int) -> tuple[Weights, dict[str, Any]]:
    """A model and its tokenizer with nothing but the first tokens: other pieces, the same function."""
    tokenizer = json.loads((EXAMPLES / "base/tokenizer.json").read_text())
    vocabulary = {text: index for text, index in tokenizer["model"]["vocab"].items() if index < count}
    tokenizer["model"]["vocab"] = vocabulary
    merges = tokenizer["model"]["merges"]
    pairs = [one.split(" ") if isinstance(one, str) else one for one in merges]
    tokenizer["model"]["merges"] = [list(one) for one in pairs if "".join(one) in vocabulary]
    cut = changed.copy(vocab_size=count)
    for name in (derive.EMBEDDING, derive.HEAD):
        if name in cut.tensors:
            cut.tensors[name] = cut.tensors[name][:count].clone()
    return cut, tokenizer


def texts_of(model: Model) -> list[TextTokens]:
    return tokenise(model, passages())


def test_the_text_is_the_one_that_was_measured() -> None:
    measured = "e3edd3cc5214be461aff9c81ffd22724554b4c10cf00ab9d5031fa09a7f3f627"
    assert text_sha256() == measured, "give probe_text.yaml a new version, and measure the null again"


def test_tokens_end_where_the_text_says() -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(EXAMPLES / "base/tokenizer.json"))
    for text, found in zip(passages(), texts_of(opened(EXAMPLES / "base")), strict=True):
        assert tokenizer.decode(list(found.ids)) == text
        for end in list(found.last)[::7]:
            assert tokenizer.decode(list(found.ids[: found.last[end] + 1])) == text[:end]


def test_a_vocabulary_with_merges_gives_the_same_tokens(tmp_path: Path) -> None:
    content = json.loads((EXAMPLES / "base/tokenizer.json").read_text())["model"]
    shutil.copy(EXAMPLES / "base/config.json", tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps(content["vocab"]))
    merges = [one if isinstance(one, str) else " ".join(one) for one in content["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    same = [a == b for a, b in zip(texts_of(opened(tmp_path)), texts_of(opened(EXAMPLES / "base")), strict=True)]
    # Rules for words differ a little: by script, where a word is cut into letters and marks.
    assert sum(same) >= 0.8 * len(same)


def test_a_model_without_tokenizer_cannot_be_run(tmp_path: Path) -> None:
    with pytest.raises(NoForwardPass, match="neither a vocabulary of merges nor"):
        texts_of(opened(tmp_path))
    (tmp_path / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(NoForwardPass, match=r"tokenizer.json cannot be run"):
        texts_of(opened(tmp_path))


def test_places_are_where_both_end_a_token() -> None:
    ours = TextTokens((1, 2, 3, 4), {2: 0, 3: 1, 5: 2, 9: 3})
    theirs = TextTokens((1, 2, 3), {1: 0, 3: 1, 9: 2})
    assert common_places([ours, ours], [theirs, ours]) == [(0, 3), (0, 9), (1, 3), (1, 5), (1, 9)]


@given(seed=st.integers(0, 1000), rows=st.sampled_from([12, 40]), scale=st.floats(0.01, 100))
def test_common_directions_turn_with_the_basis(seed: int, rows: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(rows, 20, generator=generator, dtype=torch.float64)
    states += 30 * torch.randn(rows, 2, generator=generator).double() @ torch.randn(2, 20, generator=generator).double()
    rotation = torch.linalg.qr(torch.randn(20, 20, generator=generator, dtype=torch.float64)).Q
    found = without_common_directions(states)
    turned = without_common_directions(states @ rotation * scale)
    assert torch.allclose(turned.double(), found.double() @ rotation * scale, atol=1e-4 * scale, rtol=1e-3)
    assert float(found.mean(0).abs().amax()) < 1e-5
    assert int(torch.linalg.matrix_rank(found.double(), rtol=1e-5)) == min(rows - 1, 20) - 4
    assert float(found.norm()) < 0.5 * float((states - states.mean(0)).norm())


def test_common_directions_of_equal_and_broken_rows() -> None:
    assert not bool(without_common_directions(torch.ones(9, 5)).any())
    with pytest.raises(CheckpointUnavailable, match="not finite"):
        without_common_directions(torch.full((9, 5), torch.inf))


def test_a_model_read_twice_is_the_same(open_pair: Callable[..., Pair]) -> None:
    pair = open_pair(EXAMPLES / "base", EXAMPLES / "base")
    probes = forward_probes(pair.candidate, pair.reference, pair.canonical)
    assert probes.places == PLACES
    assert set(probes.candidate) == {0, 1, 2, 3}
    for layer, states in probes.candidate.items():
        assert states.shape == (PLACES, 128)
        assert torch.equal(states, probes.reference[layer])


def test_a_disguised_copy_with_few_tokens_is_found(
    tmp_path: Path, open_pair: Callable[..., Pair], judged: Callable[..., Evidence]
) -> None:
    few = save_model(tmp_path / "few", *with_few_tokens(hidden("derived"), FEW))
    pair = open_pair(few, EXAMPLES / "base")
    assert "tokens are shared" in str(pair.once(measures.matching_by_tokens).abstains_because)
    evidence = judged("independence.neurons", pair)
    assert evidence.outcome == CONTRADICTS
    assert evidence.value is not None
    assert evidence.value > 0.5
    assert evidence.details["answers_to"] == "what enters the MLPs on common text"
    assert "tokens are shared" in evidence.details["shared_tokens"]
    assert evidence.details["probes"] == PLACES


def test_an_independent_model_with_few_tokens_is_left_alone(
    tmp_path: Path, open_pair: Callable[..., Pair], judged: Callable[..., Evidence]
) -> None:
    few = save_model(tmp_path / "few", *with_few_tokens(weights("independent"), FEW))
    evidence = judged("independence.neurons", open_pair(few, EXAMPLES / "base"))
    assert evidence.outcome == SUPPORTS
    assert evidence.value is not None
    assert evidence.value < 0.05
    assert evidence.details["answers_to"] == "what enters the MLPs on common text"


def test_fresh_embeddings_defeat_both(
    tmp_path: Path, open_pair: Callable[..., Pair], judged: Callable[..., Evidence]
) -> None:
    fresh = save_model(tmp_path / "fresh", derive.replace_vocabulary(weights("derived"), 6, 1024))
    evidence = judged("independence.neurons", open_pair(fresh, EXAMPLES / "base"))
    assert evidence.outcome == SUPPORTS
    assert evidence.details["answers_to"] == "embeddings of shared tokens"
    assert "of the neurons agree" in evidence.details["common_text"]


def test_without_a_forward_pass_the_record_says_why(
    tmp_path: Path, open_pair: Callable[..., Pair], judged: Callable[..., Evidence]
) -> None:
    few = save_model(tmp_path / "few", *with_few_tokens(weights("independent"), FEW))
    config = json.loads((few / "config.json").read_text())
    (few / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "none"}}))
    evidence = judged("independence.neurons", open_pair(few, EXAMPLES / "base"))
    assert evidence.outcome == INCONCLUSIVE
    assert "tokens are shared" in evidence.reason
    assert "quantised" in evidence.reason


def test_weights_that_are_read_in_part_are_not_run() -> None:
    pair = Pair(opened(EXAMPLES / "independent"), opened(EXAMPLES / "base"), reading=Reading("sample"))
    assert "--read sample" in str(pair.once(measures.matching_by_text).abstains_because)
