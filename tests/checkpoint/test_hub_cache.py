"""The local hub cache, and no network."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, hf_hub_download
from safetensors.torch import save

from checks.checkpoint import hub_failures
from checks.checkpoint.hub import HubFiles, HubSource, read_hub_index
from checks.checkpoint.index import (
    INDEX_NAME,
)
from checks.checkpoint.local import LocalSource
from tests.checkpoint.loopback_repository import HASTY, NAME, Tensors, failure, read


def fill_cache(commit: str, *files: str) -> None:
    """Downloads files as users do."""
    for file in files:
        hf_hub_download(NAME, file, revision=commit, endpoint=os.environ["HF_ENDPOINT"])


def test_a_cached_snapshot_is_read_without_network(hub: Any, sharded: Path, commit: str) -> None:
    online = read_hub_index(NAME, commit, HASTY)
    assert isinstance(HubFiles(NAME, commit, HASTY).source(), HubSource)
    fill_cache(commit, *(path.name for path in sharded.iterdir()))
    hub.requests.clear()
    index = read_hub_index(NAME, commit, HASTY)
    assert not hub.requests
    assert index.directory is not None
    assert (index.origin, index.revision, index.shards) == (NAME, commit, online.shards)
    assert index.tensors == online.tensors
    source = HubFiles(NAME, commit, HASTY).source()
    assert isinstance(source, LocalSource)
    for shard in index.shards.values():
        assert read(source, shard.name, 0, shard.size) == (sharded / shard.name).read_bytes()
    source.close()


def test_only_the_blobs_of_the_cache_state_a_published_digest(hub: Any, commit: str, tmp_path: Path) -> None:
    fill_cache(commit, INDEX_NAME, *(f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)))
    snapshot = read_hub_index(NAME, commit, HASTY).directory
    assert snapshot is not None
    first, second, _ = sorted(snapshot.glob("*.safetensors"))
    content = [file.read_bytes() for file in (first, second)]
    first.unlink()
    first.write_bytes(content[0])  # as where the cache cannot make links
    second.unlink()
    second.symlink_to("d" * 64)
    (snapshot / ("d" * 64)).write_bytes(content[1])
    shards = read_hub_index(NAME, commit, HASTY).shards.values()
    assert [shard.published_sha256 is not None for shard in shards] == [False, False, True]


def test_an_incomplete_snapshot_is_read_from_the_hub(hub: Any, sharded: Path, commit: str) -> None:
    fill_cache(commit, INDEX_NAME, "model-00001-of-00003.safetensors")
    assert read_hub_index(NAME, commit, HASTY).directory is None


def test_a_snapshot_that_does_not_tell_what_is_absent(hub: Any, tensors: Tensors) -> None:
    names = sorted(tensors)
    files = {f"{part}.safetensors": save({name: tensors[name] for name in names[part::2]}) for part in (0, 1)}
    commit = hub.add(NAME, files)
    fill_cache(commit, "0.safetensors")
    assert set(read_hub_index(NAME, commit, HASTY).tensors) == set(tensors)


def test_offline(hub: Any, sharded: Path, commit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for revision in (commit, "main"):
        message = failure(hub_failures.HubOffline, lambda revision=revision: read_hub_index(NAME, revision, HASTY))
        assert "(--offline or HF_HUB_OFFLINE), and the local hub cache does not have it" in message
        assert "hf download" in message
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    fill_cache("main", *(path.name for path in sharded.iterdir()))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert read_hub_index(NAME, "main", HASTY).revision == commit
    assert not hub.requests


def test_an_unreachable_hub_leaves_what_the_cache_last_saw(
    hub: Any, sharded: Path, commit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill_cache("main", *(path.name for path in sharded.iterdir()))
    hub.fail("/api/", status=503, times=-1)
    index = read_hub_index(NAME, "main", HASTY)
    assert (index.revision, index.directory is not None) == (commit, True)
