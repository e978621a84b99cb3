"""The bytes that a plan reads, and no others; from a hub each of them once, in few large requests."""

from __future__ import annotations

import os
import tempfile
import threading
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.index import ByteSource, CheckpointIndex
from checks.streaming.read_plan import TensorRead, byte_ranges
from checks.streaming.reader import PageBuffer, PageSource

Range = tuple[int, int]


class NotPlanned(CheckpointUnavailable):
    """Bytes were asked for that this run does not read. Whoever asks has to do without, and to say so."""


def planned_source(
    source: ByteSource,
    index: CheckpointIndex,
    reads: Mapping[str, TensorRead],
    *,
    keep: bool,
    directory: Path | None = None,
) -> PlannedSource:
    """A source of the planned bytes of a checkpoint. A read of any other byte raises NotPlanned.

    `keep`: for a hub; what was received goes to temporary files in `directory` (default: that of the system), as large
    as what is read, so that whatever asks again costs no transfer. They are gone with the process, however it ends.
    """
    if isinstance(source, PageSource) and not keep:
        return _PlannedPages(source, index, reads)
    return _KeptSource(source, index, reads, directory) if keep else PlannedSource(source, index, reads)


class PlannedSource:
    """Reads planned bytes only. Threads may share it."""

    def __init__(self, source: ByteSource, index: CheckpointIndex, reads: Mapping[str, TensorRead]) -> None:
        self._source = source
        self._origin = index.origin
        self._ranges: dict[str, list[Range]] = defaultdict(list)
        for shard, start, stop in byte_ranges(index, reads):
            self._ranges[shard].append((start, stop))

    def read_into(self, shard: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of `shard` from `start`. Raises NotPlanned, or CheckpointUnavailable."""
        self._check(shard, start, start + buffer.nbytes)
        self._source.read_into(shard, start, buffer)

    def close(self) -> None:
        """Let go of temporary files; the source itself stays open."""

    def _check(self, shard: str, start: int, stop: int) -> list[Range]:
        """The planned ranges that hold these bytes."""
        found = []
        done = start
        for one in self._from(shard, start):
            if done >= stop or one[0] > done:
                break
            found.append(one)
            done = one[1]
        if done < stop:
            raise NotPlanned(
                f"{self._origin}/{shard}: bytes {start} to {stop} are not read in this run; read more with a larger "
                "--budget, or all with --read full"
            )
        return found

    def _from(self, shard: str, start: int) -> Iterator[Range]:
        """Planned ranges in order, from the one that holds `start`."""
        ranges = self._ranges.get(shard, [])
        first = bisect_right(ranges, start, key=lambda one: one[1])
        return (ranges[place] for place in range(first, len(ranges)))


class _PlannedPages(PlannedSource):
    """Of a source that knows pages."""

    def __init__(self, source: PageSource, index: CheckpointIndex, reads: Mapping[str, TensorRead]) -> None:
        super().__init__(source, index, reads)
        self._pages = source

    def read_pages(self, shard: str, start: int, stop: int, buffer: PageBuffer) -> None:
        """See PageSource. Raises NotPlanned."""
        self._check(shard, start, stop)
        self._pages.read_pages(shard, start, stop, buffer)

    def is_cached(self, shard: str) -> bool:
        """See PageSource."""
        return self._pages.is_cached(shard)


class _KeptSource(PlannedSource):
    """Fetches each planned range as a whole when a byte of it is first asked for, and keeps it in a file with holes."""

    def __init__(
        self,
        source: ByteSource,
        index: CheckpointIndex,
        reads: Mapping[str, TensorRead],
        directory: Path | None,
    ) -> None:
        super().__init__(source, index, reads)
        self._directory = directory
        self._lock = threading.Lock()
        self._fetching: dict[tuple[str, Range], threading.Lock] = {}
        self._kept: set[tuple[str, Range]] = set()
        self._files: dict[str, IO[bytes]] = {}

    def read_into(self, shard: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of `shard` from `start`. Raises NotPlanned, or CheckpointUnavailable."""
        for one in self._check(shard, start, start + buffer.nbytes):
            self._fetch(shard, one)
        view, done = buffer.cast("B") if buffer.nbytes else buffer, 0
        while done < buffer.nbytes:
            count = os.preadv(self._file(shard).fileno(), [view[done:]], start + done)
            if count == 0:
                raise CheckpointUnavailable(f"{self._origin}/{shard}: its temporary file was cut; run again")
            done += count

    def close(self) -> None:
        """Remove the temporary files."""
        with self._lock:
            self._kept.clear()
            while self._files:
                self._files.popitem()[1].close()

    def _fetch(self, shard: str, one: Range) -> None:
        with self._lock:
            if (shard, one) in self._kept:
                return
            lock = self._fetching.setdefault((shard, one), threading.Lock())
        with lock:
            if (shard, one) in self._kept:
                return
            received = memoryview(bytearray(one[1] - one[0]))
            self._source.read_into(shard, one[0], received)
            self._write(shard, one[0], received)
            with self._lock:
                self._kept.add((shard, one))
                del self._fetching[shard, one]

    def _write(self, shard: str, start: int, received: memoryview) -> None:
        done = 0
        try:
            while done < len(received):
                done += os.pwrite(self._file(shard).fileno(), received[done:], start + done)
        except OSError as error:
            place = self._directory or tempfile.gettempdir()
            raise CheckpointUnavailable(
                f"{self._origin}/{shard}: what was received cannot be kept in {place} ({error.strerror}); make room, "
                "or set TMPDIR to a directory that has it"
            ) from error

    def _file(self, shard: str) -> IO[bytes]:
        with self._lock:
            if shard not in self._files:
                # Without a name, so that it goes with the process. Opened here and closed by `close`.
                self._files[shard] = tempfile.TemporaryFile(dir=self._directory)  # noqa: SIM115
            return self._files[shard]
