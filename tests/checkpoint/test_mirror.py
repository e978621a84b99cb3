"""A gated model is read from a mirror only while every shard is the original's."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import pytest
import torch
from safetensors.torch import save

from checks.checkpoint import hub_failures
from checks.checkpoint.checkpoint import Checkpoint
from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.hub import HubFiles
from checks.checkpoint.hub_failures import Patience
from checks.checkpoint.index import INDEX_NAME
from checks.checkpoint.mirror import Mirror, MirroredFiles

HASTY = Patience(timeout=5.0, attempts=2, pause=0.001, longest_wait=2.0)
GATED, MIRROR, OTHER = "org/gated", "mirror/name", "mirror/other"
SHARDS = {
    "model-00001-of-00002.safetensors": {"model.layers.0.mlp.up_proj.weight": torch.ones(4, 3)},
    "model-00002-of-00002.safetensors": {"model.layers.0.mlp.down_proj.weight": torch.ones(3, 4)},
}
FILES: dict[str, bytes] = {
    **{name: save(tensors) for name, tensors in SHARDS.items()},
    INDEX_NAME: json.dumps({"weight_map": {t: shard for shard, tensors in SHARDS.items() for t in tensors}}).encode(),
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b'{"model": {}}',
    "tokenizer.model": b"sentencepiece",
}


def mirrored(hub: Any, *mirrors: str) -> MirroredFiles:
    def open_mirror(name: str) -> HubFiles:
        if name not in hub.repositories:
            raise CheckpointUnavailable(f"{name}: there is no such repository")
        return HubFiles(name, hub.repositories[name].commit, HASTY)

    original = HubFiles(GATED, hub.repositories[GATED].commit, HASTY)
    return MirroredFiles(original, [Mirror(name, partial(open_mirror, name)) for name in mirrors])


@pytest.fixture
def gated(hub: Any) -> str:
    return str(hub.add(GATED, FILES, gated=True))


def test_a_mirror_with_the_same_shards_is_read_and_named(hub: Any, gated: str) -> None:
    commit = hub.add(MIRROR, FILES)
    checkpoint = Checkpoint(mirrored(hub, MIRROR))
    assert torch.equal(checkpoint.read("model.layers.0.mlp.up_proj.weight"), torch.ones(4, 3))
    assert dict(checkpoint.provenance) == {"repository": GATED, "revision": gated, "mirror": f"{MIRROR}@{commit}"}
    assert checkpoint.where == f"{GATED}@{gated[:12]} (from its mirror {MIRROR}@{commit[:12]})"
    # Its digests are those of the original: they compare as such.
    assert all(shard.published_sha256 for shard in checkpoint.index.shards.values())


def test_the_original_is_read_where_its_terms_were_accepted(
    hub: Any, gated: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(MIRROR, FILES)
    monkeypatch.setenv("HF_TOKEN", hub.good_token)
    checkpoint = Checkpoint(mirrored(hub, MIRROR))
    assert dict(checkpoint.provenance) == {"repository": GATED, "revision": gated}
    assert checkpoint.files.small_file("tokenizer.json") == FILES["tokenizer.json"]
    assert not hub.seen(MIRROR)


CHANGES: dict[str, dict[str, bytes]] = {
    "another shard": {
        "model-00002-of-00002.safetensors": save({"model.layers.0.mlp.down_proj.weight": torch.zeros(3, 4)})
    },
    "one shard more": {"model-00003-of-00003.safetensors": save({"a": torch.ones(1)})},
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_mirror_of_other_shards_is_not_read(change: str, hub: Any, gated: str) -> None:
    files = {**FILES, **CHANGES[change]}
    if change == "one shard more":
        weight_map = json.loads(FILES[INDEX_NAME])["weight_map"] | {"a": "model-00003-of-00003.safetensors"}
        files[INDEX_NAME] = json.dumps({"weight_map": weight_map}).encode()
    hub.add(MIRROR, files)
    with pytest.raises(hub_failures.RepositoryGated) as caught:
        mirrored(hub, MIRROR, "mirror/gone").index()
    text = str(caught.value)
    assert f"accept the terms at {hub.endpoint}/{GATED}" in text
    assert "does not publish the same shards; mirror/gone: there is no such repository" in text


def test_the_next_mirror_is_tried(hub: Any, gated: str) -> None:
    hub.add(MIRROR, {**FILES, **CHANGES["another shard"]})
    hub.add(OTHER, FILES)
    assert mirrored(hub, MIRROR, OTHER).index().origin == OTHER


def test_a_mirror_without_published_digests_is_not_read(hub: Any, gated: str) -> None:
    hub.add(MIRROR, FILES, lfs=False)
    with pytest.raises(hub_failures.RepositoryGated, match="does not publish the same shards"):
        mirrored(hub, MIRROR).index()


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])  # a git blob, and a file in git LFS
def test_a_small_file_of_a_mirror_counts_only_if_it_is_the_originals(name: str, hub: Any, gated: str) -> None:
    hub.add(MIRROR, FILES)
    assert mirrored(hub, MIRROR).small_file(name) == FILES[name]
    hub.add(MIRROR, {**FILES, name: b"another"})
    with pytest.raises(hub_failures.RepositoryGated, match=rf"its mirror {MIRROR}@.* does not have the same {name}"):
        mirrored(hub, MIRROR).small_file(name)


def test_a_mirrors_own_configuration_names_the_same_tensors(hub: Any, gated: str) -> None:
    hub.add(MIRROR, {**FILES, "config.json": b'{"model_type": "llama", "pad_token_id": 0}'})
    checkpoint = Checkpoint(mirrored(hub, MIRROR))
    assert checkpoint.config == {"model_type": "llama", "pad_token_id": 0}


def test_another_failure_than_a_gate_asks_no_mirror(hub: Any, gated: str) -> None:
    hub.add(MIRROR, FILES)
    hub.fail(GATED, status=503, times=-1)
    with pytest.raises(hub_failures.HubUnreachable):
        mirrored(hub, MIRROR).index()
    assert not hub.seen(MIRROR)
