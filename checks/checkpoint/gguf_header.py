"""The header of a GGUF file, walked before a library reads it: every length that it states must fit the file.

The gguf library believes lengths, and one false one would keep it busy for years. What a tokenizer needs is read here
as well, without the library.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Collection
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

from checks.checkpoint.errors import CheckpointUnavailable

MAGIC = b"GGUF"
# As what the header of a GGUF file is asked for among the small files of its checkpoint.
HEADER_NAME = "header.gguf"
STRING, ARRAY = 8, 9
# How a value is packed by the number of its type: 8- to 32-bit integers, float, bool, 64-bit integers, double.
VALUE_FORMS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
MOST_DIMENSIONS = 4  # of ggml
LARGEST_HEADER = 1 << 28  # bytes; vocabularies of 300,000 tokens with their merges take 20 million
MOST_VALUES = 1 << 23  # of a list that is kept; GLM-4.5 lists 318,088 merges


def check_gguf_header(path: Path, file: BinaryIO | None = None) -> None:
    """Walks the key-value pairs and the list of tensors of a little-endian GGUF file of version 2 or 3.

    `file`: the one of that path, if it is open. Raises CheckpointUnavailable if it ends before its header does, or the
    header is no such header.
    """
    try:
        with _opened(path, file) as opened:
            header = _Header(opened)
            _walk_tensors(header, _walk_pairs(header, frozenset(), {}))
    except (OSError, ValueError, struct.error) as error:
        raise _unreadable(path, error) from error


def gguf_header(path: Path, largest: int, file: BinaryIO | None = None) -> bytes:
    """The bytes of a file from its beginning to the end of its key-value pairs, for `gguf_values`.

    `file`: the one of that path, if it is open. Raises CheckpointUnavailable for more than `largest` bytes, and as
    `check_gguf_header` does.
    """
    try:
        with _opened(path, file) as opened:
            _walk_pairs(_Header(opened), frozenset(), {})
            size = opened.tell()
            if size > largest:
                raise ValueError(f"its key-value pairs take {size} bytes, {largest} are read")
            opened.seek(0)
            return opened.read(size)
    except (OSError, ValueError, struct.error) as error:
        raise _unreadable(path, error) from error


def gguf_values(data: bytes, wanted: Collection[str]) -> dict[str, Any]:
    """The values of some keys of a GGUF file that begins with these bytes: numbers, texts, and lists of either.

    Raises ValueError if the bytes end before the key-value pairs do, or are no such header.
    """
    found: dict[str, Any] = {}
    try:
        _walk_pairs(_Header(io.BytesIO(data)), frozenset(wanted), found)
    except struct.error as error:
        raise ValueError(str(error)) from error
    return found


def _opened(path: Path, file: BinaryIO | None) -> AbstractContextManager[BinaryIO]:
    return path.open("rb") if file is None else nullcontext(file)


def _unreadable(path: Path, error: Exception) -> CheckpointUnavailable:
    return CheckpointUnavailable(f"{path}: is no GGUF file, or was cut ({error}); download it again")


class _Header:
    """Reads numbers and texts or skips them, and never past the end."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._left = file, min(file.seek(0, io.SEEK_END), LARGEST_HEADER)
        file.seek(0)

    def numbers(self, form: str, count: int = 1) -> tuple[Any, ...]:
        size = struct.calcsize(f"<{form}")
        self.must_hold(count, size)
        return struct.unpack(f"<{count}{form}", self._bytes(count * size))

    def number(self, form: str) -> int:
        return int(self.numbers(form)[0])

    def skip(self, size: int) -> None:
        self._take(size)
        self._file.seek(size, 1)

    def text(self) -> str:
        return self._bytes(self.number("Q")).decode("utf-8", "surrogateescape")

    def skip_text(self) -> None:
        self.skip(self.number("Q"))

    def must_hold(self, count: int, each: int) -> None:
        if count * each > self._left:
            raise ValueError(f"it states {count} entries of at least {each} bytes, {self._left} bytes are left")

    def _bytes(self, size: int) -> bytes:
        self._take(size)
        return self._file.read(size)

    def _take(self, size: int) -> None:
        self.must_hold(1, size)
        self._left -= size


def _walk_pairs(header: _Header, wanted: frozenset[str], found: dict[str, Any]) -> int:
    """Put the values of the wanted keys into `found`, skip the others; how many tensors follow."""
    magic, version = header.number("I"), header.number("I")
    if magic.to_bytes(4, "little") != MAGIC or version not in (2, 3):
        raise ValueError(f"it begins with {magic:#x} and version {version}")
    tensors, pairs = header.number("Q"), header.number("Q")
    header.must_hold(pairs, 12)
    for _ in range(pairs):
        key, kind = header.text(), header.number("I")
        if key not in wanted:
            _skip_value(header, kind)
        elif key in found:
            raise ValueError(f"the key {key!r} stands twice")
        else:
            found[key] = _value(header, kind)
    return tensors


def _walk_tensors(header: _Header, tensors: int) -> None:
    header.must_hold(tensors, 24)
    for _ in range(tensors):
        header.skip_text()
        dimensions = header.number("I")
        if dimensions > MOST_DIMENSIONS:
            raise ValueError(f"a tensor has {dimensions} dimensions")
        header.skip(8 * dimensions + 12)


def _value(header: _Header, kind: int) -> Any:
    if kind == STRING:
        return header.text()
    if kind != ARRAY:
        return header.numbers(_form(kind))[0]
    inner, count = header.number("I"), header.number("Q")
    if count > MOST_VALUES:
        raise ValueError(f"a list of {count} values; at most {MOST_VALUES} are read")
    if inner != STRING:
        return list(header.numbers(_form(inner), count))
    header.must_hold(count, 8)
    return [header.text() for _ in range(count)]


def _skip_value(header: _Header, kind: int) -> None:
    if kind == STRING:
        header.skip_text()
    elif kind == ARRAY:
        inner, count = header.number("I"), header.number("Q")
        if inner == STRING:
            header.must_hold(count, 8)
            for _ in range(count):
                header.skip_text()
        else:
            header.skip(count * struct.calcsize(f"<{_form(inner)}"))
    else:
        header.skip(struct.calcsize(f"<{_form(kind)}"))


def _form(kind: int) -> str:
    if kind not in VALUE_FORMS:  # an array of arrays has no known use
        raise ValueError(f"a value is of the unknown type {kind}")
    return VALUE_FORMS[kind]
