"""A GGUF file in the place of a checkpoint's files: one shard of float32 values, which are dequantised when asked for.

The shard lies on no disk. Its bytes are those that a safetensors file of the dequantised weights would hold, one tensor
after the other, so that whatever reads a checkpoint reads a GGUF file.
"""

from __future__ import annotations

import json
import threading
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from checks.checkpoint.checkpoint import Checkpoint
from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.files import LARGEST_SMALL_FILE, LocalFiles, checked_name, read_local_file
from checks.checkpoint.gguf_header import HEADER_NAME, LARGEST_HEADER, gguf_header
from checks.checkpoint.index import INDEX_NAME, CheckpointIndex, Shard, TensorInfo, build_index, shown
from checks.checkpoint.local import FileIdentity
from checks.checkpoint.opened_file import OpenedFile

if TYPE_CHECKING:
    from checks.checkpoint.gguf_file import GgufFile

SUFFIX = ".gguf"
BYTES = 4  # of one float32
# Bytes of rows that are dequantised at once.
AT_ONCE = 1 << 25


def local_files(path: Path) -> LocalFiles | GgufFiles:
    """The files of a checkpoint on this disk: a directory, a GGUF file, or a directory with one and no safetensors.

    Raises CheckpointUnavailable for a directory with several GGUF files.
    """
    try:
        if path.suffix.lower() == SUFFIX and not path.is_dir():
            return GgufFiles(path)
        names = [one.name for one in path.iterdir()] if path.is_dir() else []
    except OSError:  # LocalFiles says what is wrong with it
        names = []
    found = sorted(name for name in names if name.lower().endswith(SUFFIX))
    if not found or any(name.endswith((".safetensors", INDEX_NAME)) for name in names):
        return LocalFiles(path)
    if len(found) > 1:
        raise CheckpointUnavailable(
            f"{path}: holds {len(found)} GGUF files ({shown(found[0])}, {shown(found[1])}, …); give the claim the path "
            "of one, and join the parts of a split one with `llama-gguf-split --merge`"
        )
    return GgufFiles(path / found[0], beside=path)


class GgufFiles:
    """The CheckpointFiles of one GGUF file. `beside`: the directory of its small files, if they are the model's own."""

    def __init__(self, path: Path, beside: Path | None = None) -> None:
        self.path = path
        self._beside = beside

    @property
    def where(self) -> str:
        """The file."""
        return str(self.path)

    @cached_property
    def provenance(self) -> Mapping[str, str]:
        """The file's name and how its tensors are stored. Raises CheckpointUnavailable."""
        kinds = Counter(one.stored.tensor_type.name for one in self.file.tensors.values())
        stored = ", ".join(f"{count} tensors as {kind}" for kind, count in kinds.most_common())
        return {"gguf": f"{self.path.name}, dequantised: {stored}"}

    @cached_property
    def file(self) -> GgufFile:
        """The opened file. Raises CheckpointUnavailable."""
        from checks.checkpoint.gguf_file import GgufFile

        return GgufFile(self.path, self._opened)

    @cached_property
    def _opened(self) -> OpenedFile:
        """The file that all of this is read from."""
        if not self.path.is_file():
            raise CheckpointUnavailable(f"{self.path}: no such file; correct the path in the claim")
        return OpenedFile(self.path)

    @cached_property
    def identity(self) -> FileIdentity:
        """Which file this is. Raises CheckpointUnavailable."""
        return FileIdentity.of(self._opened.state, self._header(LARGEST_HEADER))

    def _header(self, largest: int) -> bytes:
        with self._opened.binary() as file:
            return gguf_header(self.path, largest, file)

    def index(self) -> CheckpointIndex:
        """See CheckpointFiles."""
        tensors, start = [], 0
        for name, tensor in self.file.tensors.items():
            stop = start + BYTES * prod(tensor.shape)
            tensors.append(TensorInfo(name, "F32", tensor.shape, self.path.name, start, stop))
            start = stop
        shard = Shard(self.path.name, start)
        return build_index(str(self.path), [(shard, tensors)], {shard.name: frozenset()})

    def source(self) -> GgufSource:
        """See CheckpointFiles."""
        return GgufSource(self.file, self.index())

    def small_file(self, name: str, largest: int = LARGEST_SMALL_FILE) -> bytes | None:
        """See CheckpointFiles. HEADER_NAME stands for the file's own header, in which its tokenizer is."""
        if checked_name(name, self.where) == HEADER_NAME:
            return self._header(min(largest, LARGEST_HEADER))
        return None if self._beside is None else read_local_file(self._beside, name, largest)

    def config(self) -> bytes | None:
        """What a config.json would say, as far as the file says it, and which file this is, for the store's key."""
        return json.dumps({**self.file.config, "gguf": asdict(self.identity)}).encode()


class GgufCheckpoint(Checkpoint):
    """The tensors of a GGUF file. It counts as lying on this disk, although the shard of its index does not."""

    @property
    def directory(self) -> Path:
        """Where the file lies."""
        return Path(self.files.where).parent

    def require_unchanged(self) -> None:
        """See Checkpoint. Raises CheckpointUnavailable."""
        assert isinstance(self.files, GgufFiles)
        self.files.identity.require_at(self.files.path)


class GgufSource:
    """The bytes of the shard of dequantised values. Threads may share it: one of them dequantises."""

    def __init__(self, file: GgufFile, index: CheckpointIndex) -> None:
        self._file = file
        self._tensors = sorted((one for one in index.tensors.values() if one.elements), key=lambda one: one.start)
        self._starts = [one.start for one in self._tensors]
        self._lock = threading.Lock()

    def read_into(self, shard: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of `shard` from `start`. Raises CheckpointUnavailable when that fails."""
        stop = start + buffer.nbytes
        if not buffer.nbytes:
            return
        if not self._tensors or start < 0 or stop > self._tensors[-1].stop:
            raise CheckpointUnavailable(f"{self._file.where}: is asked for bytes {start} to {stop}, which it has not")
        view = buffer.cast("B")
        with self._lock:
            for tensor in self._tensors[bisect_right(self._starts, start) - 1 :]:
                if tensor.start >= stop:
                    break
                first, last = max(start, tensor.start), min(stop, tensor.stop)
                self._fill(tensor, first - tensor.start, view[first - start : last - start])

    def _fill(self, tensor: TensorInfo, start: int, view: memoryview) -> None:
        """Fill `view` with the bytes of one tensor from `start`, some rows at a time."""
        row = BYTES * prod(tensor.shape[1:])
        done = 0
        while done < len(view):
            at = start + done
            first = at // row
            last = min(-(-(start + len(view)) // row), first + max(1, AT_ONCE // row))
            rows = slice(first, last) if tensor.shape else None
            values = self._file.read(tensor.name, rows).contiguous().numpy().reshape(-1).view("uint8")
            piece = values[at - first * row :][: len(view) - done]
            view[done : done + len(piece)] = piece.data
            done += len(piece)
