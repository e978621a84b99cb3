"""The bytes that a plan reads, and no others; from a hub each of them once, in few large requests."""

from __future__ import annotations

import os
import tempfile
import threading
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import IO, NamedTuple

from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.index import ByteSource, CheckpointIndex
from checks.streaming.read_plan import LARGEST_RANGE, TensorRead, byte_ranges, item_size
from checks.streaming.reader import PageBuffer, PageSource

Range = tuple[int, int]

# Requests for one read that are in flight at a time, of LARGEST_RANGE bytes at most each.
REQUESTS = 8
# Ranges so few bytes apart become one request: its header lines alone would be as many.
GAP = 1 << 10
# Of rows of one tensor, of at most so many bytes each, so many bytes are fetched at a time, since whoever asks for one
# of them asks for the next: they take longer to ask for than to send.
SMALL_RUN, AHEAD = 1 << 20, 16 << 20


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
    Several ranges that a read takes are fetched at a time.
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


class _Run(NamedTuple):
    """A run of elements of a tensor in its shard, such as rows of a table."""

    start: int
    stop: int
    tensor: str


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
        self._runs = _small_runs(index, reads)
        self._in_flight = threading.BoundedSemaphore(REQUESTS)
        self._lock = threading.Lock()
        self._changed = threading.Condition()  # guards the next two
        self._fetching: set[tuple[str, Range]] = set()
        self._kept: set[tuple[str, Range]] = set()
        self._files: dict[str, IO[bytes]] = {}

    def read_into(self, shard: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of `shard` from `start`. Raises NotPlanned, or CheckpointUnavailable."""
        wanted = self._check(shard, start, start + buffer.nbytes)
        while claimed := self._claim(shard, wanted, (start, start + buffer.nbytes)):
            try:
                failure = self._fetch(shard, claimed)
            finally:
                with self._changed:
                    self._fetching.difference_update((shard, one) for one in claimed)
                    is_kept = self._kept.issuperset((shard, one) for one in wanted)
                    self._changed.notify_all()
            # A failure that concerns none of the wanted ranges is left to whoever wants those.
            if failure is not None and not is_kept:
                raise failure
        view, done = buffer.cast("B") if buffer.nbytes else buffer, 0
        while done < buffer.nbytes:
            count = os.preadv(self._file(shard).fileno(), [view[done:]], start + done)
            if count == 0:
                raise CheckpointUnavailable(f"{self._origin}/{shard}: its temporary file was cut; run again")
            done += count

    def close(self) -> None:
        """Remove the temporary files."""
        with self._changed:
            self._kept.clear()
        with self._lock:
            while self._files:
                self._files.popitem()[1].close()

    def _claim(self, shard: str, wanted: Sequence[Range], asked: Range) -> list[Range]:
        """The ranges that this thread is to fetch, in order; none once all that is wanted is kept. Waits for those that
        other threads are fetching.
        """
        with self._changed:
            while missing := [one for one in wanted if (shard, one) not in self._kept]:
                if not all((shard, one) in self._fetching for one in missing):
                    found = {(shard, one) for one in (*missing, *self._ahead(shard, asked))}
                    claimed = found - self._fetching - self._kept
                    self._fetching |= claimed
                    return sorted(one for _, one in claimed)
                self._changed.wait()
            return []

    def _ahead(self, shard: str, asked: Range) -> Iterator[Range]:
        """The planned ranges of the runs that follow the one that is asked for, in the same tensor."""
        runs = self._runs.get(shard, [])
        place = bisect_right(runs, asked[0], key=lambda run: run.start) - 1
        if place < 0 or asked[1] > runs[place].stop:
            return
        left = AHEAD
        for run in runs[place:]:
            left -= run.stop - run.start
            if left < 0 or run.tensor != runs[place].tensor:
                return
            yield from self._check(shard, run.start, run.stop)

    def _fetch(self, shard: str, ranges: Sequence[Range]) -> CheckpointUnavailable | None:
        """Fetch and keep ranges, several at a time; what failed first in their order. Then no further one is begun."""
        requests = list(_requests(ranges))
        if len(requests) == 1:
            try:
                self._receive(shard, requests[0])
            except CheckpointUnavailable as error:
                return error
            return None

        def receive(request: Sequence[Range]) -> None:
            with self._in_flight:
                self._receive(shard, request)

        with ThreadPoolExecutor(min(REQUESTS, len(requests))) as pool:
            begun = [pool.submit(receive, request) for request in requests]
            try:
                wait(begun, return_when=FIRST_EXCEPTION)
            finally:
                for one in begun:
                    one.cancel()
        failures = [one.exception() for one in begun if not one.cancelled()]
        failure = next((one for one in failures if one is not None), None)
        if failure is None or isinstance(failure, CheckpointUnavailable):
            return failure
        raise failure

    def _receive(self, shard: str, request: Sequence[Range]) -> None:
        """Fetch ranges by one request, with what is between them, and keep them."""
        first = request[0][0]
        received = memoryview(bytearray(request[-1][1] - first))
        self._source.read_into(shard, first, received)
        for start, stop in request:
            self._write(shard, start, received[start - first : stop - first])
        with self._changed:
            self._kept.update((shard, one) for one in request)
            self._changed.notify_all()

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


def _small_runs(index: CheckpointIndex, reads: Mapping[str, TensorRead]) -> Mapping[str, list[_Run]]:
    """The runs of at most SMALL_RUN bytes, by shard, in order."""
    found: dict[str, list[_Run]] = defaultdict(list)
    for name, read in reads.items():
        tensor, size = index.tensors[name], item_size(index.tensors[name])
        for first, last in read.runs:
            if size is not None and 0 < (last - first) * size <= SMALL_RUN:
                found[tensor.shard].append(_Run(tensor.start + first * size, tensor.start + last * size, name))
    return {shard: sorted(runs) for shard, runs in found.items()}


def _requests(ranges: Iterable[Range]) -> Iterator[list[Range]]:
    """Ranges in order, near ones together, as requests of at most LARGEST_RANGE bytes."""
    request: list[Range] = []
    for one in ranges:
        if request and (one[0] > request[-1][1] + GAP or one[1] > request[0][0] + LARGEST_RANGE):
            yield request
            request = []
        request.append(one)
    if request:
        yield request
