"""Shards of equal digest: what need not be read, and what may be read from a mirror."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import save

from checks.checkpoint import hub_failures
from checks.checkpoint.hub import HubFiles, read_hub_index
from checks.checkpoint.index import INDEX_NAME, CheckpointIndex, Shard, equal_shards, may_read_from_mirror
from tests.checkpoint.loopback_repository import HASTY, Tensors, failure

FIRST: Tensors = {"a": torch.ones(4), "b": torch.zeros(2)}
SECOND: Tensors = {"c": torch.ones(3)}


def publish(hub: Any, name: str, parts: dict[str, Tensors], **how: Any) -> CheckpointIndex:
    weight_map = {tensor: shard for shard, tensors in parts.items() for tensor in tensors}
    files: dict[str, bytes] = {shard: save(tensors) for shard, tensors in parts.items()}
    files[INDEX_NAME] = json.dumps({"weight_map": weight_map}).encode()
    return read_hub_index(name, hub.add(name, files, **how), HASTY)


def test_shards_of_equal_digest_are_equal_without_a_byte(hub: Any) -> None:
    one = publish(hub, "org/one", {"1.safetensors": FIRST, "2.safetensors": SECOND})
    two = publish(hub, "org/two", {"x.safetensors": FIRST, "y.safetensors": {"c": torch.zeros(3)}})
    hub.requests.clear()
    assert equal_shards(one, two) == equal_shards(two, one) == {"a", "b"}
    assert equal_shards(one, one) == {"a", "b", "c"}
    assert not hub.requests


def test_shards_without_digest_or_with_other_headers_are_not_equal(hub: Any) -> None:
    one = publish(hub, "org/one", {"1.safetensors": FIRST})
    two = publish(hub, "org/two", {"1.safetensors": FIRST}, lfs=False)
    assert equal_shards(one, two) == equal_shards(two, one) == equal_shards(two, two) == frozenset()
    other_shape = replace(one, tensors={**one.tensors, "a": replace(one.tensors["a"], shape=(2, 2))})
    assert equal_shards(one, other_shape) == {"b"}
    other_size = replace(one, shards={n: replace(s, size=s.size + 1) for n, s in one.shards.items()})
    assert equal_shards(one, other_size) == frozenset()
    fewer = replace(one, tensors={"a": one.tensors["a"]})
    assert equal_shards(one, fewer) == {"a"}


def test_a_gated_reference_may_be_read_from_a_mirror_with_its_digests(hub: Any) -> None:
    parts = {"model-00001-of-00002.safetensors": FIRST, "model-00002-of-00002.safetensors": SECOND}
    mirror = publish(hub, "mirror/name", parts)
    files = dict(hub.repositories["mirror/name"].files) | {"consolidated.safetensors": save(FIRST | SECOND)}
    commit = hub.add("org/gated", files, gated=True)
    failure(hub_failures.RepositoryGated, lambda: read_hub_index("org/gated", commit, HASTY))
    original = HubFiles("org/gated", commit, HASTY).published_shards()
    assert (original.origin, original.revision, original.tensors) == ("org/gated", commit, {})
    assert may_read_from_mirror(original, mirror)


@pytest.mark.parametrize(
    ("change", "allowed"),
    [
        (lambda shards: shards, True),
        (lambda shards: {**shards, "1": replace(shards["1"], published_sha256="f" * 64)}, False),
        (lambda shards: {**shards, "1": replace(shards["1"], published_sha256=None)}, False),
        (lambda shards: {**shards, "1": replace(shards["1"], size=5)}, False),
        (lambda shards: {"1": shards["1"]}, False),
        (lambda shards: {**shards, "3": Shard("3", 1, "c" * 64)}, False),
        (lambda shards: {}, False),
    ],
)
def test_a_mirror_must_have_every_shard_of_the_original(change: Any, allowed: bool) -> None:
    shards = {"1": Shard("1", 10, "a" * 64), "2": Shard("2", 20, "b" * 64)}
    original, mirror = CheckpointIndex("o", shards, {}), CheckpointIndex("m", change(shards), {})
    assert may_read_from_mirror(original, mirror) is allowed
    assert may_read_from_mirror(mirror, original) is allowed


def test_shards_without_digests_or_none_at_all_allow_no_mirror() -> None:
    nothing = CheckpointIndex("o", {}, {})
    unstated = CheckpointIndex("o", {"1": Shard("1", 10)}, {})
    assert not may_read_from_mirror(nothing, nothing)
    assert not may_read_from_mirror(unstated, unstated)
