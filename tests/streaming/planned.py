"""Small indexes, and reads of a planned source, for the tests of what a plan reads."""

from __future__ import annotations

from checks.checkpoint.index import CheckpointIndex, Shard, TensorInfo
from checks.streaming.planned_source import PlannedSource


def bytes_index(size: int, **tensors: tuple[int, int]) -> CheckpointIndex:
    """A shard of so many bytes, with tensors of one byte for each element, by start and stop."""
    found = {name: TensorInfo(name, "U8", (b - a,), "s", a, b) for name, (a, b) in tensors.items()}
    return CheckpointIndex("memory", {"s": Shard("s", size)}, found)


def read(source: PlannedSource, start: int, stop: int) -> bytes:
    """Bytes of that shard."""
    buffer = bytearray(stop - start)
    source.read_into("s", start, memoryview(buffer))
    return bytes(buffer)
