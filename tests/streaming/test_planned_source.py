from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.hub import HubSource, read_hub_index
from checks.checkpoint.roles import role_of
from checks.streaming.planned_source import NotPlanned, planned_source
from checks.streaming.read_plan import SAMPLE, ReadRequest, TensorRead, byte_ranges
from checks.streaming.reader import DirectSource, PageBuffer, PageSource, TensorReader
from checks.streaming.sampling import Side, plan_reads
from tests.streaming.planned import bytes_index, read

SIZE = 40_000
CONTENT = np.random.default_rng(0).integers(0, 256, SIZE, np.uint8).tobytes()
index_of = partial(bytes_index, SIZE)


class Counting:
    """One shard in memory; counts what is read of it, slowly."""

    def __init__(self, pause: float = 0.0) -> None:
        self.reads: list[tuple[int, int]] = []
        self.pause = pause
        self.broken = False

    def read_into(self, shard: str, start: int, buffer: memoryview) -> None:
        time.sleep(self.pause)
        if self.broken:
            raise CheckpointUnavailable("the hub is down")
        self.reads.append((start, start + buffer.nbytes))
        buffer[:] = CONTENT[start : start + buffer.nbytes]


INDEX = index_of(a=(100, 1100), b=(1100, 2100), c=(5000, 9000), d=(9000, 9500))
READS = {
    "a": TensorRead(1000, whole=True),
    "b": TensorRead(1000, runs=((0, 10), (500, 600))),
    "c": TensorRead(4000, runs=((3990, 4000),)),
    "d": TensorRead(500, whole=True),
}


@pytest.mark.parametrize("keep", [False, True])
def test_planned_bytes_and_no_others(keep: bool) -> None:
    source = planned_source(Counting(), INDEX, READS, keep=keep)
    for start, stop in ((100, 1110), (500, 501), (1600, 1700), (8990, 9500), (300, 300)):
        assert read(source, start, stop) == CONTENT[start:stop]
    for start, stop in ((99, 101), (1100, 1111), (1599, 1600), (1650, 1701), (8989, 8991), (0, SIZE), (3000, 3001)):
        with pytest.raises(NotPlanned, match=r"memory/s: bytes .* are not read in this run.*--read full"):
            read(source, start, stop)
    buffer = bytearray(10)
    with pytest.raises(NotPlanned):
        source.read_into("another", 100, memoryview(buffer))
    source.close()


@given(
    ranges=st.lists(st.tuples(st.integers(0, 2000), st.integers(1, 300)), min_size=1, max_size=10),
    asked=st.tuples(st.integers(0, 2300), st.integers(0, 400)),
)
@settings(deadline=None, max_examples=60)
def test_every_byte_is_planned_or_not(ranges: list[tuple[int, int]], asked: tuple[int, int]) -> None:
    index = index_of(all=(0, 3000))
    reads = {"all": TensorRead(3000, runs=tuple((start, start + size) for start, size in ranges))}
    planned = {place for start, size in ranges for place in range(start, start + size)}
    start, stop = asked[0], asked[0] + asked[1]
    counting = Counting()
    for keep in (False, True):
        source = planned_source(counting, index, reads, keep=keep)
        if planned.issuperset(range(start, stop)):
            assert read(source, start, stop) == CONTENT[start:stop]
        else:
            with pytest.raises(NotPlanned):
                read(source, start, stop)
        source.close()


def test_what_is_kept_is_received_once() -> None:
    counting = Counting(pause=0.005)
    source = planned_source(counting, INDEX, READS, keep=True)
    with ThreadPoolExecutor(8) as pool:
        pieces = [(start, start + 100) for start in range(100, 1000, 50)] * 3 + [(8995, 9400)] * 5
        found = list(pool.map(lambda one: read(source, *one), pieces))
    assert found == [CONTENT[start:stop] for start, stop in pieces]
    assert sorted(counting.reads) == [(100, 1110), (8990, 9500)]
    source.close()


def test_what_failed_is_asked_for_again() -> None:
    counting = Counting()
    counting.broken = True
    source = planned_source(counting, INDEX, READS, keep=True)
    for _ in range(2):
        with pytest.raises(CheckpointUnavailable, match="hub is down"):
            read(source, 100, 200)
    counting.broken = False
    assert read(source, 100, 200) == CONTENT[100:200]


def test_no_room_for_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = planned_source(Counting(), INDEX, READS, keep=True, directory=tmp_path)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        with pytest.raises(CheckpointUnavailable, match=r"No space left.*TMPDIR"):
            read(source, 100, 200)
    assert read(source, 100, 200) == CONTENT[100:200]
    assert list(tmp_path.iterdir()) == []  # its files have no names
    source.close()


def test_a_source_of_pages_stays_one(tmp_path: Path) -> None:
    (tmp_path / "s").write_bytes(CONTENT)
    source = planned_source(DirectSource(tmp_path), INDEX, READS, keep=False)
    assert isinstance(source, PageSource)
    assert source.is_cached("s") in (True, False)
    reader = TensorReader(INDEX, source)
    assert bytes(reader.read(INDEX.tensors["a"], 150, 1000, PageBuffer(2000))) == CONTENT[150:1000]
    with pytest.raises(CheckpointUnavailable, match="not read in this run"):
        reader.read(INDEX.tensors["c"], 5000, 5100, PageBuffer(2000))
    assert not isinstance(planned_source(Counting(), INDEX, READS, keep=False), PageSource)


def test_a_plan_on_the_hub_transfers_each_byte_once(hub: Any) -> None:
    header: dict[str, object] = {}
    end = 0
    for layer in range(10):
        for name, shape in (("input_layernorm", (256,)), ("mlp.up_proj", (512, 256)), ("mlp.down_proj", (256, 512))):
            size = 4 * int(np.prod(shape))
            place = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
            header[f"model.layers.{layer}.{name}.weight"] = place
            end += size
    text = json.dumps(header).encode()
    body = np.random.default_rng(1).standard_normal(end // 4, np.float32).tobytes()
    commit = hub.add("org/name", {"model.safetensors": len(text).to_bytes(8, "little") + text + body})
    index = read_hub_index("org/name", commit)
    side = Side(index, {name: role_of(name) for name in index.tensors})
    plan = plan_reads(side, side, [(name, name) for name in index.tensors], ReadRequest(SAMPLE, seed=2))
    ranges = list(byte_ranges(index, plan.candidate.reads))
    planned = sum(stop - start for _, start, stop in ranges)
    assert planned < 0.25 * end
    upstream = HubSource(index)
    source = planned_source(upstream, index, plan.candidate.reads, keep=True)
    before = len(hub.requests)
    for _ in range(2):
        for shard, start, stop in ranges:
            buffer = bytearray(stop - start)
            source.read_into(shard, start, memoryview(buffer))
            first = start - 8 - len(text)
            assert bytes(buffer) == body[first : first + len(buffer)]
    assert upstream.transferred == planned
    assert len(hub.requests) - before == len(ranges)
    source.close()
