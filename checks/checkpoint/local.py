"""A checkpoint on this disk: its index from the headers, and its bytes by pread.

A shard is a regular file in the checkpoint's directory, or a symbolic link to one in it. A link that leaves the
directory is followed in one case: in a snapshot of the hub cache, to that repository's blobs or to the blobs that the
cache shares between repositories. Whoever packs a checkpoint could otherwise have any file of this machine opened.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import threading
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass, field
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

# From so many open shards on, the limit on open files is raised; and how far at most.
MANY_SHARDS = 16
OPEN_FILES = 8192


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """What tells that a local file is still the one that was measured, without reading it.

    Two files of one device and inode are one file. Whoever writes to it can set the time of its last modification back
    afterwards, but not that of its last change.
    """

    device: int
    inode: int
    size: int  # bytes
    modified: int  # nanoseconds since the epoch
    changed: int  # the same, of content or of what is known of the file: links, owner, times
    header_sha256: str

    @property
    def key(self) -> str:
        """The identity as one hex digest, for a store."""
        return hashlib.sha256(repr(astuple(self)).encode()).hexdigest()

    @classmethod
    def of(cls, state: os.stat_result, header: bytes) -> FileIdentity:
        """That of an open file, by its state when its header was read."""
        return cls(*_state(state), hashlib.sha256(header).hexdigest())

    def require(self, state: os.stat_result, path: Path) -> None:
        """Raises CheckpointUnavailable for the state of another file, or of this one after a change."""
        if (self.device, self.inode, self.size, self.modified, self.changed) != _state(state):
            raise CheckpointUnavailable(f"{path}: changed while it was read; run again")

    def require_at(self, path: Path) -> None:
        """Does the name still lead to this file, unchanged? Raises CheckpointUnavailable.

        An open file keeps its inode, so what is found under its name is the very file that is read, or another one.
        """
        try:
            state = path.stat()
        except OSError as error:
            raise CheckpointUnavailable(
                f"{path}: changed while it was read ({error.strerror}); put it back, and run again"
            ) from error
        self.require(state, path)


@dataclass(frozen=True)
class LocalIndex(CheckpointIndex):
    """The index of a checkpoint on this disk, and which files its headers were read from, by the names of shards."""

    identities: Mapping[str, FileIdentity] = field(default_factory=dict)

    def require_unchanged(self) -> None:
        """Are these still the files of the index? Raises CheckpointUnavailable if one was changed or removed."""
        for name, identity in self.identities.items():
            identity.require_at(Path(self.directory or "", name))


def read_local_index(directory: Path) -> LocalIndex:
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
    identities: dict[str, FileIdentity] = {}
    shards = [_read_shard(directory, name, identities) for name in listed]
    index = build_index(str(directory), shards, listed)
    return LocalIndex(index.origin, index.shards, index.tensors, None, directory, identities)


class LocalSource:
    """Reads the shards of one directory. Threads may share it; each file is opened once, on its first read.

    `expected`: which files these must be, by the names of shards; see LocalIndex.
    """

    def __init__(self, directory: Path, expected: Mapping[str, FileIdentity] | None = None) -> None:
        self.directory = directory
        self.expected = expected or {}
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
        """The open file of a shard. Raises CheckpointUnavailable when it cannot be opened, or is another one."""
        with self._lock:
            if not self._close.alive:
                raise CheckpointUnavailable(f"{self.directory / shard}: is read after its source was closed")
            if shard not in self._descriptors:
                if len(self._descriptors) == MANY_SHARDS:
                    allow_many_files()
                self._descriptors[shard] = self._open(shard)
            return self._descriptors[shard]

    def _open(self, shard: str) -> int:
        descriptor = _open(self.directory, shard)
        try:
            if shard in self.expected:
                self.expected[shard].require(os.fstat(descriptor), self.directory / shard)
        except CheckpointUnavailable:
            os.close(descriptor)
            raise
        return descriptor


def allow_many_files() -> None:
    """Raise this process's soft limit on open files to OPEN_FILES, or to the hard limit if that is lower.

    Often the soft limit is 1024 or 256, and a pair of models of 200 shards each takes 800 files.
    """
    try:
        import resource
    except ImportError:  # an operating system without such limits
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def close_all(descriptors: dict[str, int]) -> None:
    """Close files, and forget them."""
    while descriptors:
        os.close(descriptors.popitem()[1])


def _read_shard(directory: Path, name: str, identities: dict[str, FileIdentity]) -> tuple[Shard, list[TensorInfo]]:
    with _opened(directory, name) as descriptor:
        state = os.fstat(descriptor)
        header = _read_header(descriptor, state.st_size, directory, name)
    identities[name] = FileIdentity.of(state, header)
    return Shard(name, state.st_size), parse_header(header, state.st_size, name, str(directory / name))


def _state(state: os.stat_result) -> tuple[int, int, int, int, int]:
    """What is known of a file: the fields of a FileIdentity but the last."""
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns


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
        too_many = isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE)
        advice = "raise the limit on open files (ulimit -n)" if too_many else "download it, or make it readable"
        raise CheckpointUnavailable(f"{path}: cannot be opened ({error}); {advice}") from error
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
