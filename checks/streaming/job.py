"""What a pass has to do: tensors to read, hash, compare and keep, in the order in which they are begun."""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from checks.checkpoint.index import TensorInfo
from checks.statistics.elementwise import ElementwiseSums
from checks.statistics.kernel_cpu import BLOCK, ITEM_SIZES
from checks.streaming.reader import Allocate, TensorReader, ordinary_memory


class Sums(Protocol):
    """Compares two tensors that come in pieces."""

    def add(self, a: memoryview, b: memoryview) -> None:
        """The next bytes of both. Their memory may be used for something else once this returns."""

    def result(self) -> ElementwiseSums:
        """The sums of all that was added."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How a pass is made.

    `piece`: bytes; `buffers`: of each ring; `tracks`: jobs that are worked on at a time; `room`: see JobQueue.
    """

    readers: tuple[TensorReader, TensorReader]
    make_sums: Callable[[str, str], Sums]
    allocate: Allocate
    device: str
    reads_ahead: bool
    tracks: int
    piece: int
    buffers: int
    room: int


@dataclass(slots=True, eq=False)
class Part:
    """One tensor to read. `side`: 0 the candidate's, 1 the reference's. `is_hashed`: is its SHA-256 wanted?

    `keeps`: how many of its first bytes outlive the pass; `kept`: those bytes. `head`: how many of its first elements
    the result is to hold.
    """

    side: int
    tensor: TensorInfo
    is_hashed: bool = True
    keeps: int = 0
    head: int = 0
    hash: Any = None
    kept: npt.NDArray[np.uint8] | None = None

    def take(self, start: int, data: memoryview) -> None:
        """Hash bytes from `start` of the shard, and keep those that are to be kept."""
        if self.hash is not None:
            self.hash.update(data)
        first = start - self.tensor.start
        if self.kept is not None and first < self.keeps:
            share = data[: self.keeps - first]
            self.kept[first : first + len(share)] = np.frombuffer(share, np.uint8)


@dataclass(slots=True, eq=False)
class Job:
    """A pair of tensors; or two tensors without counterpart, read side by side; or the one that is left over."""

    number: int
    parts: tuple[Part, ...]
    is_pair: bool
    is_whole: bool = False  # is all of both tensors kept, for the device?
    sums: Sums | None = None
    unfinished: int = 0  # parts

    def begin(self, settings: Settings) -> None:
        """Make what the results are collected in."""
        self.unfinished = len(self.parts)
        allocate = settings.allocate if self.is_whole else ordinary_memory
        for part in self.parts:
            if part.is_hashed:
                part.hash = hashlib.sha256()
            if part.keeps:
                part.kept = allocate(part.keeps)
        if self.is_pair:
            self.sums = settings.make_sums(self.parts[0].tensor.dtype, self.parts[1].tensor.dtype)

    @property
    def keeps(self) -> int:
        """Bytes that are kept of its tensors."""
        return sum(part.keeps for part in self.parts)

    def steps(self, piece: int) -> list[int]:
        """Bytes of the pieces of each part, `piece` at most: the same number of elements if they are compared."""
        if not self.is_pair:
            return [piece] * len(self.parts)
        sizes = [ITEM_SIZES[part.tensor.dtype] for part in self.parts]
        elements = piece // max(sizes) // BLOCK * BLOCK
        return [elements * size for size in sizes]


class JobQueue:
    """Jobs in their order. All tracks take from it, as long as there is room for what a job keeps of its tensors.

    `room`: bytes that begun jobs may keep until they are handed on, together; a single job may always keep what it
    needs. Since jobs are begun in their order, the one that is waited for never waits for room itself.
    """

    def __init__(self, jobs: Iterable[Job], room: int) -> None:
        self._jobs = deque(jobs)
        self._room = room
        self._kept = 0
        self._lock = threading.Lock()

    @property
    def is_empty(self) -> bool:
        """Were all jobs taken?"""
        return not self._jobs

    def take(self) -> Job | None:
        """The next job; None if there is no room for it now, or none is left."""
        with self._lock:
            if not self._jobs or (self._kept and self._kept + self._jobs[0].keeps > self._room):
                return None
            job = self._jobs.popleft()
            self._kept += job.keeps
            return job

    def hand_on(self, job: Job) -> None:
        """What the job kept is somebody else's now."""
        with self._lock:
            self._kept -= job.keeps
