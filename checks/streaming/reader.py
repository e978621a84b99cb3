"""Reading byte ranges of shards into memory that is used again and again, past the page cache where that is faster."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.index import ByteSource, CheckpointIndex, TensorInfo, shown
from checks.checkpoint.local import LocalSource, close_all

# Direct reads move whole pages: file offset, length and address are multiples of this many bytes.
PAGE = 4096

# A shard counts as cached if this share of the probed pages is in the page cache.
PROBES = 64
CACHED_SHARE = 0.95

Allocate = Callable[[int], npt.NDArray[np.uint8]]


def page_floor(offset: int) -> int:
    """The last multiple of PAGE that is not above `offset`."""
    return offset // PAGE * PAGE


def page_ceiling(offset: int) -> int:
    """The first multiple of PAGE that is not below `offset`."""
    return -(-offset // PAGE) * PAGE


def ordinary_memory(size: int) -> npt.NDArray[np.uint8]:
    """Memory of `size` bytes. The CUDA path brings its own, pinned."""
    return np.empty(size, np.uint8)


class PageBuffer:
    """Memory for up to `size` bytes of a file, which stand in it as they stand in the file's pages."""

    def __init__(self, size: int, allocate: Allocate = ordinary_memory) -> None:
        memory = allocate(self.footprint(size))
        unaligned = -memory.ctypes.data % PAGE
        self.pages = memory[unaligned : unaligned + memory.size - PAGE].data

    @staticmethod
    def footprint(size: int) -> int:
        """Bytes that a buffer for `size` bytes takes."""
        return page_ceiling(size) + 2 * PAGE

    def place(self, start: int, stop: int) -> memoryview:
        """Where the bytes [start, stop) of a file stand. Raises ValueError if there is no room for them."""
        first = start % PAGE
        if first + stop - start > len(self.pages):
            raise ValueError(f"bytes {start} to {stop} do not fit into {len(self.pages)} bytes of pages")
        return self.pages[first : first + stop - start]

    def pages_of(self, start: int, stop: int) -> memoryview:
        """The whole pages that the bytes [start, stop) of a file touch."""
        return self.pages[: page_ceiling(stop) - page_floor(start)]

    def after(self, pages: int) -> PageBuffer:
        """The same memory without its first `pages` pages, which are left to others."""
        rest = PageBuffer.__new__(PageBuffer)
        rest.pages = self.pages[pages * PAGE :]
        return rest


@runtime_checkable
class PageSource(ByteSource, Protocol):
    """A ByteSource that can also read into a PageBuffer, and knows what it reads without waiting."""

    def read_pages(self, shard: str, start: int, stop: int, buffer: PageBuffer) -> None:
        """Put the bytes [start, stop) of `shard` where `buffer.place(start, stop)` is; may also write the rest of the
        pages that they touch. Raises CheckpointUnavailable when that fails.
        """

    def is_cached(self, shard: str) -> bool:
        """Can the shard be read from memory, without waiting for a disk? Raises CheckpointUnavailable."""


class TensorReader:
    """Reads tensors of one checkpoint piece by piece."""

    def __init__(self, index: CheckpointIndex, source: ByteSource) -> None:
        self._origin = index.origin
        self._source = source
        self._pages = source if isinstance(source, PageSource) else None

    def read(self, tensor: TensorInfo, start: int, stop: int, buffer: PageBuffer) -> memoryview:
        """Bytes [start, stop) of the tensor's shard.

        Raises CheckpointUnavailable, of the kind that the source raised, which names shard and tensor.
        """
        view = buffer.place(start, stop)
        if start == stop:
            return view
        try:
            if self._pages is None:
                self._source.read_into(tensor.shard, start, view)
            else:
                self._pages.read_pages(tensor.shard, start, stop, buffer)
        except (CheckpointUnavailable, OSError, EOFError) as error:
            kind = type(error) if isinstance(error, CheckpointUnavailable) else CheckpointUnavailable
            raise kind(
                f"{self._origin}: {tensor.shard}, tensor {shown(tensor.name)}, bytes {start} to {stop}: {error}"
            ) from error
        return view

    def is_cached(self, shards: Iterable[str]) -> bool:
        """Can all these shards be read without waiting for a disk or a network?"""
        pages = self._pages
        return pages is not None and all(pages.is_cached(shard) for shard in shards)


class DirectSource(LocalSource):
    """The shards of one directory, read past the page cache (O_DIRECT) where that is faster.

    A direct read costs a fraction of an ordinary read's CPU time, and leaves the page cache to others. `direct`: True,
    False, or None for what suits each shard: ordinary reads if the page cache holds it, else direct ones. Where the
    file system refuses direct reads, ordinary ones take their place. Threads may share it.
    """

    def __init__(self, directory: Path, direct: bool | None = None) -> None:
        super().__init__(directory)
        self._wanted = direct
        self._choices = threading.Lock()
        self._cached: dict[str, bool] = {}
        self._refused: set[str] = set()
        self._direct_descriptors: dict[str, int] = {}
        self._close_direct = weakref.finalize(self, close_all, self._direct_descriptors)

    def read_pages(self, shard: str, start: int, stop: int, buffer: PageBuffer) -> None:
        """Put the bytes [start, stop) of `shard` into their place. Raises CheckpointUnavailable when that fails."""
        descriptor = self._direct_descriptor(shard)
        if descriptor is not None:
            first = page_floor(start)
            try:
                done = _read_directly(descriptor, first, buffer.pages_of(start, stop))
            except OSError:
                self._refused.add(shard)
            else:
                if first + done >= stop:
                    return
        # Also says what is wrong with a file that cannot be read or ends too early.
        self.read_into(shard, start, buffer.place(start, stop))

    def is_cached(self, shard: str) -> bool:
        """Is the shard in the page cache, as far as 64 of its pages tell? Looked up once for each shard."""
        with self._choices:
            if shard not in self._cached:
                self._cached[shard] = cached_share(self.descriptor(shard)) >= CACHED_SHARE
            return self._cached[shard]

    def close(self) -> None:
        """Close all files. A later read raises CheckpointUnavailable."""
        super().close()
        self._close_direct()

    def _direct_descriptor(self, shard: str) -> int | None:
        """The file opened for direct reads; None if ordinary reads are better, or all there is."""
        if shard in self._refused or self._wanted is False or (self._wanted is None and self.is_cached(shard)):
            return None
        descriptor = self.descriptor(shard)
        with self._choices:
            if shard not in self._direct_descriptors:
                try:
                    # The very file that is open already, whatever its name leads to by now.
                    self._direct_descriptors[shard] = os.open(
                        f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT
                    )
                except (OSError, AttributeError):  # no such file system, no such operating system
                    self._refused.add(shard)
                    return None
            return self._direct_descriptors[shard]


def cached_share(descriptor: int) -> float:
    """Which share of a file's pages, 0 to 1, is in the page cache? Estimated from PROBES of them; reads no disk.

    0 where the operating system does not tell.
    """
    size = os.fstat(descriptor).st_size
    offsets = sorted({size * probe // PROBES for probe in range(PROBES)} | {max(0, size - 1)})
    byte = bytearray(1)
    found = 0
    for offset in offsets:
        try:
            found += os.preadv(descriptor, [byte], offset, os.RWF_NOWAIT) == 1
        except BlockingIOError:
            continue
        except (OSError, AttributeError):
            return 0.0
    return found / len(offsets)


def _read_directly(descriptor: int, start: int, pages: memoryview) -> int:
    """Fill `pages`, or stop where the file ends. Returns the bytes that arrived. Raises OSError."""
    done = 0
    while done < len(pages):
        count = os.preadv(descriptor, [pages[done:]], start + done)
        done += count
        if count == 0 or count % PAGE:
            break
    return done
