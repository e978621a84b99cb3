"""What a pass runs on: rings of buffers that are read into, and threads that hash and compare what they hold."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from checks.streaming.job import Job, JobQueue, Part, Settings
from checks.streaming.reader import PageBuffer, TensorReader

# Bytes [start, stop) of a part's shard.
Range: TypeAlias = tuple[Job, Part, int, int]


class Stopped(Exception):
    """The pass was given up; the thread that gets this ends."""


@dataclass(slots=True, eq=False)
class Piece:
    """Bytes [start, stop) of a part's shard, and the buffer for them. `data` is None until they are read."""

    job: Job
    part: Part
    start: int
    stop: int
    buffer: PageBuffer
    data: memoryview | None = None

    @property
    def is_last(self) -> bool:
        """Does no piece of the tensor follow?"""
        return self.stop == self.part.tensor.stop

    def read(self, readers: Sequence[TensorReader]) -> memoryview:
        """The bytes, read now if they were not before. Raises CheckpointUnavailable."""
        if self.data is None:
            self.data = readers[self.part.side].read(self.part.tensor, self.start, self.stop, self.buffer)
        return self.data


class Ring:
    """Hands out pieces in order, and never more than there are buffers.

    With reading ahead (by threads that run `read_ahead`) a piece is read before it is asked for, as many at a time as
    there are such threads. Without, whoever takes a piece reads it: then it is in that core's cache.
    `ranges`: what to read; None where nothing is to be read until `wake` is called. `lock` guards the ring: take,
    give_back, wake and stop are called with it held. `changed`, a condition of that lock, is notified when there may be
    a piece to take, or never one again.
    """

    def __init__(
        self,
        ranges: Iterator[Range | None],
        settings: Settings,
        lock: threading.Lock,
        changed: threading.Condition,
    ) -> None:
        self._ranges = ranges
        self._free = [PageBuffer(settings.piece, settings.allocate) for _ in range(settings.buffers)]
        self._readers = settings.readers
        self._reads_ahead = settings.reads_ahead
        self._changed = changed
        self._space = threading.Condition(lock)
        self._ahead: deque[Piece] = deque()  # being read or read, and not taken
        self._is_exhausted = False
        self._is_stopped = False

    @property
    def is_empty(self) -> bool:
        """Were all pieces taken?"""
        return self._is_exhausted and not self._ahead

    def take(self) -> Piece | None:
        """The next piece; None if it is not read yet, no buffer is free, or none is left."""
        if not self._reads_ahead:
            return self._claim()
        if self._ahead and self._ahead[0].data is not None:
            return self._ahead.popleft()
        return None

    def give_back(self, piece: Piece) -> None:
        """The piece's buffer may be used again."""
        piece.data = None
        self._free.append(piece.buffer)
        if self._reads_ahead:
            self._space.notify()
        else:
            self._changed.notify_all()

    def wake(self) -> None:
        """There may be something to read again."""
        self._space.notify_all()
        self._changed.notify_all()

    def stop(self) -> None:
        """Hand out nothing more; the threads that read ahead end."""
        self._is_stopped = True
        self.wake()

    def read_ahead(self) -> None:
        """Read piece after piece, as buffers become free, until there are no more. Raises CheckpointUnavailable."""
        while True:
            with self._space:
                while (piece := self._claim()) is None:
                    if self._is_exhausted or self._is_stopped:
                        return
                    self._space.wait()
                self._ahead.append(piece)
            piece.read(self._readers)
            with self._changed:
                self._changed.notify_all()

    def _claim(self) -> Piece | None:
        """A buffer for the next piece, if there are both."""
        if self._is_stopped or self._is_exhausted or not self._free:
            return None
        try:
            following = next(self._ranges)
        except StopIteration:
            self._is_exhausted = True
            self.wake()
            return None
        return Piece(*following, self._free.pop()) if following else None


class Track:
    """Works on one job after another with two threads, each of which reads and hashes one part of it.

    Tracks take jobs from one queue, so that any number of cores has work. Pieces of a pair are compared in their order,
    by one thread at a time: the one that is ahead of the other, or has nothing else to do.
    `report` is called, from these threads, with each finished job, and with what went wrong.
    """

    def __init__(self, jobs: JobQueue, report: Callable[[Job | BaseException], None], settings: Settings) -> None:
        self._queue = jobs
        self._report = report
        self._settings = settings
        lock = threading.Lock()
        self._changed = threading.Condition(lock)
        self._jobs: list[deque[Job]] = [deque(), deque()]  # begun, and not yet by this lane
        self._is_stopped = False
        self._rings = [Ring(self._ranges(lane), settings, lock, self._changed) for lane in (0, 1)]
        # Pieces of pairs that are read and hashed: how many on each lane; without counterpart yet; and with.
        self._ready = [0, 0]
        self._waiting: list[deque[Piece]] = [deque(), deque()]
        self._matches: deque[tuple[Piece, Piece]] = deque()
        self._is_comparing = False
        works: list[Callable[[], None]] = [lambda: self._work(0), lambda: self._work(1)]
        if settings.reads_ahead:
            works += [ring.read_ahead for ring in self._rings for _ in range(settings.buffers)]
        self._threads = [threading.Thread(target=self._guarded, args=(work,), daemon=True) for work in works]

    def start(self) -> None:
        """Start the threads."""
        for thread in self._threads:
            thread.start()

    def wake(self) -> None:
        """There may be room for another job."""
        with self._changed:
            for ring in self._rings:
                ring.wake()

    def stop(self) -> None:
        """Let the threads end, once the reads that are under way return."""
        with self._changed:
            self._is_stopped = True
            for ring in self._rings:
                ring.stop()

    def join(self) -> None:
        """Wait until the threads have ended."""
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Stopped:
            pass
        except BaseException as error:  # noqa: BLE001 - whatever it is, the thread that started the pass raises it
            self._report(error)

    def _ranges(self, lane: int) -> Iterator[Range | None]:
        """The pieces of one lane, job after job; None while there is no room for a job. Runs with `changed` held."""
        while (job := self._following_job(lane)) is not None or not self._queue.is_empty:
            if job is None:
                yield None
            elif lane < len(job.parts):
                part, step = job.parts[lane], job.steps(self._settings.piece)[lane]
                tensor = part.tensor
                # An empty tensor is one empty piece.
                for start in range(tensor.start, max(tensor.stop, tensor.start + 1), step):
                    yield job, part, start, min(start + step, tensor.stop)

    def _following_job(self, lane: int) -> Job | None:
        """The lane's next job: the one that the other lane has begun already, or a new one from the queue."""
        if not self._jobs[lane]:
            job = self._queue.take()
            if job is None:
                return None
            job.begin(self._settings)
            for jobs in self._jobs:
                jobs.append(job)
        return self._jobs[lane].popleft()

    def _work(self, lane: int) -> None:
        """Do what there is to do until all is done. Raises Stopped, CheckpointUnavailable."""
        while (step := self._next(lane)) is not None:
            if isinstance(step, Piece):
                self._hash(lane, step)
            else:
                self._compare(*step)

    def _next(self, lane: int) -> Piece | tuple[Piece, Piece] | None:
        """A piece to hash, or two to compare; None when all is done."""
        with self._changed:
            while not self._is_stopped:
                may_compare = bool(self._matches) and not self._is_comparing
                is_behind = self._ready[lane] < self._ready[1 - lane]
                piece = None if may_compare and not is_behind else self._rings[lane].take()
                if piece is not None:
                    return piece
                if may_compare:
                    self._is_comparing = True
                    return self._matches.popleft()
                if all(ring.is_empty for ring in self._rings):
                    return None
                self._changed.wait()
        raise Stopped

    def _hash(self, lane: int, piece: Piece) -> None:
        piece.part.take(piece.start, piece.read(self._settings.readers))
        with self._changed:
            if not piece.job.is_pair:
                self._rings[lane].give_back(piece)
                if piece.is_last:
                    self._finish(piece.job)
                return
            self._ready[lane] += 1
            self._waiting[lane].append(piece)
            if all(self._waiting):
                self._matches.append((self._waiting[0].popleft(), self._waiting[1].popleft()))
                self._changed.notify_all()

    def _compare(self, ours: Piece, theirs: Piece) -> None:
        job, readers = ours.job, self._settings.readers
        if job.sums is not None:
            job.sums.add(ours.read(readers), theirs.read(readers))
        with self._changed:
            self._is_comparing = False
            self._changed.notify_all()
            for ring, piece in zip(self._rings, (ours, theirs), strict=True):
                ring.give_back(piece)
            if ours.is_last:
                self._finish(job, parts=2)

    def _finish(self, job: Job, parts: int = 1) -> None:
        job.unfinished -= parts
        if not job.unfinished:
            self._report(job)
