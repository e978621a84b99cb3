"""Revisions, listings and headers of models on a hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import save, save_file

from checks.checkpoint import hub_failures
from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.header import FIRST_READ
from checks.checkpoint.hub import read_hub_index, resolve_revision
from checks.checkpoint.index import INDEX_NAME, SINGLE_NAME
from checks.checkpoint.local import read_local_index
from tests.checkpoint.loopback_repository import HASTY, NAME, Tensors, failure

# Revision


def test_a_branch_is_resolved_by_one_request(hub: Any, commit: str) -> None:
    hub.repositories[NAME].branches = ("main", "refs/pr/1")
    for revision in ("main", "refs/pr/1", None):
        hub.requests.clear()
        assert resolve_revision(NAME, revision, HASTY) == commit
        assert len(hub.requests) == 1


def test_a_commit_sha_is_not_asked_for(hub: Any) -> None:
    assert resolve_revision("org/absent", "a" * 40) == "a" * 40
    assert not hub.requests


def test_an_answer_that_is_no_commit_sha(hub: Any, commit: str) -> None:
    hub.fail("/api/", body=json.dumps({"id": NAME, "sha": "main"}).encode(), status=200)
    assert "expected a commit sha for main, found 'main'" in failure(
        hub_failures.HubRefused, lambda: resolve_revision(NAME, "main", HASTY)
    )


# Index


def test_index_is_that_of_the_directory_and_records_the_commit(hub: Any, sharded: Path, commit: str) -> None:
    index, local = read_hub_index(NAME, "main", HASTY), read_local_index(sharded)
    assert index.tensors == local.tensors
    assert (index.origin, index.revision, index.directory) == (NAME, commit, None)
    assert {name: shard.size for name, shard in index.shards.items()} == {n: s.size for n, s in local.shards.items()}
    assert all(shard.published_sha256 for shard in index.shards.values())


def test_headers_alone_are_transferred(hub: Any, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1 << 20)}, tmp_path / SINGLE_NAME)
    commit = hub.add(NAME, {SINGLE_NAME: tmp_path / SINGLE_NAME})
    index = read_hub_index(NAME, commit, HASTY)
    assert index.parameters == 1 << 20
    assert hub.seen("/resolve/")[0]["range"] == f"bytes=0-{FIRST_READ - 1}"
    assert len(hub.seen("/resolve/")) == 1
    assert hub.body_bytes < FIRST_READ + 2000  # and the listing


def test_a_long_header_takes_a_second_request(hub: Any) -> None:
    content = save({f"model.layers.{number}.weight": torch.zeros(1) for number in range(5000)})
    commit = hub.add(NAME, {SINGLE_NAME: content})
    assert len(read_hub_index(NAME, commit, HASTY).tensors) == 5000
    ranges = [headers["range"] for headers in hub.seen("/resolve/")]
    assert ranges == [
        f"bytes=0-{FIRST_READ - 1}",
        f"bytes={FIRST_READ}-{8 + int.from_bytes(content[:8], 'little') - 1}",
    ]


def test_files_without_an_index_and_files_in_folders(hub: Any, tensors: Tensors) -> None:
    names = sorted(tensors)
    parts = [save({name: tensors[name] for name in names[part::2]}) for part in (0, 1)]
    files = {"a.safetensors": parts[0], "b.safetensors": parts[1], "original/c.safetensors": b"", "README.md": b"#"}
    commit = hub.add(NAME, files)
    assert set(read_hub_index(NAME, commit, HASTY).tensors) == set(tensors)


def test_a_file_without_a_published_digest(hub: Any) -> None:
    commit = hub.add(NAME, {SINGLE_NAME: save({"a": torch.zeros(2)})}, lfs=False)
    assert read_hub_index(NAME, commit, HASTY).shards[SINGLE_NAME].published_sha256 is None


@pytest.mark.parametrize("shard", ["../../other/resolve/main/x.safetensors", "a/b.safetensors", "x.bin"])
def test_an_index_that_leads_elsewhere_is_refused_without_a_request(shard: str, hub: Any) -> None:
    commit = hub.add(NAME, {INDEX_NAME: json.dumps({"weight_map": {"a": shard}}).encode()})
    message = failure(CheckpointUnavailable, lambda: read_hub_index(NAME, commit, HASTY))
    assert f"{NAME}@{commit[:12]}/{INDEX_NAME}: tensor 'a' names the shard" in message
    assert len(hub.seen("/resolve/")) == 1


def test_a_shard_that_is_listed_and_absent(hub: Any) -> None:
    commit = hub.add(NAME, {INDEX_NAME: json.dumps({"weight_map": {"a": "x.safetensors"}}).encode()})
    message = failure(hub_failures.FileMissing, lambda: read_hub_index(NAME, commit, HASTY))
    assert "lists x.safetensors, which is absent" in message


def test_a_broken_header_names_repository_commit_and_file(hub: Any) -> None:
    commit = hub.add(NAME, {SINGLE_NAME: b"<html>not a model</html>"})
    message = failure(CheckpointUnavailable, lambda: read_hub_index(NAME, commit, HASTY))
    assert message.startswith(f"{NAME}@{commit[:12]}/{SINGLE_NAME}: states a header of")


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({"pytorch_model.bin": b"x", "config.json": b"{}"}, "holds pickle files ('pytorch_model.bin')"),
        ({"config.json": b"{}"}, "holds no .safetensors file"),
        ({"model-00001-of-00002.safetensors": b""}, "but not model-00002-of-00002.safetensors"),
    ],
)
def test_no_safetensors(files: dict[str, bytes], text: str, hub: Any) -> None:
    commit = hub.add(NAME, files)
    assert text in failure(CheckpointUnavailable, lambda: read_hub_index(NAME, commit, HASTY))
    assert not hub.seen("/resolve/")


# Environment


def test_environment(hub: Any, sharded: Path, commit: str, tmp_path: Path) -> None:
    """HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE, read by huggingface_hub in an interpreter of their own."""
    hub.repositories[NAME].private = True
    program = (
        "from checks.checkpoint.hub import read_hub_index\n"
        "from checks.checkpoint.errors import CheckpointUnavailable\n"
        "try:\n"
        f"    index = read_hub_index({NAME!r}, 'main')\n"
        "    print(len(index.tensors), index.directory)\n"
        "except CheckpointUnavailable as error:\n"
        "    print(type(error).__name__)\n"
    )
    tensors = len(read_local_index(sharded).tensors)

    def run(**environment: str) -> str:
        everything = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1", **environment}
        done = subprocess.run(
            [sys.executable, "-c", program], env=everything, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    assert run() == "RepositoryMissing"
    assert run(HF_TOKEN=hub.good_token) == f"{tensors} None"
    assert run(HF_TOKEN=hub.good_token, HF_HUB_OFFLINE="1") == "HubOffline"
    hub.repositories[NAME].private = False
    for path in sharded.iterdir():
        hf_hub_download(NAME, path.name, endpoint=hub.endpoint, cache_dir=tmp_path / "home" / "hub")
    hub.requests.clear()
    assert run(HF_HUB_OFFLINE="1") == f"{tensors} {tmp_path}/home/hub/models--org--name/snapshots/{commit}"
    assert not hub.requests


def test_all_requests_go_through_the_session_of_huggingface_hub(hub: Any, commit: str) -> None:
    read_hub_index(NAME, commit, HASTY)
    version = huggingface_hub.__version__
    assert all("x-amzn-trace-id" in headers for _, _, headers in hub.requests)  # its request hook sets it
    assert all(f"hf_hub/{version}" in headers["user-agent"] for _, _, headers in hub.requests)
