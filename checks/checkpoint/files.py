"""The files of one checkpoint, wherever they lie: its index, the source of its bytes, and its small files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.index import ByteSource, CheckpointIndex, is_plain_file_name, shown
from checks.checkpoint.local import LocalSource, read_local_index

CONFIG_NAME = "config.json"

# Bytes of a small file (a tokenizer, a configuration), unless its reader expects more.
LARGEST_SMALL_FILE = 25_000_000


class CheckpointFiles(Protocol):
    """What a checkpoint is opened from."""

    @property
    def where(self) -> str:
        """The directory, or the repository and its commit, for people."""

    @property
    def provenance(self) -> Mapping[str, str]:
        """What a record says of where the weights were read; nothing for a directory, whose digest says it all."""

    def index(self) -> CheckpointIndex:
        """What the checkpoint holds, from headers alone. Raises CheckpointUnavailable."""

    def source(self) -> ByteSource:
        """Where the bytes of the shards come from. Raises CheckpointUnavailable."""

    def small_file(self, name: str, largest: int = LARGEST_SMALL_FILE) -> bytes | None:
        """A small file beside the weights; None if there is none. Raises CheckpointUnavailable."""

    def config(self) -> bytes | None:
        """The model's config.json, for the names and shapes of its tensors; None if there is none.

        Raises CheckpointUnavailable.
        """


class LocalFiles:
    """The files of a directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @property
    def where(self) -> str:
        """The directory."""
        return str(self.directory)

    @property
    def provenance(self) -> Mapping[str, str]:
        """Nothing: a path says nothing on another machine."""
        return {}

    def index(self) -> CheckpointIndex:
        """See CheckpointFiles."""
        try:
            return read_local_index(self.directory)
        except OSError as error:
            # A name that no file system has, a directory without permission.
            raise CheckpointUnavailable(f"{self.directory}: cannot be read ({error})") from error

    def source(self) -> ByteSource:
        """See CheckpointFiles."""
        return local_source(self.directory)

    def small_file(self, name: str, largest: int = LARGEST_SMALL_FILE) -> bytes | None:
        """See CheckpointFiles."""
        return read_local_file(self.directory, checked_name(name, self.where), largest)

    def config(self) -> bytes | None:
        """See CheckpointFiles."""
        return self.small_file(CONFIG_NAME)


def local_source(directory: Path) -> LocalSource:
    """The source of the bytes of a directory's shards, which goes past the page cache where that is faster."""
    from checks.streaming.reader import DirectSource

    return DirectSource(directory)


def read_local_file(directory: Path, name: str, largest: int) -> bytes | None:
    """A small file of a directory; None if there is none. Links out of the directory are refused, see local.py.

    Raises CheckpointUnavailable for a directory that is missing, and a file that is too large or cannot be read.
    """
    path = directory / name
    try:
        if not directory.is_dir():
            raise CheckpointUnavailable(f"{directory}: no such directory; correct the path in the claim")
        size = path.stat().st_size
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointUnavailable(f"{path}: cannot be read ({error.strerror}); make it readable") from error
    if size > largest:
        raise CheckpointUnavailable(f"{path}: has {size} bytes, expected {largest} at most; download it again")
    buffer = bytearray(size)
    source = LocalSource(directory)
    try:
        source.read_into(name, 0, memoryview(buffer))
    finally:
        source.close()
    return bytes(buffer)


def checked_name(name: str, where: str) -> str:
    """The name of a file beside the weights. Raises CheckpointUnavailable for one that leads elsewhere."""
    if not is_plain_file_name(name):
        raise CheckpointUnavailable(
            f"{where}: {shown(name)} is no plain file name; expected a file in the checkpoint's own directory"
        )
    return name
