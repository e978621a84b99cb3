"""Whole tensors, copied from the bytes that a pass reads: what needs a layer costs no second reading."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from checks.checkpoint.index import ByteSource, TensorInfo
from checks.streaming.tapped import TensorPlaces, tapped


def holding(
    source: ByteSource,
    tensors: Iterable[TensorInfo],
    done: Callable[[TensorInfo, bytearray | None], None],
    memory: int,
) -> ByteSource:
    """A source that gives the same bytes, and hands on the bytes of each of `tensors` once all went through it.

    `done`: called by the thread that read a tensor's last bytes, which so is held up for as long as it takes.
    For one pass, which reads every byte of these tensors once, those of one tensor at a time. Memory: the tensors that
    are begun and not finished, `memory` bytes of them at most, or a single one: of others `done` gets None.
    Raises ValueError for tensors that share bytes; its reads do for bytes of two tensors at a time, or that came
    before.
    """
    return tapped(source, _Holder(tensors, done, memory).take)


class _Holder:
    def __init__(
        self, tensors: Iterable[TensorInfo], done: Callable[[TensorInfo, bytearray | None], None], memory: int
    ) -> None:
        self._places = TensorPlaces(tensors)
        self._done = done
        self._memory = memory
        self._begun: dict[str, bytearray | None] = {}
        self._left: dict[str, int] = {}
        self._lock = threading.Lock()

    def take(self, shard: str, start: int, data: memoryview) -> None:
        """Copy what is wanted of these bytes. Several threads may call it."""
        stop = start + data.nbytes
        tensor = self._places.at(shard, start, stop)
        if tensor is None:
            return
        with self._lock:
            if tensor.name not in self._left:
                size = tensor.stop - tensor.start
                begun = sum(len(one) for one in self._begun.values() if one is not None)
                self._begun[tensor.name] = bytearray(size) if not begun or begun + size <= self._memory else None
                self._left[tensor.name] = size
            if tensor.name not in self._begun:
                raise ValueError(f"{tensor.name}: bytes {start} to {stop} of {shard} were read twice")
            held = self._begun[tensor.name]
        if held is not None:
            held[start - tensor.start : stop - tensor.start] = data.cast("B")
        with self._lock:
            self._left[tensor.name] -= data.nbytes
            if self._left[tensor.name] > 0:
                return
            del self._begun[tensor.name]
        self._done(tensor, held)
