"""Equal tensors under any names: what is read to know them, and which of them any model could have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from checks.checkpoint.checkpoint import Checkpoint
from checks.pair import equal_tensors
from checks.pair.comparison import compare
from checks.pair.pair import Pair
from tests.pair.counting import opened
from tests.pair.random_tensors import normal

Tensors = dict[str, torch.Tensor]
Llama = Callable[..., Tensors]
Save = Callable[..., Path]


def test_stacks_that_only_their_first_axis_could_tell_are_looked_at_where_they_are_equal(
    llama_tensors: Llama, save_checkpoint: Save
) -> None:
    stacks = {"a": normal(1, 9, 100, 100), "b": torch.arange(9.0)[:, None, None] * normal(2, 1, 100, 100)}
    stacks["c"] = normal(3, 9, 100, 100)
    (ours, our_source), (theirs, _) = (
        opened(save_checkpoint("ours", stacks)),
        opened(save_checkpoint("theirs", stacks | {"c": normal(4, 9, 100, 100)})),
    )
    comparison = compare(ours, theirs)
    assert comparison.identical == (("a", "a"),)
    assert comparison.ordinary.keys() == {"b"}
    assert [our_source.times(ours, name) for name in stacks] == [2, 2, 1]


def test_of_large_tensors_equal_to_others_the_beginning_is_read(
    save_checkpoint: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(equal_tensors, "SMALL", 1000)
    weights = {f"w{number}": normal(number, 600, 300) for number in range(3)}
    (ours, our_source), (theirs, _) = (
        opened(save_checkpoint("ours", {name.replace("w", "v"): one for name, one in weights.items()})),
        opened(save_checkpoint("theirs", weights)),
    )
    assert len(compare(ours, theirs).identical) == 3
    size = 600 * 300 * 4 * 3
    assert size < our_source.read <= size + 3 * 65536 * 4


def published(checkpoint: Checkpoint, digest: str) -> Checkpoint:
    """As the hub tells the SHA-256 of the first shard."""
    first = min(checkpoint.index.shards)
    shards = dict(checkpoint.index.shards)
    shards[first] = replace(shards[first], published_sha256=digest)
    checkpoint.index = replace(checkpoint.index, shards=shards)
    return checkpoint


def test_shards_of_equal_published_digest_are_equal_without_a_byte_read(
    llama_tensors: Llama, save_checkpoint: Save
) -> None:
    tensors = llama_tensors(1)
    tensors["model.layers.0.post_attention_layernorm.weight"] = torch.ones(64)
    names = list(tensors)
    other = {name: tensor if names.index(name) % 2 == 0 else -tensor.flip(0) for name, tensor in tensors.items()}
    ours = Checkpoint(save_checkpoint("ours", tensors, shards=2))
    theirs, their_source = opened(save_checkpoint("theirs", other, shards=2))
    published(ours, "same")
    published(theirs, "same")
    first = min(ours.index.shards)
    in_first = {name for name, entry in ours.tensors.items() if entry.stored.shard == first}
    comparison = compare(ours, theirs)
    assert their_source.counts[first].sum() == 0
    assert {name for name, _ in comparison.identical} | set(comparison.ordinary) == in_first
    assert set(comparison.ordinary) == {"model.layers.0.post_attention_layernorm.weight"}
    assert {one.entry.name for one in comparison.compared if one.sums is None} == in_first
    assert all(one.cosine == one.raw_cosine == 1 for one in comparison.compared if one.sums is None)
    # The reference's hashes of that shard are not known, so no digest of all its tensors is.
    assert not in_first & theirs._sha256.keys()
    everything = compare(Checkpoint(ours.files.directory), Checkpoint(theirs.files.directory))
    for layer in range(3):
        assert comparison.layer(layer).cosine == pytest.approx(everything.layer(layer).cosine, abs=1e-9)
        assert comparison.layer(layer).elements == everything.layer(layer).elements
    assert comparison.identical == everything.identical


def test_fingerprints_of_equal_shards_are_read_from_one_side(llama_tensors: Llama, save_checkpoint: Save) -> None:
    paths = [save_checkpoint(name, llama_tensors(1), shards=2) for name in ("ours", "theirs")]
    (ours, our_source), (theirs, their_source) = map(opened, paths)
    for side in (ours, theirs):
        published(side, "same")
    first = min(ours.index.shards)
    found = compare(ours, theirs, with_fingerprints=True).fingerprints
    assert found is not None
    assert found[0].names == found[1].names == tuple(ours.tensors)
    assert their_source.counts[first].sum() == 0
    assert {our_source.times(ours, name) for name in ours.tensors} == {1}


def test_a_record_names_published_digests_where_not_everything_was_read(
    llama_tensors: Llama, save_checkpoint: Save, open_pair: Callable[..., Pair]
) -> None:
    path = save_checkpoint("ours", llama_tensors(1))
    pair = open_pair(path, path)
    for model in (pair.candidate, pair.reference):
        published(model.checkpoint, "digest")
    assert len(pair.elementwise().identical) == 30
    read = pair.read()["candidate"]
    assert (read["sha256"], read["shards"]) == (None, {"model.safetensors": "digest"})
    assert len(pair.neurons()) == 3
