"""A source of bytes with a tap: whatever is read through it is also shown to somebody else."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable

from checks.checkpoint.index import ByteSource, TensorInfo
from checks.streaming.reader import PageBuffer, PageSource

# Is shown bytes of a shard: its name, where they begin, and the bytes, which are another's memory.
Take = Callable[[str, int, memoryview], None]


def tapped(source: ByteSource, take: Take) -> ByteSource:
    """A source that gives the same bytes, and shows them to `take`, in the thread that reads them."""
    return _Pages(source, take) if isinstance(source, PageSource) else _Bytes(source, take)


class TensorPlaces:
    """Which of some tensors holds a byte. Raises ValueError for tensors that share bytes; empty ones hold none."""

    def __init__(self, tensors: Iterable[TensorInfo]) -> None:
        self._tensors: dict[str, list[TensorInfo]] = defaultdict(list)
        for tensor in sorted(tensors, key=lambda one: (one.shard, one.start)):
            if tensor.start == tensor.stop:
                continue
            before = self._tensors[tensor.shard]
            if before and tensor.start < before[-1].stop:
                raise ValueError(f"{before[-1].name} and {tensor.name} share bytes; they cannot be taken apart")
            before.append(tensor)
        self._starts = {shard: [one.start for one in found] for shard, found in self._tensors.items()}

    def at(self, shard: str, start: int, stop: int) -> TensorInfo | None:
        """The tensor of these bytes; None if they are none's. Raises ValueError for bytes of more than one."""
        number = bisect_right(self._starts.get(shard, []), start) - 1
        if number < 0 or start >= self._tensors[shard][number].stop or start == stop:
            return None
        tensor = self._tensors[shard][number]
        if stop > tensor.stop:
            raise ValueError(f"{tensor.name} ends at byte {tensor.stop}, and bytes up to {stop} were read")
        return tensor


class _Bytes:
    def __init__(self, source: ByteSource, take: Take) -> None:
        self._source = source
        self._take = take

    def read_into(self, shard: str, start: int, buffer: memoryview) -> None:
        self._source.read_into(shard, start, buffer)
        self._take(shard, start, buffer)


class _Pages(_Bytes):
    _source: PageSource

    def read_pages(self, shard: str, start: int, stop: int, buffer: PageBuffer) -> None:
        self._source.read_pages(shard, start, stop, buffer)
        self._take(shard, start, buffer.place(start, stop))

    def is_cached(self, shard: str) -> bool:
        return self._source.is_cached(shard)
