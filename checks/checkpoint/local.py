"""A checkpoint on this disk: its index from the headers, and its bytes by pread.

A shard is a regular file in the checkpoint's directory, or a symbolic link to one in it. A link that leaves the
directory is followed in one case: in a snapshot of the hub cache, to that repository's blobs or to the blobs that the
cache shares between repositories. Whoever packs a checkpoint could otherwise have any file of this machine opened.
"""

from __future__ import annotations

import hashlib
import os
import stat
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path

from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.header import parse_header, read_header
from checks.checkpoint.index import (
    INDEX_NAME,
    LARGEST_JSON,
    CheckpointIndex,
    Shard,
    TensorInfo,
    build_index,
    shards_of_weight_map,
    shards_without_index,
    shown,
)

SINGLE_NAME = "model.safetensors"
ADAPTER_NAME = "adapter_model.safetensors"
SNAPSHOTS = "snapshots"
BLOBS = "blobs"


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """What tells that a local file is still the one that was measured, without reading it."""

    size: int  # bytes
    modified: int  # nanoseconds since the epoch
    inode: int
    header_sha256: str

    @property
    def key(self) -> str:
        """The identity as one hex digest, for a store."""
        return hashlib.sha256(repr(astuple(self)).encode()).hexdigest()


def read_local_index(directory: Path) -> CheckpointIndex:
    """What does the checkpoint in a directory hold? Reads headers only.

    One model.safetensors.index.json with its shards, one model.safetensors, or all .safetensors files there are.
    Raises CheckpointUnavailable for a directory that is missing, holds no safetensors, or contradicts itself.
    """
    if not directory.is_dir():
        raise CheckpointUnavailable(f"{directory}: no such directory; correct the path in the claim")
    try:
        names = sorted(path.name for path in directory.iterdir() if not path.is_dir())
    except OSError as error:
        raise CheckpointUnavailable(f"{directory}: cannot be listed ({error.strerror}); make it readable") from error
    if INDEX_NAME in names and SINGLE_NAME in names:
        raise CheckpointUnavailable(
            f"{directory}: holds both {SINGLE_NAME} and {INDEX_NAME}, which may be two models; remove the "
            "one that is not loaded"
        )
    if ADAPTER_NAME in names:
        raise CheckpointUnavailable(
            f"{directory / ADAPTER_NAME}: an adapter changes the weights beside it; merge it into them first"
        )
    if INDEX_NAME in names:
        listed = shards_of_weight_map(_read_file(directory, INDEX_NAME), str(directory / INDEX_NAME))
        for name in listed:
            if name not in names:
                raise CheckpointUnavailable(f"{directory / INDEX_NAME}: lists {name}, which is absent; download it")
    else:
        listed = shards_without_index(names, str(directory))
    return build_index(str(directory), [_read_shard(directory, name) for name in listed], listed, directory=directory)


def file_identity(directory: Path, shard: str) -> FileIdentity:
    """Which file is this shard now? Raises CheckpointUnavailable when its header cannot be read."""
    with _opened(directory, shard) as descriptor:
        state = os.fstat(descriptor)
        header = _read_header(descriptor, state.st_size, directory, shard)
        return FileIdentity(state.st_size, state.st_mtime_ns, state.st_ino, hashlib.sha256(header).hexdigest())


class LocalSource:
    """Reads the shards of one directory. Threads may share it; each file is opened once, on its first read."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._lock = threading.Lock()
        self._descriptors: dict[str, int] = {}
        self._close = weakref.finalize(self, close_all, self._descriptors)

    def read_into(self, shard: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of `shard` from `start`. Raises CheckpointUnavailable when that fails."""
        if start < 0:  # preadv would read from wherever the file stands
            raise CheckpointUnavailable(f"{self.directory / shard}: is asked for byte {start}; read its index again")
        _fill(self.descriptor(shard), start, buffer, self.directory / shard)

    def close(self) -> None:
        """Close all files. A later read raises CheckpointUnavailable."""
        self._close()

    def descriptor(self, shard: str) -> int:
        """The open file of a shard. Raises CheckpointUnavailable when it cannot be opened."""
        with self._lock:
            if not self._close.alive:
                raise CheckpointUnavailable(f"{self.directory / shard}: is read after its source was closed")
            if shard not in self._descriptors:
                self._descriptors[shard] = _open(self.directory, shard)
            return self._descriptors[shard]


def close_all(descriptors: dict[str, int]) -> None:
    """Close files, and forget them."""
    while descriptors:
        os.close(descriptors.popitem()[1])


def _read_shard(directory: Path, name: str) -> tuple[Shard, list[TensorInfo]]:
    with _opened(directory, name) as descriptor:
        size = os.fstat(descriptor).st_size
        header = _read_header(descriptor, size, directory, name)
    return Shard(name, size), parse_header(header, size, name, str(directory / name))


def _read_header(descriptor: int, size: int, directory: Path, name: str) -> bytes:
    def read(start: int, stop: int) -> bytes:
        buffer = bytearray(stop - start)
        _fill(descriptor, start, memoryview(buffer), directory / name)
        return bytes(buffer)

    return read_header(read, size, name, str(directory / name))


def _read_file(directory: Path, name: str) -> bytes:
    with _opened(directory, name) as descriptor:
        size = os.fstat(descriptor).st_size
        if size > LARGEST_JSON:
            raise CheckpointUnavailable(
                f"{directory / name}: has {size} bytes, expected at most {LARGEST_JSON}; download it again"
            )
        buffer = bytearray(size)
        _fill(descriptor, 0, memoryview(buffer), directory / name)
    return bytes(buffer)


def _fill(descriptor: int, start: int, buffer: memoryview, path: Path) -> None:
    done, size = 0, buffer.nbytes
    view = buffer.cast("B") if size else buffer
    while done < size:
        try:
            count = os.preadv(descriptor, [view[done:]], start + done)
        except OSError as error:
            raise CheckpointUnavailable(
                f"{path}: cannot be read at byte {start + done} ({error.strerror}); check the disk, or download the "
                "file again"
            ) from error
        if count == 0:
            raise CheckpointUnavailable(
                f"{path}: ends at byte {start + done}, expected bytes up to {start + size}; the file was cut or "
                "changed: download it again"
            )
        done += count


@contextmanager
def _opened(directory: Path, name: str) -> Iterator[int]:
    descriptor = _open(directory, name)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _open(directory: Path, name: str) -> int:
    path = directory / name
    try:
        # Resolved before it is opened, and the resolved path opened without following a link: what was checked is read.
        target = path.resolve(strict=True)
        _refuse_stray_link(path, target)
        descriptor = os.open(target, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointUnavailable(f"{path}: cannot be opened ({error}); download it, or make it readable") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointUnavailable(f"{path}: is no regular file; put the weights themselves there")
    return descriptor


def _refuse_stray_link(path: Path, target: Path) -> None:
    directory = path.parent.resolve(strict=True)
    allowed = [directory]
    for parent in directory.parents:
        if parent.name == SNAPSHOTS:  # <cache>/models--org--name/snapshots/<sha>/… → …/blobs, <cache>/blobs
            allowed += [parent.parent / BLOBS, parent.parent.parent / BLOBS]
            break
    if not any(target.is_relative_to(place) for place in allowed):
        raise CheckpointUnavailable(
            f"{path}: links to {shown(str(target))}, outside its directory; put the file itself there, or name the "
            "directory that holds it"
        )
