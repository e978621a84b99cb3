"""The header of a GGUF file, walked once before a library reads it: every length that it states must fit the file.

The gguf library believes lengths, and one false one would keep it busy for years.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

from checks.checkpoint.errors import CheckpointUnavailable

MAGIC = b"GGUF"
STRING, ARRAY = 8, 9
# Bytes of a value by the number of its type: 8- to 32-bit integers, float, bool, 64-bit integers, double.
VALUE_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
MOST_DIMENSIONS = 4  # of ggml
LARGEST_HEADER = 1 << 28  # bytes; vocabularies of 300,000 tokens with their merges take 20 million


def check_gguf_header(path: Path) -> None:
    """Walks the key-value pairs and the list of tensors of a little-endian GGUF file of version 2 or 3.

    Raises CheckpointUnavailable if the file ends before its header does, or the header is no such header.
    """
    try:
        with path.open("rb") as file:
            _walk(_Header(file, path.stat().st_size))
    except (OSError, ValueError, struct.error) as error:
        raise CheckpointUnavailable(f"{path}: is no GGUF file, or was cut ({error}); download it again") from error


class _Header:
    """Reads numbers and skips the rest, and never past the end."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._left = file, min(size, LARGEST_HEADER)

    def number(self, form: str) -> int:
        size = struct.calcsize(form)
        self._take(size)
        (found,) = struct.unpack(form, self._file.read(size))
        return int(found)

    def skip(self, size: int) -> None:
        self._take(size)
        self._file.seek(size, 1)

    def string(self) -> None:
        self.skip(self.number("<Q"))

    def must_hold(self, count: int, each: int) -> None:
        if count * each > self._left:
            raise ValueError(f"it states {count} entries of at least {each} bytes, {self._left} bytes are left")

    def _take(self, size: int) -> None:
        self.must_hold(1, size)
        self._left -= size


def _walk(header: _Header) -> None:
    magic, version = header.number("<I"), header.number("<I")
    if magic.to_bytes(4, "little") != MAGIC or version not in (2, 3):
        raise ValueError(f"it begins with {magic:#x} and version {version}")
    tensors, pairs = header.number("<Q"), header.number("<Q")
    header.must_hold(tensors, 24)
    header.must_hold(pairs, 12)
    for _ in range(pairs):
        header.string()
        _skip_value(header, header.number("<I"))
    for _ in range(tensors):
        header.string()
        dimensions = header.number("<I")
        if dimensions > MOST_DIMENSIONS:
            raise ValueError(f"a tensor has {dimensions} dimensions")
        header.skip(8 * dimensions + 12)


def _skip_value(header: _Header, kind: int) -> None:
    if kind == STRING:
        header.string()
    elif kind == ARRAY:
        inner, count = header.number("<I"), header.number("<Q")
        if inner == STRING:
            header.must_hold(count, 8)
            for _ in range(count):
                header.string()
        else:
            header.skip(count * _bytes_of(inner))
    else:
        header.skip(_bytes_of(kind))


def _bytes_of(kind: int) -> int:
    if kind not in VALUE_BYTES:  # an array of arrays has no known use
        raise ValueError(f"a value is of the unknown type {kind}")
    return VALUE_BYTES[kind]
