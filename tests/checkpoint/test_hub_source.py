"""Bytes of files on a hub: by range requests, through redirects and broken connections."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from checks.checkpoint import hub_failures
from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.header import FIRST_READ
from checks.checkpoint.hub import HubSource, read_hub_index
from checks.checkpoint.index import (
    SINGLE_NAME,
)
from tests.checkpoint.loopback_repository import HASTY, NAME, failure, read, source_of

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
