"""A hub that keeps sending and never gets done."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.hub import HubSource, read_hub_index, resolve_revision
from checks.checkpoint.hub_deadline import Progress, answered
from checks.checkpoint.hub_failures import FileMissing, HubTimedOut, HubTooSlow, Patience
from checks.checkpoint.hub_repository import HubRepository
from tests.checkpoint.loopback_repository import HASTY, NAME, failure, read, source_of

# What drips here brings a byte in a hundredth of a second.
DRIP = 0.01
STRICT = replace(HASTY, attempts=2, answer=0.4, progress_time=0.2, least_progress=1000)


def strict_source(commit: str, patience: Patience = STRICT) -> HubSource:
    """A source for org/name, whose headers came in good time."""
    return HubSource(read_hub_index(NAME, commit, HASTY), patience)


def test_a_body_that_drips_is_given_up(hub: Any, sharded: Path, commit: str) -> None:
    source, (_, shard) = strict_source(commit), source_of(commit)
    hub.requests.clear()
    hub.fail(shard.name, times=-1, drip=DRIP)
    message = failure(HubTooSlow, lambda: read(source, shard.name, 0, 500))
    assert f"{shard.name}: " in message
    assert (
        "expected 1000 at least; try again later, give it more HF_HUB_DOWNLOAD_TIMEOUT, set HF_ENDPOINT to a" in message
    )
    assert len(hub.seen(shard.name)) == STRICT.attempts
    hub.faults.clear()
    assert read(source, shard.name, 0, 500) == (sharded / shard.name).read_bytes()[:500]


def test_it_is_asked_once_more_and_goes_on_where_it_was(hub: Any, sharded: Path, commit: str) -> None:
    source, (_, shard) = strict_source(commit), source_of(commit)
    hub.requests.clear()
    hub.fail(shard.name, times=1, drip=DRIP)
    assert read(source, shard.name, 0, 500) == (sharded / shard.name).read_bytes()[:500]
    first, second = (headers["range"] for headers in hub.seen(shard.name))
    assert first == "bytes=0-499"
    assert 0 < int(second.removeprefix("bytes=").partition("-")[0]) < 500
    assert source.transferred == 500


def test_a_slow_body_that_brings_enough_is_waited_for(hub: Any, sharded: Path, commit: str) -> None:
    source, (_, shard) = strict_source(commit, replace(STRICT, least_progress=2)), source_of(commit)
    hub.requests.clear()
    hub.fail(shard.name, times=-1, drip=DRIP)
    assert read(source, shard.name, 0, 80) == (sharded / shard.name).read_bytes()[:80]
    assert len(hub.seen(shard.name)) == 1


def test_the_last_bytes_may_be_few(hub: Any, sharded: Path, commit: str) -> None:
    source, (_, shard) = strict_source(commit, replace(STRICT, progress_time=0.0)), source_of(commit)
    hub.fail(shard.name, times=-1, drip=DRIP)
    assert read(source, shard.name, 3, 4) == (sharded / shard.name).read_bytes()[3:4]


@pytest.mark.parametrize("how", ["drip", "trickle"])
def test_a_listing_that_never_ends(how: str, hub: Any, commit: str) -> None:
    hub.fail("/api/", times=-1, **{how: DRIP})
    message = failure(HubTooSlow, lambda: read_hub_index(NAME, commit, STRICT))
    assert "no whole answer came in 0.4 s; try again later" in message
    failure(HubTooSlow, lambda: resolve_revision(NAME, "main", STRICT))


def test_header_lines_that_never_end(hub: Any, commit: str) -> None:
    source, (_, shard) = strict_source(commit), source_of(commit)
    hub.fail(shard.name, times=-1, trickle=DRIP)
    message = failure(HubTooSlow, lambda: read(source, shard.name, 0, 500))
    assert f"{shard.name}: no whole answer came" in message


def test_an_error_page_that_never_ends(hub: Any, commit: str) -> None:
    source, (_, shard) = strict_source(commit), source_of(commit)
    hub.fail(shard.name, times=-1, drip=DRIP, status=404, body=b"x" * 10_000)
    failure(HubTooSlow, lambda: read(source, shard.name, 0, 500))
    hub.faults.clear()
    hub.fail(shard.name, times=-1, status=404)
    failure(FileMissing, lambda: read(source, shard.name, 0, 500))


def test_whoever_allows_longer_pauses_allows_as_long_for_all(commit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 90)
    limits = HubRepository(NAME, commit, Patience())._limits
    assert (limits.timeout, limits.answer, limits.progress_time) == (90, 120, 90)
    assert HubRepository(NAME, commit, STRICT)._limits == STRICT


def test_what_is_too_slow_counts_as_timed_out() -> None:
    """Where a hub that does not answer in time is not asked again, or the local cache does, so it is here."""
    assert issubclass(HubTooSlow, HubTimedOut)


def test_each_span_of_time_counts_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    patience = Patience(progress_time=60, least_progress=100)
    progress = Progress(patience, "here")
    for step in range(6):
        now += 59.9 if step % 2 == 0 else 0.2
        progress.add(99 if step % 2 == 0 else 1)
    now += 59.9
    progress.add(0)
    now += 0.2
    with pytest.raises(HubTooSlow, match="here: 99 bytes came in 60 s, expected 100 at least"):
        progress.add(99)


def test_an_answer_that_comes_too_late_is_undone() -> None:
    late, undone = threading.Event(), threading.Event()

    def ask() -> int:
        late.wait(10)
        return 7

    def undo(answer: int) -> None:
        assert answer == 7
        undone.set()

    with pytest.raises(HubTooSlow, match="no whole answer"):
        answered(ask, replace(HASTY, answer=0.05), "here", undo)
    assert not undone.is_set()
    late.set()
    assert undone.wait(10)


@pytest.mark.parametrize("error", [TimeoutError("the disk"), CheckpointUnavailable("gone"), KeyError("x")])
def test_what_asking_raises_is_raised(error: Exception) -> None:
    def ask() -> int:
        raise error

    with pytest.raises(type(error)) as caught:
        answered(ask, HASTY, "here", lambda _: pytest.fail("nothing came"))
    assert caught.value is error
    assert answered(lambda: 3, HASTY, "here", lambda _: pytest.fail("it was in time")) == 3
