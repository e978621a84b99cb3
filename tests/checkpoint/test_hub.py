from __future__ import annotations

import email.utils
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, hf_hub_download
from safetensors.torch import save, save_file

from checks.checkpoint import hub_failures
from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.header import FIRST_READ
from checks.checkpoint.hub import HubSource, open_source, read_hub_index, read_published_shards, resolve_revision
from checks.checkpoint.hub_failures import Patience
from checks.checkpoint.index import (
    INDEX_NAME,
    SINGLE_NAME,
    CheckpointIndex,
    Shard,
    equal_shards,
    may_read_from_mirror,
)
from checks.checkpoint.local import LocalSource, read_local_index

Save = Callable[..., Path]
Tensors = dict[str, torch.Tensor]
HASTY = Patience(timeout=5.0, attempts=3, pause=0.001, longest_wait=2.0)
NAME = "org/name"


@pytest.fixture
def tensors(llama_tensors: Callable[..., Tensors]) -> Tensors:
    return llama_tensors(hidden_size=16, intermediate_size=24, vocab_size=20, head_dim=4, num_hidden_layers=2)


@pytest.fixture
def sharded(hub: Any, tensors: Tensors, save_checkpoint: Save) -> Path:
    """A directory of three shards that the hub serves as org/name."""
    directory = save_checkpoint("sharded", tensors, shards=3)
    hub.add_directory(NAME, directory)
    return directory


@pytest.fixture
def commit(hub: Any, sharded: Path) -> str:
    return str(hub.repositories[NAME].commit)


def failure(kind: type[CheckpointUnavailable], action: Callable[[], object]) -> str:
    with pytest.raises(CheckpointUnavailable) as caught:
        action()
    assert type(caught.value) is kind
    return str(caught.value)


def read(source: HubSource | LocalSource, shard: str, start: int, stop: int) -> bytes:
    buffer = bytearray(stop - start)
    source.read_into(shard, start, memoryview(buffer))
    return bytes(buffer)


def source_of(commit: str) -> tuple[HubSource, Shard]:
    """A source for org/name, and its first shard."""
    index = read_hub_index(NAME, commit, HASTY)
    return HubSource(index, HASTY), next(iter(index.shards.values()))


def fill_cache(commit: str, *files: str) -> None:
    """Downloads files as users do."""
    for file in files:
        hf_hub_download(NAME, file, revision=commit, endpoint=os.environ["HF_ENDPOINT"])


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


# Failures


def test_gated(hub: Any, commit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories[NAME].gated = True
    message = failure(hub_failures.RepositoryGated, lambda: read_hub_index(NAME, commit, HASTY))
    assert f"accept the terms at {hub.endpoint}/{NAME} with your account and set HF_TOKEN" in message
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    message = failure(hub_failures.RepositoryGated, lambda: read_hub_index(NAME, commit, HASTY))
    assert "with the account of your HF_TOKEN" in message
    monkeypatch.setenv("HF_TOKEN", hub.good_token)
    index = read_hub_index(NAME, commit, HASTY)
    assert read(HubSource(index), *next((s.name, 0, s.size) for s in index.shards.values()))


def test_missing_or_private_repository(hub: Any, commit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    message = failure(hub_failures.RepositoryMissing, lambda: read_hub_index("org/absent", "main", HASTY))
    assert "org/absent@main: there is no such repository, or it is private and HF_TOKEN is not set" in message
    hub.repositories[NAME].private = True
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    message = failure(hub_failures.RepositoryMissing, lambda: read_hub_index(NAME, commit, HASTY))
    assert "your HF_TOKEN does not open it" in message


@pytest.mark.parametrize("revision", ["typo", "b" * 40])
def test_missing_revision(revision: str, commit: str) -> None:
    message = failure(hub_failures.RevisionMissing, lambda: read_hub_index(NAME, revision, HASTY))
    assert "there is no such revision; correct it in the claim" in message


@pytest.mark.parametrize("name", ["no repository", "a/b/c", "../..", ""])
def test_a_name_that_is_no_repository(name: str, hub: Any) -> None:
    failure(hub_failures.HubRefused, lambda: read_hub_index(name, "main", HASTY))
    assert not hub.requests


def test_rate_limit_is_waited_for(hub: Any, commit: str) -> None:
    hub.fail("/api/", status=429, headers={"Retry-After": "1"})
    started = time.monotonic()
    assert read_hub_index(NAME, commit, HASTY)
    assert time.monotonic() - started >= 1


@pytest.mark.parametrize("where", ["/api/", "/resolve/"])
def test_rate_limit_beyond_our_patience(where: str, hub: Any, commit: str) -> None:
    hub.fail(where, status=429, headers={"Retry-After": "3600"}, times=-1)
    message = failure(hub_failures.RateLimited, lambda: read_hub_index(NAME, commit, HASTY))
    assert "allows no more requests now; run again in 3600 s, or set HF_TOKEN" in message


def test_rate_limit_again_and_again(hub: Any, commit: str) -> None:
    hub.fail("/api/", status=429, times=-1)
    message = failure(hub_failures.RateLimited, lambda: read_hub_index(NAME, commit, HASTY))
    assert "run again later" in message
    assert len(hub.seen("/api/")) == HASTY.attempts


def test_the_wait_that_the_hub_asks_for() -> None:
    soon = email.utils.formatdate(time.time() + 30, usegmt=True)
    assert hub_failures.asked_wait({"retry-after": "12"}) == 12
    assert 25 < hub_failures.asked_wait({"retry-after": soon}) <= 30
    assert hub_failures.asked_wait({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0
    assert hub_failures.asked_wait({"ratelimit": '"api";r=0;t=55'}) == 55
    assert hub_failures.asked_wait({"ratelimit": '"api";r=10;t=55'}) == 0
    for senseless in ("", "-5", "soon", "²", "1e9", "nan"):
        assert hub_failures.asked_wait({"retry-after": senseless}) == 0


@pytest.mark.parametrize("where", ["/api/", "/resolve/"])
@pytest.mark.parametrize("how", [{"status": 500}, {"status": 503, "headers": {"Retry-After": "0"}}, {"close": True}])
def test_a_passing_failure_is_asked_again(where: str, how: dict[str, Any], hub: Any, commit: str) -> None:
    hub.fail(where, times=2, **how)
    assert read_hub_index(NAME, commit, HASTY).tensors


def test_a_lasting_failure(hub: Any, commit: str) -> None:
    hub.fail("/api/", status=502, body=b'{"error": "bad gateway"}', times=-1)
    message = failure(hub_failures.HubUnreachable, lambda: read_hub_index(NAME, commit, HASTY))
    assert f"{hub.endpoint} fails (502: 'bad gateway'); try again later" in message
    assert len(hub.seen("/api/")) == HASTY.attempts


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (401, hub_failures.RepositoryMissing),
        (403, hub_failures.RepositoryGated),
        (404, hub_failures.FileMissing),
        (418, hub_failures.HubRefused),
    ],
)
@pytest.mark.parametrize("body", [b"{}", b"<html>", b'{"error": 5}'])
def test_a_refusal_is_final_whatever_it_says(
    status: int, kind: type[CheckpointUnavailable], body: bytes, hub: Any, commit: str
) -> None:
    hub.fail("/api/", status=status, body=body, times=-1)
    message = failure(kind, lambda: read_hub_index(NAME, commit, HASTY))
    assert NAME in message
    assert len(hub.seen("/api/")) == 1


@pytest.mark.parametrize("where", ["/api/", "/resolve/"])
@pytest.mark.parametrize("body", [b"[1]", b"\xff"])
def test_a_refusal_that_makes_no_sense(where: str, body: bytes, hub: Any, commit: str) -> None:
    hub.fail(where, status=404, body=body, times=-1)
    message = failure(hub_failures.HubRefused, lambda: read_hub_index(NAME, commit, HASTY))
    assert "cannot make sense of" in message


@pytest.mark.parametrize(
    "answer",
    [
        b"hello",
        b"[]",
        b'{"siblings": [{}]}',
        b'{"id": "a", "siblings": [{"rfilename": 5, "size": 1}]}',
        b'{"id": "a", "siblings": [{"rfilename": "model.safetensors"}]}',
        b'{"id": "a", "siblings": [{"rfilename": "model.safetensors", "size": -1}]}',
        b'{"id": "a", "siblings": [{"rfilename": "model.safetensors", "lfs": {}}]}',
        b'{"id": "a", "siblings": 5}',
    ],
)
def test_a_listing_that_makes_no_sense(answer: bytes, hub: Any, commit: str) -> None:
    hub.fail("/api/", status=200, body=answer, times=-1)
    failure(hub_failures.HubRefused, lambda: read_hub_index(NAME, commit, HASTY))


def test_time_out(hub: Any, commit: str) -> None:
    hub.fail("/api/", wait=0.5, times=-1)
    hasty = replace(HASTY, timeout=0.05, attempts=2)
    message = failure(hub_failures.HubTimedOut, lambda: read_hub_index(NAME, commit, hasty))
    assert "did not answer in time; try again later, or give it more HF_HUB_DOWNLOAD_TIMEOUT" in message


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:1", "http://hub.invalid", "no address", "ftp://127.0.0.1"])
def test_endpoint_that_cannot_be_reached(endpoint: str, hub: Any, commit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    message = failure(hub_failures.HubUnreachable, lambda: read_hub_index(NAME, commit, HASTY))
    assert f"{endpoint} cannot be reached" in message


def test_a_token_that_cannot_be_sent(hub: Any, commit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_\u20ac")
    assert "HF_TOKEN" in failure(hub_failures.HubRefused, lambda: read_hub_index(NAME, commit, HASTY))


# Bytes


def test_bytes_are_those_of_the_file(hub: Any, sharded: Path, commit: str) -> None:
    source, shard = source_of(commit)
    content = (sharded / shard.name).read_bytes()
    for start, stop in [(0, shard.size), (100, 101), (shard.size - 7, shard.size), (5, 5)]:
        assert read(source, shard.name, start, stop) == content[start:stop]
    values = torch.empty(4, 4, dtype=torch.int16)
    source.read_into(shard.name, 8, memoryview(values.numpy()))
    assert values.view(torch.uint8).numpy().tobytes() == content[8:40]


def test_a_range_out_of_the_file_is_not_asked_for(hub: Any, commit: str) -> None:
    source, shard = source_of(commit)
    hub.requests.clear()
    for start, stop in [(-1, 5), (shard.size - 1, shard.size + 1)]:
        message = failure(CheckpointUnavailable, lambda start=start, stop=stop: read(source, shard.name, start, stop))
        assert f"expected a range within its {shard.size}" in message
    assert not hub.requests


def test_no_more_is_transferred_than_asked_for(hub: Any, tmp_path: Path) -> None:
    save_file({str(number): torch.rand(1 << 16) for number in range(32)}, tmp_path / SINGLE_NAME)
    commit = hub.add(NAME, {SINGLE_NAME: tmp_path / SINGLE_NAME})
    index = read_hub_index(NAME, commit, HASTY)
    source = HubSource(index, HASTY)
    before = hub.wire_bytes
    asked = 0
    for tensor in list(index.tensors.values())[::3]:
        read(source, tensor.shard, tensor.start, tensor.stop)
        asked += tensor.stop - tensor.start
    assert source.transferred == asked
    assert hub.wire_bytes - before <= 1.05 * asked


@pytest.mark.parametrize("how", [{"cut_after": 100}, {"short": 50}, {"cut_after": 0}])
def test_a_transfer_that_breaks_goes_on_where_it_broke(
    how: dict[str, int], hub: Any, sharded: Path, commit: str
) -> None:
    source, shard = source_of(commit)
    hub.requests.clear()
    hub.fail(shard.name, **how)
    assert read(source, shard.name, 0, shard.size) == (sharded / shard.name).read_bytes()
    assert source.transferred == shard.size
    received = how.get("cut_after", shard.size - how.get("short", 0))
    assert [headers["range"] for headers in hub.seen(shard.name)] == [
        f"bytes=0-{shard.size - 1}",
        f"bytes={received}-{shard.size - 1}",
    ]


@pytest.mark.parametrize("how", [{"cut_after": 100}, {"short": 200}])
def test_a_transfer_that_breaks_again_and_again(how: dict[str, int], hub: Any, commit: str) -> None:
    source, shard = source_of(commit)
    hub.fail(shard.name, times=-1, **how)
    message = failure(hub_failures.BodyCut, lambda: read(source, shard.name, 0, 1000))
    assert f"{shard.name}: " in message
    assert "try again later" in message


def test_a_long_transfer_may_break_more_often_than_there_are_attempts(
    hub: Any, sharded: Path, commit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, shard = source_of(commit)
    monkeypatch.setattr("checks.checkpoint.hub_repository.PROGRESS", 100)
    hub.requests.clear()
    hub.fail(shard.name, times=-1, cut_after=shard.size // 8)
    assert read(source, shard.name, 0, shard.size) == (sharded / shard.name).read_bytes()
    assert source.transferred == shard.size
    assert len(hub.seen(shard.name)) > HASTY.attempts


def test_a_file_that_is_shorter_than_listed(hub: Any, sharded: Path, commit: str) -> None:
    source, shard = source_of(commit)
    os.truncate(sharded / shard.name, 500)
    message = failure(hub_failures.BodyCut, lambda: read(source, shard.name, 600, 700))
    assert "is shorter than its header or the hub's listing says" in message
    message = failure(hub_failures.HubRefused, lambda: read(source, shard.name, 0, 100))
    assert f"has 500 bytes, expected {shard.size} as the hub lists" in message


def test_a_server_that_ignores_the_range_is_not_swallowed(hub: Any, tmp_path: Path) -> None:
    with (tmp_path / SINGLE_NAME).open("wb") as opened:
        opened.truncate(1 << 30)
    commit = hub.add(NAME, {SINGLE_NAME: tmp_path / SINGLE_NAME})
    hub.fail("/resolve/", ignore_range=True, times=-1)
    message = failure(hub_failures.RangeIgnored, lambda: read_hub_index(NAME, commit, HASTY))
    assert f"asked for bytes 0 to {FIRST_READ}, the server sends 'all' with status 200; set HF_ENDPOINT" in message
    assert len(hub.seen("/resolve/")) == 1
    assert hub.body_bytes < 1 << 27  # what the sockets take before the connection is closed


def test_a_server_that_sends_a_whole_file_that_was_asked_for_whole(hub: Any, sharded: Path, commit: str) -> None:
    source, shard = source_of(commit)
    hub.fail("/resolve/", ignore_range=True)
    assert read(source, shard.name, 0, shard.size) == (sharded / shard.name).read_bytes()


@pytest.mark.parametrize("how", [{"shift": 5}, {"shift": 5, "short": 5}, {"short": -10}])
def test_another_range_than_asked_for_is_refused_unread(how: dict[str, int], hub: Any, commit: str) -> None:
    source, shard = source_of(commit)
    hub.fail(shard.name, **how)
    message = failure(hub_failures.RangeIgnored, lambda: read(source, shard.name, 0, 100))
    assert "asked for bytes 0 to 100, the server sends 'bytes " in message
    assert source.transferred == 0


def test_more_than_announced_is_refused(hub: Any, commit: str) -> None:
    source, shard = source_of(commit)
    hub.fail(shard.name, longer=10)
    assert "more than it announced" in failure(hub_failures.RangeIgnored, lambda: read(source, shard.name, 0, 100))


def test_a_compressed_answer_is_not_asked_for_and_refused(hub: Any, commit: str) -> None:
    source, shard = source_of(commit)
    hub.fail(shard.name, status=206, headers={"content-encoding": "gzip"})
    assert "compressed" in failure(hub_failures.RangeIgnored, lambda: read(source, shard.name, 0, 100))
    assert all(headers["accept-encoding"] == "identity" for headers in hub.seen("/resolve/"))


def test_threads_share_a_source(hub: Any, sharded: Path, commit: str) -> None:
    source, shard = source_of(commit)
    content = (sharded / shard.name).read_bytes()
    hub.redirect = True
    found: dict[int, bytes] = {}
    threads = [
        threading.Thread(target=lambda start=start: found.update({start: read(source, shard.name, start, start + 50)}))
        for start in range(0, 500, 50)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {start: content[start : start + 50] for start in range(0, 500, 50)}
    assert source.transferred == 500


# Redirects, as the hub sends to its CDN


def test_the_hub_is_asked_once_for_the_address_of_a_file(
    hub: Any, sharded: Path, commit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", hub.good_token)
    source, shard = source_of(commit)
    content = (sharded / shard.name).read_bytes()
    hub.redirect = True
    hub.requests.clear()
    for start in range(0, 400, 100):
        assert read(source, shard.name, start, start + 100) == content[start : start + 100]
    assert len(hub.seen("/resolve/")) == 1
    assert len(hub.seen("/cdn/")) == 4
    assert all("authorization" in headers for headers in hub.seen("/resolve/"))
    assert not any("authorization" in headers for headers in hub.seen("/cdn/"))
    hub.signature += 1
    hub.requests.clear()
    assert read(source, shard.name, 0, 100) == content[:100]
    assert [len(hub.seen("/cdn/0")), len(hub.seen("/resolve/")), len(hub.seen("/cdn/1"))] == [1, 1, 1]


def test_an_address_that_expires_at_once(hub: Any, commit: str) -> None:
    source, shard = source_of(commit)
    hub.redirect = True
    read(source, shard.name, 0, 10)
    hub.fail("/cdn/", status=403, times=-1)
    failure(hub_failures.RepositoryGated, lambda: read(source, shard.name, 0, 10))


# The local hub cache, and no network


def test_a_cached_snapshot_is_read_without_network(hub: Any, sharded: Path, commit: str) -> None:
    online = read_hub_index(NAME, commit, HASTY)
    fill_cache(commit, *(path.name for path in sharded.iterdir()))
    hub.requests.clear()
    index = read_hub_index(NAME, commit, HASTY)
    assert not hub.requests
    assert index.directory is not None
    assert (index.origin, index.revision, index.shards) == (NAME, commit, online.shards)
    assert index.tensors == online.tensors
    source = open_source(index)
    assert isinstance(source, LocalSource)
    for shard in index.shards.values():
        assert read(source, shard.name, 0, shard.size) == (sharded / shard.name).read_bytes()
    source.close()
    assert isinstance(open_source(online), HubSource)


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


# Hub economy


def publish(hub: Any, name: str, parts: dict[str, Tensors], **how: Any) -> CheckpointIndex:
    weight_map = {tensor: shard for shard, tensors in parts.items() for tensor in tensors}
    files: dict[str, bytes] = {shard: save(tensors) for shard, tensors in parts.items()}
    files[INDEX_NAME] = json.dumps({"weight_map": weight_map}).encode()
    return read_hub_index(name, hub.add(name, files, **how), HASTY)


FIRST: Tensors = {"a": torch.ones(4), "b": torch.zeros(2)}
SECOND: Tensors = {"c": torch.ones(3)}


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
    original = read_published_shards("org/gated", "main", HASTY)
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
