from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checks.checkpoint.index import ByteSource, TensorInfo
from checks.streaming.picking import picking
from checks.streaming.reader import DirectSource, PageBuffer
from checks.streaming.stream import SMALLEST_PIECE, stream_pair
from tests.streaming.memory import FLOATS, PAIRS, Memory, make, random_tensor, run

SPEC = {"embedding": ((301, 64), "BF16"), "norm": ((64,), "F32"), "only ours": ((77, 1001), "F16")}


def every_third(tensor: TensorInfo) -> npt.NDArray[np.int64]:
    return np.arange(1, tensor.elements, 3)


def floats(side: Memory) -> list[TensorInfo]:
    return [tensor for tensor in side.index.tensors.values() if tensor.dtype in FLOATS]


def picked(side: Memory, source: ByteSource | None = None) -> tuple[ByteSource, dict[str, torch.Tensor]]:
    found: dict[str, torch.Tensor] = {}

    def done(tensor: TensorInfo, values: torch.Tensor) -> None:
        assert tensor.name not in found
        found[tensor.name] = values

    return picking(source or side, floats(side), every_third, done), found


def assert_picked(found: dict[str, torch.Tensor], side: Memory) -> None:
    assert found.keys() == {tensor.name for tensor in floats(side) if tensor.elements}
    for name, values in found.items():
        assert values.dtype == side.tensors[name].dtype
        assert torch.equal(values, side.tensors[name].reshape(-1)[1::3])


@pytest.mark.parametrize("threads", [2, 5])
def test_a_pass_gives_the_same_and_the_elements(ours: Memory, theirs: Memory, threads: int) -> None:
    plain = run(ours, theirs)
    (our_source, our_found), (their_source, their_found) = picked(ours), picked(theirs)
    for side in (ours, theirs):
        for counts in side.counts.values():
            counts[:] = 0
    results = list(
        stream_pair(ours.index, theirs.index, (our_source, their_source), PAIRS, piece=SMALLEST_PIECE, threads=threads)
    )
    assert results == plain
    assert_picked(our_found, ours)
    assert_picked(their_found, theirs)
    assert all(side.was_read_once(set(side.tensors)) for side in (ours, theirs))


@pytest.mark.parametrize("direct", [True, False])
def test_from_disk(ours: Memory, theirs: Memory, tmp_path: Path, direct: bool) -> None:
    paths = [side.save(tmp_path / name) for side, name in ((ours, "ours"), (theirs, "theirs"))]
    sides = [picked(side, DirectSource(path, direct)) for side, path in zip((ours, theirs), paths, strict=True)]
    list(stream_pair(ours.index, theirs.index, (sides[0][0], sides[1][0]), PAIRS, piece=SMALLEST_PIECE))
    for (_, found), side in zip(sides, (ours, theirs), strict=True):
        assert_picked(found, side)


@given(
    size=st.integers(1, 5000),
    dtype=st.sampled_from(sorted(FLOATS)),
    wanted=st.sets(st.integers(0, 4999), max_size=50),
    cuts=st.sets(st.integers(1, 4999), max_size=6),
    seed=st.integers(0, 99),
)
@settings(max_examples=60)
def test_any_elements_in_any_pieces_in_any_order(
    size: int, dtype: str, wanted: set[int], cuts: set[int], seed: int
) -> None:
    tensor = random_tensor(seed, (size,), FLOATS[dtype])
    side = Memory({"before": torch.ones(7), "tensor": tensor, "after": torch.ones(9)})
    positions = np.array(sorted(one for one in wanted if one < size), np.int64)
    found: list[torch.Tensor] = []
    info = side.index.tensors["tensor"]
    source = picking(side, [info], lambda _: positions, lambda _, values: found.append(values))
    edges = [0, *sorted(cut for cut in cuts if cut < size), size]
    pieces = list(pairwise(edges))
    np.random.default_rng(seed).shuffle(pieces)
    item = tensor.element_size()
    for start, stop in pieces:
        assert not found
        buffer = bytearray((stop - start) * item)
        source.read_into(info.shard, info.start + start * item, memoryview(buffer))
        assert bytes(buffer) == side.contents[info.shard][info.start + start * item :][: len(buffer)]
    for other in ("before", "after"):
        one = side.index.tensors[other]
        source.read_into(one.shard, one.start, memoryview(bytearray(one.stop - one.start)))
    assert len(found) == 1
    assert torch.equal(found[0], tensor[torch.from_numpy(positions)])


def test_what_goes_wrong_is_not_hidden(ours: Memory, theirs: Memory) -> None:
    def done(tensor: TensorInfo, values: torch.Tensor) -> None:
        raise ZeroDivisionError(tensor.name)

    source = picking(ours, floats(ours), every_third, done)
    with pytest.raises(ZeroDivisionError):
        list(stream_pair(ours.index, theirs.index, (source, theirs), PAIRS))
    with pytest.raises(ValueError, match="codes is F8_E4M3"):
        picking(ours, [ours.index.tensors["codes"]], every_third, done)


def test_it_reads_pages_only_where_the_source_does(tmp_path: Path) -> None:
    side = Memory(make(1, SPEC))
    source: Any = picking(DirectSource(side.save(tmp_path / "side")), floats(side), every_third, lambda *_: None)
    info = side.index.tensors["norm"]
    buffer = PageBuffer(1 << 12)
    source.read_pages(info.shard, info.start, info.stop, buffer)
    assert bytes(buffer.place(info.start, info.stop)) == side.contents[info.shard][info.start : info.stop]
    assert source.is_cached(info.shard) in (True, False)
    assert not hasattr(picking(side, floats(side), every_third, lambda *_: None), "read_pages")


def test_tensors_that_share_bytes_are_refused(ours: Memory) -> None:
    info = ours.index.tensors["embedding"]
    begin = replace(
        info, name="its beginning", shape=(8,), stop=info.start + 8 * (info.stop - info.start) // info.elements
    )
    with pytest.raises(ValueError, match="share bytes"):
        picking(ours, [info, begin], every_third, lambda *_: None)


def test_bytes_that_come_twice_complete_nothing() -> None:
    side = Memory({"tensor": torch.arange(12.0), "after": torch.ones(4)})
    info = side.index.tensors["tensor"]
    found: list[torch.Tensor] = []
    source = picking(side, [info], every_third, lambda _, values: found.append(values))
    half = (info.stop - info.start) // 2
    source.read_into(info.shard, info.start, memoryview(bytearray(half)))
    with pytest.raises(ValueError, match="read twice"):
        source.read_into(info.shard, info.start, memoryview(bytearray(half)))
    with pytest.raises(ValueError, match="ends at byte"):
        source.read_into(info.shard, info.start, memoryview(bytearray(info.stop - info.start + 4)))
    assert found == []
