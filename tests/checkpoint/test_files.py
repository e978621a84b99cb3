"""The files of a checkpoint beside its shards, from disk and from the hub."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import hf_hub_download, snapshot_download
from safetensors.torch import save

from checks.checkpoint import hub_failures
from checks.checkpoint.checkpoint import Checkpoint
from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.files import LocalFiles
from checks.checkpoint.hub import HubFiles, HubSource, read_hub_index
from checks.checkpoint.hub_failures import Patience
from checks.checkpoint.index import SINGLE_NAME
from checks.checkpoint.local import LocalSource

HASTY = Patience(timeout=5.0, attempts=2, pause=0.001, longest_wait=2.0)
NAME = "org/name"
HOSTILE = ["../tokenizer.json", "a/b.json", "..", "", ".", "a\\b", "a\nb", "a\0b", "x" * 300]
FILES = {
    SINGLE_NAME: save({"model.layers.0.mlp.up_proj.weight": torch.arange(12.0).reshape(4, 3)}),
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b'{"model": {}}',
}


@pytest.fixture
def local(tmp_path: Path) -> LocalFiles:
    directory = tmp_path / "model"
    directory.mkdir()
    for name, content in FILES.items():
        (directory / name).write_bytes(content)
    return LocalFiles(directory)


@pytest.fixture
def commit(hub: Any) -> str:
    return str(hub.add(NAME, FILES))


# Disk


def test_small_files_of_a_directory(local: LocalFiles) -> None:
    assert local.small_file("tokenizer.json") == FILES["tokenizer.json"]
    assert local.config() == FILES["config.json"]
    assert local.small_file("absent.json") is None
    assert local.provenance == {}
    assert isinstance(local.source(), LocalSource)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_that_leads_elsewhere_is_refused(name: str, local: LocalFiles, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("secret")
    with pytest.raises(CheckpointUnavailable, match="is no plain file name"):
        local.small_file(name)


def test_a_link_out_of_the_directory_is_refused(local: LocalFiles, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (local.directory / "vocab.json").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointUnavailable, match="outside its directory"):
        local.small_file("vocab.json")


def test_a_file_that_is_too_large_is_not_read(local: LocalFiles) -> None:
    os.truncate(local.directory / "tokenizer.json", 30_000_000)
    with pytest.raises(CheckpointUnavailable, match=r"tokenizer\.json: has 30000000 bytes, expected 25000000 at most"):
        local.small_file("tokenizer.json")
    assert len(local.small_file("tokenizer.json", 30_000_000) or b"") == 30_000_000


@pytest.mark.parametrize("name", ["a directory", "x" * 240])
def test_what_is_no_regular_file(name: str, local: LocalFiles) -> None:
    (local.directory / "a directory").mkdir()
    if name == "a directory":
        with pytest.raises(CheckpointUnavailable, match="is no regular file"):
            local.small_file(name)
    else:
        assert local.small_file(name) is None


def test_a_directory_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointUnavailable, match="no such directory"):
        LocalFiles(tmp_path / "gone").small_file("tokenizer.json")


# Hub


def test_small_files_of_a_repository(hub: Any, commit: str) -> None:
    files = HubFiles(NAME, commit, HASTY)
    assert files.index().tensors
    assert files.config() == FILES["config.json"]
    assert files.small_file("tokenizer.json") == FILES["tokenizer.json"]
    assert files.small_file("absent.json") is None
    assert len(hub.seen("/api/")) == 1  # one listing for all of it
    assert (files.where, dict(files.provenance)) == (
        f"{NAME}@{commit[:12]}",
        {"repository": NAME, "revision": commit},
    )


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_that_leads_elsewhere_is_not_asked_for(name: str, hub: Any, commit: str) -> None:
    with pytest.raises(CheckpointUnavailable, match="is no plain file name"):
        HubFiles(NAME, commit, HASTY).small_file(name)
    assert not hub.requests


def test_a_large_file_of_a_repository_is_not_asked_for(hub: Any, commit: str) -> None:
    with pytest.raises(hub_failures.HubRefused, match=r"tokenizer\.json: has 13 bytes, expected 12 at most"):
        HubFiles(NAME, commit, HASTY).small_file("tokenizer.json", 12)
    assert not hub.seen("/resolve/")


def test_a_repository_of_pickles_still_has_its_tokenizer(hub: Any) -> None:
    files = HubFiles(NAME, hub.add(NAME, {"pytorch_model.bin": b"x", "tokenizer.json": b"{}"}), HASTY)
    with pytest.raises(CheckpointUnavailable, match="pickle"):
        files.index()
    assert files.small_file("tokenizer.json") == b"{}"


def test_a_failure_is_kept_with_its_class_and_words(hub: Any, commit: str) -> None:
    hub.fail("/api/", status=503, times=HASTY.attempts)
    files = HubFiles(NAME, commit, HASTY)
    texts = []
    for _ in range(2):
        with pytest.raises(hub_failures.HubUnreachable) as caught:
            files.index()
        texts.append(str(caught.value))
    assert texts[0] == texts[1]
    assert len(hub.requests) == HASTY.attempts


def test_a_downloaded_repository_needs_no_network(hub: Any, commit: str) -> None:
    snapshot_download(NAME, endpoint=hub.endpoint)
    hub.requests.clear()
    files = HubFiles(NAME, commit, HASTY, offline=True)
    checkpoint = Checkpoint(files)
    assert checkpoint.config == {"model_type": "llama"}
    assert isinstance(checkpoint.source, LocalSource)
    assert files.small_file("tokenizer.json") == FILES["tokenizer.json"]
    assert files.small_file("merges.txt") is None  # the cache has the listing
    assert not hub.requests


def test_a_file_that_the_cache_does_not_tell_of(hub: Any, commit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hf_hub_download(NAME, SINGLE_NAME, revision=commit, endpoint=hub.endpoint)
    offline = HubFiles(NAME, commit, HASTY, offline=True)
    with pytest.raises(
        hub_failures.HubOffline, match=r"the local hub cache does not have its tokenizer\.json; .*hf dow"
    ):
        offline.small_file("tokenizer.json")
    # Weights can be compared without a configuration.
    checkpoint = Checkpoint(offline)
    assert (checkpoint.config, len(checkpoint.tensors)) == ({}, 1)
    online = HubFiles(NAME, commit, HASTY)
    assert online.index().directory is not None
    assert online.small_file("tokenizer.json") == FILES["tokenizer.json"]


def test_a_file_that_the_cache_knows_to_be_absent(hub: Any, commit: str) -> None:
    with pytest.raises(Exception, match="404"):
        hf_hub_download(NAME, "merges.txt", revision=commit, endpoint=hub.endpoint)
    hub.requests.clear()
    assert HubFiles(NAME, commit, HASTY).small_file("merges.txt") is None
    assert not hub.requests


def test_no_configuration_for_another_reason_is_no_silent_guess(hub: Any, commit: str) -> None:
    hub.fail("config.json", status=500, times=-1)
    with pytest.raises(hub_failures.HubUnreachable, match=r"config\.json"):
        Checkpoint(HubFiles(NAME, commit, HASTY))


# Checkpoints


def test_a_checkpoint_on_the_hub_reads_what_is_asked_for(hub: Any, llama_tensors: Callable[..., Any]) -> None:
    tensors = llama_tensors()
    commit = hub.add(NAME, {SINGLE_NAME: save(tensors), "config.json": FILES["config.json"]})
    checkpoint = Checkpoint(HubFiles(NAME, commit, HASTY))
    assert isinstance(checkpoint.source, HubSource)
    assert checkpoint.index == read_hub_index(NAME, commit, HASTY)
    assert (checkpoint.directory, checkpoint.where) == (None, f"{NAME}@{commit[:12]}")
    before = len(hub.seen("/resolve/")), checkpoint.source.transferred
    for name, tensor in tensors.items():
        assert torch.equal(checkpoint.read(name), tensor)
    read = sum(tensor.nbytes for tensor in tensors.values())
    assert (len(hub.seen("/resolve/")), checkpoint.source.transferred) == (before[0] + len(tensors), before[1] + read)
    embedding = tensors["model.embed_tokens.weight"]
    assert torch.equal(checkpoint.read("model.embed_tokens.weight", slice(10, 20)), embedding[10:20])
    assert checkpoint.source.transferred == before[1] + read + embedding[10:20].nbytes
