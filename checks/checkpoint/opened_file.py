"""One file of this disk that stays the very file that was opened, whatever its name leads to later."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.local import LocalSource


class OpenedFile:
    """A file, opened with the care for links that every file of a checkpoint gets. It is closed with this object.

    `state`: of the file when it was opened. Raises CheckpointUnavailable if it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._source = LocalSource(path.parent)
        self._descriptor = self._source.descriptor(path.name)
        self.state = os.fstat(self._descriptor)

    @contextmanager
    def binary(self) -> Iterator[BinaryIO]:
        """The file from its beginning, for one reader at a time."""
        with os.fdopen(os.dup(self._descriptor), "rb") as file:
            file.seek(0)
            yield file

    def require_whole(self) -> None:
        """Is none of it cut off? Whoever reads a mapped file beyond its end is killed. Raises CheckpointUnavailable."""
        size = os.fstat(self._descriptor).st_size
        if size != self.state.st_size:
            raise CheckpointUnavailable(
                f"{self.path}: has {size} bytes, {self.state.st_size} when it was opened: changed while it was read; "
                "run again"
            )
