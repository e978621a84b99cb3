"""Chosen elements of tensors, taken from the bytes that a pass reads: what needs a sample costs no second reading."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from checks.checkpoint.index import ByteSource, TensorInfo
from checks.statistics.kernel_cpu import ITEM_SIZES
from checks.streaming.reader import PageBuffer, PageSource
from checks.streaming.whole_tensors import TORCH_DTYPES

if TYPE_CHECKING:
    import torch

# Which elements of a tensor are wanted: rising and distinct positions in stored order.
Positions = Callable[[TensorInfo], npt.NDArray[np.int64]]


def picking(
    source: ByteSource,
    tensors: Iterable[TensorInfo],
    positions: Positions,
    done: Callable[[TensorInfo, torch.Tensor], None],
) -> ByteSource:
    """A source that gives the same bytes, and hands on elements of `tensors` once all of a tensor went through it.

    `positions`: asked when a tensor is begun. `done`: called with the tensor's chosen elements, flat, on the CPU, by
    the thread that read its last bytes, which so is held up for as long as it takes.
    For one pass, which reads every byte of these tensors once, whole elements of one tensor at a time. Memory: the
    chosen elements of the tensors that are begun and not finished. Raises ValueError for other than plain floats, and
    for tensors that share bytes; its reads do for bytes of two tensors at a time, or that came before.
    """
    picker = _Picker(tensors, positions, done)
    return _Pages(source, picker) if isinstance(source, PageSource) else _Bytes(source, picker)


class _Bytes:
    def __init__(self, source: ByteSource, picker: _Picker) -> None:
        self._source = source
        self._picker = picker

    def read_into(self, shard: str, start: int, buffer: memoryview) -> None:
        self._source.read_into(shard, start, buffer)
        self._picker.take(shard, start, buffer)


class _Pages(_Bytes):
    _source: PageSource

    def read_pages(self, shard: str, start: int, stop: int, buffer: PageBuffer) -> None:
        self._source.read_pages(shard, start, stop, buffer)
        self._picker.take(shard, start, buffer.place(start, stop))

    def is_cached(self, shard: str) -> bool:
        return self._source.is_cached(shard)


@dataclass(slots=True)
class _Begun:
    """A tensor of which some bytes came. `left`: how many are to come."""

    positions: npt.NDArray[np.int64]
    values: npt.NDArray[np.generic]
    came: npt.NDArray[np.bool_]
    left: int


class _Picker:
    def __init__(
        self, tensors: Iterable[TensorInfo], positions: Positions, done: Callable[[TensorInfo, torch.Tensor], None]
    ) -> None:
        self._tensors: dict[str, list[TensorInfo]] = defaultdict(list)
        for tensor in sorted(tensors, key=lambda one: (one.shard, one.start)):
            if tensor.dtype not in ITEM_SIZES:
                raise ValueError(f"{tensor.name} is {tensor.dtype}; picked are elements of {', '.join(ITEM_SIZES)}")
            if not tensor.elements:
                continue
            before = self._tensors[tensor.shard]
            if before and tensor.start < before[-1].stop:
                raise ValueError(f"{before[-1].name} and {tensor.name} share bytes; elements of both cannot be picked")
            before.append(tensor)
        self._starts = {shard: [one.start for one in found] for shard, found in self._tensors.items()}
        self._positions = positions
        self._done = done
        self._begun: dict[str, _Begun] = {}
        self._lock = threading.Lock()

    def take(self, shard: str, start: int, data: memoryview) -> None:
        """Keep what is wanted of these bytes. Several threads may call it."""
        number = bisect_right(self._starts.get(shard, []), start) - 1
        if number < 0 or start >= self._tensors[shard][number].stop or not len(data):
            return
        tensor = self._tensors[shard][number]
        size = ITEM_SIZES[tensor.dtype]
        if start + len(data) > tensor.stop:
            raise ValueError(f"{tensor.name} ends at byte {tensor.stop}, and bytes up to {start + len(data)} were read")
        with self._lock:
            if tensor.name not in self._begun:
                wanted = self._positions(tensor)
                values = np.empty(len(wanted), np.dtype(f"i{size}"))
                came = np.zeros(len(wanted), np.bool_)
                self._begun[tensor.name] = _Begun(wanted, values, came, tensor.stop - tensor.start)
            begun = self._begun[tensor.name]
        first = (start - tensor.start) // size
        low, high = np.searchsorted(begun.positions, [first, first + len(data) // size])
        begun.values[low:high] = np.frombuffer(data, begun.values.dtype)[begun.positions[low:high] - first]
        begun.came[low:high] = True
        with self._lock:
            begun.left -= len(data)
            if begun.left > 0:
                return
            if begun.left < 0 or not begun.came.all():
                raise ValueError(f"{tensor.name}: some of its bytes were read twice, and others not yet")
            del self._begun[tensor.name]
        import torch

        self._done(tensor, torch.from_numpy(begun.values).view(getattr(torch, TORCH_DTYPES[tensor.dtype])))
