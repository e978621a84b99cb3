"""Planned bytes of a hub: which of them are fetched together, how many requests are in flight, and how they fail."""

from __future__ import annotations

import threading
import time
from collections import Counter
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.hub import HubSource, read_hub_index
from checks.checkpoint.hub_failures import FileMissing, Patience
from checks.checkpoint.index import CheckpointIndex, Shard, TensorInfo
from checks.streaming import planned_source as planned_source_module
from checks.streaming.planned_source import REQUESTS, NotPlanned, planned_source
from checks.streaming.read_plan import LARGEST_RANGE, TensorRead
from tests.streaming.planned import bytes_index, read

SIZE = 4 << 20
CONTENT = np.random.default_rng(0).integers(0, 256, SIZE, np.uint8).tobytes()
index_of = partial(bytes_index, SIZE)
ROW, STEP = 100, 5000  # bytes of a row that is read, and from one to the next


class Upstream:
    """One shard in memory, whose requests are noted when they begin and when they succeed."""

    def __init__(self, content: bytes = CONTENT) -> None:
        self.content = content
        self.begun: list[tuple[int, int]] = []
        self.done: list[tuple[int, int]] = []
        self.most = 0
        self.pause = 0.0
        self.broken: set[int] = set()
        self.together: threading.Barrier | None = None
        self._active = 0
        self._lock = threading.Lock()

    def read_into(self, shard: str, start: int, buffer: memoryview) -> None:
        with self._lock:
            self.begun.append((start, start + buffer.nbytes))
            self._active += 1
            self.most = max(self.most, self._active)
        try:
            if self.together is not None:
                self.together.wait(30)
            if start in self.broken:
                raise CheckpointUnavailable(f"{shard}: the hub is down at {start}")
            time.sleep(self.pause)
            buffer[:] = self.content[start : start + buffer.nbytes]
        finally:
            with self._lock:
                self._active -= 1
        with self._lock:
            self.done.append((start, start + buffer.nbytes))


def rows_of(count: int, first: int = 0) -> list[tuple[int, int]]:
    return [(first + STEP * row, first + STEP * row + ROW) for row in range(count)]


TABLE = index_of(table=(0, 1_000_000), other=(1_000_000, 2_000_000))
ROWS, OTHER_ROWS = rows_of(64), rows_of(20, 1_000_000)
READS = {
    "table": TensorRead(1_000_000, runs=tuple(ROWS)),
    "other": TensorRead(1_000_000, runs=tuple((a - 1_000_000, b - 1_000_000) for a, b in OTHER_ROWS)),
}


def test_rows_are_fetched_several_at_a_time_and_in_order() -> None:
    upstream = Upstream()
    upstream.together = threading.Barrier(REQUESTS)  # none of them ends before all have begun
    source = planned_source(upstream, TABLE, READS, keep=True)
    assert read(source, *ROWS[0]) == CONTENT[:ROW]
    assert upstream.most == REQUESTS
    assert sorted(upstream.done) == ROWS
    for first in range(0, 64, REQUESTS):
        assert sorted(upstream.begun[first : first + REQUESTS]) == ROWS[first : first + REQUESTS]
    upstream.together = None
    for start, stop in ROWS:
        assert read(source, start, stop) == CONTENT[start:stop]
    assert sorted(upstream.begun) == ROWS
    for start, stop in reversed(OTHER_ROWS):
        assert read(source, start, stop) == CONTENT[start:stop]
    assert sorted(upstream.begun) == ROWS + OTHER_ROWS
    source.close()


def test_no_row_before_the_one_that_is_asked_for_and_none_of_another_tensor() -> None:
    upstream = Upstream()
    source = planned_source(upstream, TABLE, READS, keep=True)
    read(source, ROWS[60][0] + 10, ROWS[60][1])
    assert sorted(upstream.begun) == ROWS[60:]
    with pytest.raises(NotPlanned):
        read(source, 0, ROW + 1)
    with pytest.raises(NotPlanned):
        read(source, ROW, ROW + 1)
    source.close()


def test_no_more_rows_at_a_time_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planned_source_module, "AHEAD", 5 * ROW)
    upstream = Upstream()
    source = planned_source(upstream, TABLE, READS, keep=True)
    read(source, *ROWS[3])
    assert sorted(upstream.begun) == ROWS[3:8]
    read(source, *ROWS[4])
    read(source, *ROWS[7])
    assert len(upstream.begun) == 5
    read(source, *ROWS[8])
    assert sorted(upstream.begun) == ROWS[3:13]
    source.close()


def test_large_runs_are_fetched_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer to send than to ask for, and not every one may be asked for."""
    monkeypatch.setattr(planned_source_module, "SMALL_RUN", ROW - 1)
    upstream = Upstream()
    source = planned_source(upstream, TABLE, READS, keep=True)
    read(source, *ROWS[3])
    assert upstream.begun == [ROWS[3]]
    source.close()


def test_rows_that_stand_close_to_each_other_are_one_request() -> None:
    places = ((0, 100), (300, 400), (1400, 1500), (3000, 3100), (3100, 3300), (9000, 9001))
    upstream = Upstream()
    source = planned_source(upstream, TABLE, {"table": TensorRead(1_000_000, runs=places)}, keep=True)
    for start, stop in places:
        assert read(source, start, stop) == CONTENT[start:stop]
    assert sorted(upstream.begun) == [(0, 1500), (3000, 3300), (9000, 9001)]
    for start, stop in ((100, 101), (250, 350), (400, 1400)):
        with pytest.raises(NotPlanned):
            read(source, start, stop)
    source.close()


def test_a_large_tensor_is_fetched_in_several_requests_at_a_time() -> None:
    size = 3 * LARGEST_RANGE + 1000
    content = np.arange(size // 8 + 1, dtype=np.uint64).tobytes()[:size]
    upstream = Upstream(content)
    upstream.together = threading.Barrier(4)
    index = CheckpointIndex("memory", {"s": Shard("s", size)}, {"a": TensorInfo("a", "U8", (size,), "s", 0, size)})
    source = planned_source(upstream, index, {"a": TensorRead(size, whole=True)}, keep=True)
    assert read(source, 5, size - 5) == content[5:-5]
    assert sorted(stop - start for start, stop in upstream.begun) == [1000, *[LARGEST_RANGE] * 3]
    source.close()


def test_a_failure_ends_the_other_requests() -> None:
    upstream = Upstream()
    upstream.pause, upstream.broken = 0.05, {ROWS[0][0]}
    source = planned_source(upstream, TABLE, READS, keep=True)
    with pytest.raises(CheckpointUnavailable, match="s: the hub is down at 0"):
        read(source, *ROWS[0])
    assert len(upstream.begun) < 32
    upstream.broken, upstream.pause = set(), 0
    for start, stop in ROWS:
        assert read(source, start, stop) == CONTENT[start:stop]
    assert sorted(upstream.done) == ROWS  # what came before the failure is not asked for again
    source.close()


def test_a_row_that_was_not_asked_for_fails_when_it_is() -> None:
    upstream = Upstream()
    upstream.broken = {ROWS[2][0]}
    source = planned_source(upstream, TABLE, READS, keep=True)
    for row in (0, 1, 3, 63):
        assert read(source, *ROWS[row]) == CONTENT[slice(*ROWS[row])]
    with pytest.raises(CheckpointUnavailable, match=f"down at {ROWS[2][0]}"):
        read(source, *ROWS[2])
    upstream.broken = set()
    assert read(source, *ROWS[2]) == CONTENT[slice(*ROWS[2])]
    assert sorted(upstream.done) == ROWS
    source.close()


@given(
    runs=st.lists(st.tuples(st.integers(0, 30_000), st.integers(1, 400)), min_size=1, max_size=30),
    asked=st.lists(st.integers(0, 29), min_size=1, max_size=10),
    whole=st.booleans(),
)
@settings(deadline=None, max_examples=50)
def test_the_same_bytes_and_none_twice(runs: list[tuple[int, int]], asked: list[int], whole: bool) -> None:
    index = index_of(first=(0, 200), table=(200, 31_000), last=(31_000, 31_500))
    pieces = [(start, min(start + size, 30_800)) for start, size in runs]
    reads = {"table": TensorRead(30_800, runs=tuple(pieces))}
    if whole:
        reads |= {"first": TensorRead(200, whole=True), "last": TensorRead(500, whole=True)}
    upstream = Upstream()
    source = planned_source(upstream, index, reads, keep=True)
    for number in asked:
        start, stop = (200 + place for place in pieces[number % len(pieces)])
        assert read(source, start, stop) == CONTENT[start:stop]
    source.close()
    times = Counter(place for start, stop in upstream.begun for place in range(start, stop))
    assert set(times.values()) == {1}


@pytest.mark.parametrize("threads", [2, 12])
def test_threads_share_what_one_of_them_fetches(threads: int) -> None:
    upstream = Upstream()
    upstream.pause = 0.002
    source = planned_source(upstream, TABLE, READS, keep=True)
    wrong: list[tuple[int, int]] = []

    def work(seed: int) -> None:
        for number in np.random.default_rng(seed).permutation(64):
            if read(source, *ROWS[number]) != CONTENT[slice(*ROWS[number])]:
                wrong.append(ROWS[number])

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
    assert sorted(upstream.begun) == ROWS
    source.close()


def test_rows_of_a_table_on_a_hub(hub: Any) -> None:
    table = np.random.default_rng(1).standard_normal((4000, 256), np.float32)
    commit = hub.add("org/name", {"model.safetensors": save({"table": table})})
    index = read_hub_index("org/name", commit)
    rows = [(row, row + 2) for row in range(5, 4000, 200)]
    reads = {"table": TensorRead(table.size, runs=tuple((256 * a, 256 * b) for a, b in rows))}
    upstream = HubSource(index, Patience(attempts=1))
    source = planned_source(upstream, index, reads, keep=True)
    start = index.tensors["table"].start

    def rows_from_hub(first: int, last: int) -> np.ndarray[Any, Any]:
        buffer = bytearray(1024 * (last - first))
        source.read_into("model.safetensors", start + 1024 * first, memoryview(buffer))
        return np.frombuffer(buffer, np.float32).reshape(-1, 256)

    hub.fail("/resolve/", times=-1, status=404)
    with pytest.raises(FileMissing, match=r"org/name@\w+/model\.safetensors: is not there"):
        rows_from_hub(*rows[0])
    hub.faults.clear()
    hub.requests.clear()
    for first, last in rows:
        assert np.array_equal(rows_from_hub(first, last), table[first:last])
    assert len(hub.requests) == len(rows)
    assert upstream.transferred == 1024 * 2 * len(rows)
    source.close()
