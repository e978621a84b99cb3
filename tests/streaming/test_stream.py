"""One pass over two checkpoints: right sums and hashes, each byte read once, bounded memory, clean ends."""

from __future__ import annotations

import itertools
import os
import random
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.hub_failures import RateLimited
from checks.checkpoint.local import LocalSource, read_local_index
from checks.statistics import kernel_cpu
from checks.statistics.kernel_cuda import DevicePieceSums
from checks.streaming import reader, stream
from checks.streaming.reader import DirectSource, PageBuffer
from checks.streaming.stream import SMALLEST_PIECE, stream_pair
from checks.streaming.whole_tensors import layer_blocks
from tests.streaming.memory import (
    DTYPES,
    FLOATS,
    PAIRED,
    PAIRS,
    Memory,
    assert_right,
    bytes_of,
    make,
    run,
    sha256,
)

pytestmark = pytest.mark.usefixtures("no_thread_is_left")


@pytest.mark.parametrize("threads", [1, 2, 5, 16])
def test_sums_and_hashes_of_every_tensor(ours: Memory, theirs: Memory, threads: int) -> None:
    assert_right(run(ours, theirs, threads=threads), ours, theirs, PAIRS)


@pytest.mark.parametrize("source", [LocalSource, DirectSource, lambda path: DirectSource(path, direct=True)])
@pytest.mark.parametrize("piece", [SMALLEST_PIECE, None])
def test_from_disk(ours: Memory, theirs: Memory, tmp_path: Path, source: Any, piece: int | None) -> None:
    paths = ours.save(tmp_path / "ours"), theirs.save(tmp_path / "theirs")
    indexes = [read_local_index(path) for path in paths]
    results = list(stream_pair(*indexes, tuple(map(source, paths)), PAIRS, piece=piece))
    assert_right(results, ours, theirs, PAIRS)


def test_each_byte_is_read_once_and_nothing_else(ours: Memory, theirs: Memory) -> None:
    run(ours, theirs, threads=4)
    assert ours.was_read_once(set(ours.tensors))
    assert theirs.was_read_once(set(theirs.tensors))


def test_without_hashes_only_pairs_are_read(ours: Memory, theirs: Memory) -> None:
    results = run(ours, theirs, hashing=False)
    assert [result.candidate for result in results] == [result.reference for result in results] == PAIRED
    assert all(result.candidate_sha256 is result.reference_sha256 is None for result in results)
    assert ours.was_read_once(set(PAIRED))
    assert theirs.was_read_once(set(PAIRED))


def test_results_are_the_same_in_every_run(ours: Memory, theirs: Memory) -> None:
    expected = run(ours, theirs, threads=2)
    assert [result.candidate for result in expected if result.sums] == PAIRED
    for threads, piece in itertools.product((2, 8), (SMALLEST_PIECE, 3 * SMALLEST_PIECE, None)):
        assert run(ours, theirs, threads=threads, piece=piece) == expected


def test_reads_are_in_the_order_of_the_candidates_bytes(ours: Memory, theirs: Memory) -> None:
    run(ours, theirs, threads=2, memory=4 * PageBuffer.footprint(SMALLEST_PIECE))
    order = sorted(ours.reads)
    # Two requests are in flight, so that neighbours may change places.
    assert all(abs(order.index(read) - place) <= 2 for place, read in enumerate(ours.reads))


def test_names_need_not_be_equal(ours: Memory, theirs: Memory) -> None:
    pairs = [("up", "down"), ("down", "up"), ("embedding", "embedding")]
    assert_right(run(ours, theirs, pairs), ours, theirs, pairs)


def test_no_pairs_and_no_tensors(ours: Memory, theirs: Memory) -> None:
    assert_right(run(ours, theirs, []), ours, theirs, [])
    assert run(ours, theirs, [], hashing=False) == []
    nothing = Memory()
    assert_right(run(nothing, theirs, []), nothing, theirs, [])
    assert run(nothing, nothing, []) == []


shapes = st.one_of(st.integers(0, 20), st.integers(0, 40_000), st.sampled_from([2048, 4096, 8191, 8193]))


@given(
    pairs=st.lists(st.tuples(shapes, st.sampled_from(list(FLOATS)), st.sampled_from(list(FLOATS))), max_size=6),
    lone=st.lists(st.tuples(st.booleans(), shapes, st.sampled_from(list(DTYPES))), max_size=4),
    pieces=st.integers(1, 4),
    threads=st.integers(1, 6),
    seed=st.integers(0, 99),
)
@settings(max_examples=40)
def test_any_two_checkpoints(pairs: Any, lone: Any, pieces: int, threads: int, seed: int) -> None:
    ours, theirs = {}, {}
    for k, (size, dtype, other) in enumerate(pairs):
        ours[f"p{k}"], theirs[f"p{k}"] = ((size,), dtype), ((size,), other)
    for k, (is_ours, size, dtype) in enumerate(lone):
        (ours if is_ours else theirs)[f"l{k}"] = ((size,), dtype)
    shuffled = dict(random.Random(seed).sample(list(theirs.items()), len(theirs)))
    one, other = Memory(make(seed, ours), gap=seed % 9), Memory(make(seed + 50, shuffled), gap=seed % 5)
    named = [(name, name) for name in ours if name in theirs]
    results = run(one, other, named, piece=pieces * SMALLEST_PIECE, threads=threads)
    assert_right(results, one, other, named)
    assert one.was_read_once(set(ours))
    assert other.was_read_once(set(theirs))


@pytest.mark.parametrize("with_numba", [True, False])
def test_every_bit_is_the_same_whatever_the_threads_and_pieces(
    with_numba: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also without numba, and where torch may use several threads."""
    if with_numba and kernel_cpu.numba is None:
        pytest.skip("numba is not installed")
    if not with_numba:
        monkeypatch.setattr(kernel_cpu, "numba", None)
    before = torch.get_num_threads()
    spec = {f"t{k}": ((64, 1021 + 300 * k), dtype) for k, dtype in enumerate(FLOATS)}
    ours, theirs = Memory(make(1, spec)), Memory(make(2, spec), gap=5)
    pairs = [(name, name) for name in spec]
    try:
        expected = run(ours, theirs, pairs)
        for torch_threads, threads, piece in itertools.product((1, 3), (1, 2, 8), (SMALLEST_PIECE, None)):
            torch.set_num_threads(torch_threads)
            assert run(ours, theirs, pairs, threads=threads, piece=piece) == expected
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("slow", [0, 1])
def test_one_side_may_be_slow(ours: Memory, theirs: Memory, slow: int) -> None:
    (ours, theirs)[slow].before_read = lambda number: time.sleep(0.003)
    assert_right(run(ours, theirs, threads=4), ours, theirs, PAIRS)


def test_several_passes_at_the_same_time(ours: Memory, theirs: Memory) -> None:
    expected, found = run(ours, theirs), []
    threads = [threading.Thread(target=lambda: found.append(run(ours, theirs))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 4


@pytest.mark.parametrize("threads", [2, 8])
@pytest.mark.parametrize("memory", [100_000, 1 << 20, 64 << 20])
def test_buffers_never_exceed_the_memory(
    ours: Memory, theirs: Memory, monkeypatch: pytest.MonkeyPatch, memory: int, threads: int
) -> None:
    sizes: list[int] = []

    def counted(size: int) -> Any:
        sizes.append(size)
        return np.empty(size, np.uint8)

    monkeypatch.setattr(stream, "ordinary_memory", counted)
    results = run(ours, theirs, threads=threads, memory=memory, piece=None)
    assert_right(results, ours, theirs, PAIRS)
    assert 0 < sum(sizes) <= memory
    assert max(ours.most_at_once, theirs.most_at_once) <= len(sizes)


def test_several_reads_are_in_flight(ours: Memory, theirs: Memory) -> None:
    ours.before_read = lambda number: time.sleep(0.01)
    run(ours, theirs, threads=2)
    assert 4 <= ours.most_at_once <= stream.WAITING_BUFFERS


def test_too_little_memory_is_refused(ours: Memory, theirs: Memory) -> None:
    with pytest.raises(ValueError, match="the memory of the pass must be 98304 bytes or more"):
        run(ours, theirs, memory=98303, threads=2)
    assert run(ours, theirs, memory=98304, threads=2)


def test_wrong_pairs_are_refused_before_anything_is_read(ours: Memory, theirs: Memory) -> None:
    for pairs, message in [
        ([("up", "other")], "'up' has 66600 elements and 'other' 5"),
        ([("up", "absent")], "no such tensors"),
        ([("absent", "up")], "no such tensors"),
        ([("up", "up"), ("up", "down")], "a tensor may stand in one pair"),
        ([("up", "up"), ("down", "up")], "a tensor may stand in one pair"),
        ([("codes", "codes")], "no such tensors"),
    ]:
        with pytest.raises(ValueError, match=message):
            stream_pair(ours.index, theirs.index, (ours, theirs), pairs)
    with pytest.raises(ValueError, match="'odd' is U8; compared are BF16"):
        stream_pair(ours.index, ours.index, (ours, ours), [("odd", "odd")])
    broken = dict(ours.index.tensors)
    broken["up"] = replace(broken["up"], stop=broken["up"].stop - 2)
    with pytest.raises(ValueError, match="'up' has 133198 bytes"):
        stream_pair(replace(ours.index, tensors=broken), theirs.index, (ours, theirs), [("up", "up")])
    assert not ours.reads


# What is known already, and what is kept


def test_tensors_whose_hash_is_known_are_read_only_to_compare_them(ours: Memory, theirs: Memory) -> None:
    hashed = ({"only ours", "up", "codes"}, {"only theirs", "up"})
    results = run(ours, theirs, hashed=hashed)
    found = {result.candidate: result.candidate_sha256 for result in results if result.candidate}
    assert found == {
        name: None if name in hashed[0] else sha256(tensor)
        for name, tensor in ours.tensors.items()
        if name not in ("only ours", "codes")
    }
    theirs_found = {result.reference: result.reference_sha256 for result in results if result.reference}
    assert theirs_found.keys() == theirs.tensors.keys() - {"only theirs"}
    assert theirs_found["up"] is None
    assert ours.was_read_once(ours.tensors.keys() - {"only ours", "codes"})
    assert theirs.was_read_once(theirs.tensors.keys() - {"only theirs"})
    everything = (set(ours.tensors), set(theirs.tensors))
    assert run(ours, theirs, [], hashed=everything) == []
    compared = [result.sums for result in run(ours, theirs, hashed=everything)]
    assert compared == [result.sums for result in run(ours, theirs, hashing=False)]


@pytest.mark.parametrize("threads", [2, 6])
@pytest.mark.parametrize("room", [0, 300_000, 64 << 20])
def test_whole_tensors_come_with_the_sums(ours: Memory, theirs: Memory, threads: int, room: int) -> None:
    keep = {"up", "down", "empty", "scalar"}
    results = run(ours, theirs, keep=keep, threads=threads, room=room)
    assert results == run(ours, theirs)
    whole = {result.candidate: (result.reference, result.whole) for result in results if result.whole}
    assert whole.keys() == keep
    for name, (other, (a, b)) in whole.items():
        for kept, tensor in ((a, ours.tensors[name]), (b, theirs.tensors[other])):
            assert (kept.dtype, kept.shape) == (tensor.dtype, tensor.shape)
            assert bytes_of(kept) == bytes_of(tensor)
    ours.counts["0.safetensors"][:] //= 2  # of the two passes
    ours.counts["1.safetensors"][:] //= 2
    assert ours.was_read_once(set(ours.tensors))


@pytest.mark.parametrize("keep", [frozenset(), frozenset({"up", "norm"})])
def test_the_beginnings_of_pairs_come_with_the_sums(ours: Memory, theirs: Memory, keep: frozenset[str]) -> None:
    results = run(ours, theirs, keep=keep, head=lambda tensor: 20_000)
    assert results == run(ours, theirs)
    for result in results:
        if result.sums is not None:
            assert result.heads is not None
            for head, tensor in zip(
                result.heads, (ours.tensors[result.candidate], theirs.tensors[result.reference]), strict=True
            ):
                assert bytes_of(head) == bytes_of(tensor.flatten()[:20_000])
                assert head.untyped_storage().nbytes() == head.nbytes


def test_only_pairs_can_be_kept(ours: Memory, theirs: Memory) -> None:
    with pytest.raises(ValueError, match="'only ours' is to be kept and in no pair"):
        run(ours, theirs, keep={"only ours", "up"})


class Held:
    """Memory that counts how much of it is alive."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def allocate(self, size: int) -> Any:
        memory = np.empty(size, np.uint8)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(memory, self._let_go, size)
        return memory

    def _let_go(self, size: int) -> None:
        self.now -= size


@pytest.mark.parametrize("threads", [2, 6])
@pytest.mark.parametrize("room", [0, 900_000])
def test_a_pass_is_ahead_of_its_caller_by_what_there_is_room_for(
    threads: int, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However slow the caller is; but a pair that is larger than the room is kept by itself."""
    spec = {f"t{number:02d}": ((50, 1000), "BF16") for number in range(20)}
    ours, theirs = Memory(make(1, spec)), Memory(make(2, spec))
    memory, held = threads * 200_000, Held()
    monkeypatch.setattr(stream, "ordinary_memory", held.allocate)
    pairs = [(name, name) for name in spec]
    results = stream_pair(
        ours.index, theirs.index, (ours, theirs), pairs, keep=set(spec), threads=threads, memory=memory, room=room
    )
    found = []
    for result in results:
        time.sleep(0.005)
        found.append(result.candidate)
        del result
    assert found == sorted(spec)
    pair = 2 * 100_000
    assert pair < held.most <= memory + max(room, pair)
    del results
    assert held.now == 0


# Shards of equal published digest


# What goes wrong


@pytest.mark.parametrize("number", [1, 3, 9])
@pytest.mark.parametrize(
    "error", [OSError(5, "Input/output error"), CheckpointUnavailable("hub: gone"), EOFError("end")]
)
def test_a_failed_read_names_shard_and_tensor(ours: Memory, theirs: Memory, number: int, error: Exception) -> None:
    def fail(at: int) -> None:
        if at == number:
            raise error

    theirs.before_read = fail
    with pytest.raises(
        CheckpointUnavailable, match=r"reference: \d\.safetensors, tensor '[\w ]+', bytes \d+ to \d+: "
    ) as e:
        run(ours, theirs)
    assert str(error) in str(e.value)


def test_what_could_not_be_read_keeps_its_kind(ours: Memory, theirs: Memory) -> None:
    """A gated repository, a hub that asks to wait: whoever reads the error may act on it."""

    def fail(number: int) -> None:
        raise RateLimited("hub: wait for 60 s")

    theirs.before_read = fail
    with pytest.raises(RateLimited, match=r"reference: \d\.safetensors, tensor .*: hub: wait for 60 s"):
        run(ours, theirs)
    with pytest.raises(RateLimited):
        list(layer_blocks(theirs.index, theirs, [["up"]]))


def test_a_mistake_in_a_thread_is_raised_as_it_is(ours: Memory, theirs: Memory) -> None:
    def fail(number: int) -> None:
        raise ZeroDivisionError("a mistake")

    ours.before_read = fail
    with pytest.raises(ZeroDivisionError):
        run(ours, theirs)


@pytest.mark.parametrize("direct", [False, True, None])
def test_a_file_that_ends_too_early(ours: Memory, theirs: Memory, tmp_path: Path, direct: bool | None) -> None:
    paths = ours.save(tmp_path / "ours"), theirs.save(tmp_path / "theirs")
    indexes = [read_local_index(path) for path in paths]
    shard = paths[0] / "1.safetensors"
    os.truncate(shard, shard.stat().st_size - 100)
    with pytest.raises(CheckpointUnavailable, match=r"1\.safetensors, tensor '(down|codes)'.*ends at byte"):
        list(stream_pair(*indexes, tuple(DirectSource(path, direct) for path in paths), PAIRS))


def test_a_file_that_is_gone(ours: Memory, theirs: Memory, tmp_path: Path) -> None:
    paths = ours.save(tmp_path / "ours"), theirs.save(tmp_path / "theirs")
    indexes = [read_local_index(path) for path in paths]
    (paths[1] / "0.safetensors").unlink()
    with pytest.raises(CheckpointUnavailable, match=r"0\.safetensors"):
        list(stream_pair(*indexes, tuple(map(DirectSource, paths)), PAIRS))


def test_giving_up_ends_the_pass(ours: Memory, theirs: Memory) -> None:
    ours.before_read = lambda number: time.sleep(0.002)
    results = stream_pair(ours.index, theirs.index, (ours, theirs), PAIRS, piece=SMALLEST_PIECE, threads=2)
    assert next(results).candidate == "embedding"
    results.close()
    read = sum(length for _, _, length in ours.reads)
    time.sleep(0.05)
    assert read == sum(length for _, _, length in ours.reads) < sum(map(len, ours.contents.values()))


def test_a_pass_that_was_never_begun_reads_nothing(ours: Memory, theirs: Memory) -> None:
    stream_pair(ours.index, theirs.index, (ours, theirs), PAIRS)
    assert not ours.reads


def test_a_caller_that_stops_asking_stops_nothing_else(ours: Memory, theirs: Memory) -> None:
    results = stream_pair(ours.index, theirs.index, (ours, theirs), PAIRS, piece=SMALLEST_PIECE)
    first = next(results)
    time.sleep(0.05)
    assert_right([first, *results], ours, theirs, PAIRS)


def test_through_the_function_for_devices(ours: Memory, theirs: Memory, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = run(ours, theirs)
    monkeypatch.setattr(
        stream, "_comparer", lambda device: (lambda a, b: DevicePieceSums(a, b, device), reader.ordinary_memory)
    )
    found = run(ours, theirs)
    assert_right(found, ours, theirs, PAIRS)
    assert [result.candidate_sha256 for result in found] == [result.candidate_sha256 for result in expected]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu(ours: Memory, theirs: Memory) -> None:
    assert_right(run(ours, theirs, device="cuda"), ours, theirs, PAIRS)
