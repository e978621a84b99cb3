"""Chosen elements of tensors, taken from the bytes that a pass reads: what needs a sample costs no second reading."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from checks.checkpoint.index import ByteSource, TensorInfo
from checks.statistics.kernel_cpu import ITEM_SIZES
from checks.streaming.tapped import TensorPlaces, tapped
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
    return tapped(source, _Picker(tensors, positions, done).take)


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
        wanted = [*tensors]
        if other := next((one for one in wanted if one.dtype not in ITEM_SIZES), None):
            raise ValueError(f"{other.name} is {other.dtype}; picked are elements of {', '.join(ITEM_SIZES)}")
        self._places = TensorPlaces(wanted)
        self._positions = positions
        self._done = done
        self._begun: dict[str, _Begun] = {}
        self._lock = threading.Lock()

    def take(self, shard: str, start: int, data: memoryview) -> None:
        """Keep what is wanted of these bytes. Several threads may call it."""
        tensor = self._places.at(shard, start, start + len(data))
        if tensor is None:
            return
        size = ITEM_SIZES[tensor.dtype]
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
