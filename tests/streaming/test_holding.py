from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checks.checkpoint.index import ByteSource, TensorInfo
from checks.streaming.holding import holding
from checks.streaming.reader import DirectSource
from checks.streaming.stream import SMALLEST_PIECE, stream_pair
from tests.streaming.memory import PAIRS, Memory, bytes_of, make, run


def held_of(
    side: Memory, source: ByteSource | None = None, memory: int = 1 << 30
) -> tuple[ByteSource, dict[str, bytes | None]]:
    found: dict[str, bytes | None] = {}

    def done(tensor: TensorInfo, data: bytearray | None) -> None:
        assert tensor.name not in found
        found[tensor.name] = None if data is None else bytes(data)

    return holding(source or side, side.index.tensors.values(), done, memory), found


def assert_held(found: dict[str, bytes | None], side: Memory) -> None:
    assert found == {name: bytes_of(tensor) for name, tensor in side.tensors.items() if tensor.numel()}


@pytest.mark.parametrize("threads", [2, 5])
def test_a_pass_gives_the_same_and_the_tensors(ours: Memory, theirs: Memory, threads: int) -> None:
    plain = run(ours, theirs)
    sides = [held_of(side) for side in (ours, theirs)]
    for side in (ours, theirs):
        for counts in side.counts.values():
            counts[:] = 0
    sources = sides[0][0], sides[1][0]
    results = list(stream_pair(ours.index, theirs.index, sources, PAIRS, piece=SMALLEST_PIECE, threads=threads))
    assert results == plain
    for (_, found), side in zip(sides, (ours, theirs), strict=True):
        assert_held(found, side)
        assert side.was_read_once(set(side.tensors))


@pytest.mark.parametrize("direct", [True, False])
def test_from_disk(ours: Memory, theirs: Memory, tmp_path: Path, direct: bool) -> None:
    paths = [side.save(tmp_path / name) for side, name in ((ours, "ours"), (theirs, "theirs"))]
    sides = [held_of(side, DirectSource(path, direct)) for side, path in zip((ours, theirs), paths, strict=True)]
    list(stream_pair(ours.index, theirs.index, (sides[0][0], sides[1][0]), PAIRS, piece=SMALLEST_PIECE))
    for (_, found), side in zip(sides, (ours, theirs), strict=True):
        assert_held(found, side)


@settings(max_examples=50)
@given(data=st.data(), size=st.integers(1, 400), cuts=st.sets(st.integers(1, 399), max_size=6))
def test_pieces_may_come_in_any_order(data: st.DataObject, size: int, cuts: set[int]) -> None:
    side = Memory(make(0, {"before": ((5,), "U8"), "a": ((size,), "BF16"), "after": ((5,), "U8")}))
    source, found = held_of(side)
    info = side.index.tensors["a"]
    edges = [info.start, *sorted({info.start + 2 * cut for cut in cuts if cut < size}), info.stop]
    for start, stop in data.draw(st.permutations([*pairwise(edges)])):
        assert not found
        source.read_into(info.shard, start, memoryview(bytearray(stop - start)))
    assert found == {"a": bytes_of(side.tensors["a"])}


def test_bytes_that_come_twice_or_belong_to_two_tensors_are_a_mistake() -> None:
    side = Memory(make(0, {"a": ((10,), "U8"), "b": ((10,), "U8")}))
    source, _ = held_of(side)
    a = side.index.tensors["a"]
    with pytest.raises(ValueError, match=f"a ends at byte {a.stop}"):
        source.read_into(a.shard, a.start, memoryview(bytearray(12)))
    source, _ = held_of(side)
    source.read_into(a.shard, a.start, memoryview(bytearray(10)))
    with pytest.raises(ValueError, match="read twice"):
        source.read_into(a.shard, a.start, memoryview(bytearray(10)))
    overlapping = [a, TensorInfo("c", "U8", (4,), a.shard, a.start, a.start + 4)]
    with pytest.raises(ValueError, match="share bytes"):
        holding(side, overlapping, lambda tensor, data: None, 100)


def test_other_bytes_go_through(ours: Memory) -> None:
    found: list[str] = []
    source = holding(ours, [], lambda tensor, data: found.append(tensor.name), 100)
    info = ours.index.tensors["up"]
    buffer = bytearray(info.stop - info.start)
    source.read_into(info.shard, info.start, memoryview(buffer))
    assert bytes(buffer) == bytes_of(ours.tensors["up"])
    assert not found


def test_no_more_memory_is_begun_than_there_may_be() -> None:
    side = Memory(make(0, dict.fromkeys("abc", ((100,), "U8"))))
    source, found = held_of(side, memory=199)
    a, b, c = (side.index.tensors[name] for name in "abc")
    for start, stop in ((a.start, a.stop - 1), (b.start, b.stop - 1)):  # b is begun while a is not finished
        source.read_into(a.shard, start, memoryview(bytearray(stop - start)))
    source.read_into(a.shard, a.stop - 1, memoryview(bytearray(1)))
    source.read_into(c.shard, c.start, memoryview(bytearray(100)))
    source.read_into(b.shard, b.stop - 1, memoryview(bytearray(1)))
    assert found == {"a": bytes_of(side.tensors["a"]), "c": bytes_of(side.tensors["c"]), "b": None}


def test_a_single_tensor_may_always_be_begun() -> None:
    side = Memory(make(0, {"a": ((100,), "U8")}))
    source, found = held_of(side, memory=0)
    a = side.index.tensors["a"]
    source.read_into(a.shard, a.start, memoryview(bytearray(100)))
    assert found == {"a": bytes_of(side.tensors["a"])}
