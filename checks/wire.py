"""The wire format of protocol buffers: the fields of one message, read within bounds and without a schema.

Two small formats need it (SentencePiece models and TensorBoard events), each for a handful of fields. Format: Protocol
Buffers documentation, "Encoding".
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

VARINT, FIXED64, LENGTH_DELIMITED, FIXED32 = 0, 1, 2, 5
FIXED_SIZES = {FIXED64: 8, FIXED32: 4}
LONGEST_VARINT = 10

Value = int | bytes


class WireError(ValueError):
    """The bytes are not a message."""


def fields(message: bytes) -> Iterator[tuple[int, Value]]:
    """Number and value of every field: an int for a varint, bytes for all others (fixed-size ones little-endian).

    Raises WireError at the first byte that cannot be read, also when a length passes the end of the message.
    """
    position, end = 0, len(message)
    while position < end:
        key, position = _varint(message, position)
        number, kind = key >> 3, key & 7
        if number == 0:
            raise WireError(f"field number 0 at byte {position}")
        if kind == VARINT:
            value, position = _varint(message, position)
            yield number, value
            continue
        if kind == LENGTH_DELIMITED:
            size, position = _varint(message, position)
        elif kind in FIXED_SIZES:
            size = FIXED_SIZES[kind]
        else:
            raise WireError(f"wire type {kind} at byte {position} is not one that is written today")
        if size > end - position:
            raise WireError(f"a field of {size} bytes at byte {position} passes the end of the message")
        yield number, message[position : position + size]
        position += size


def as_float(value: Value) -> float:
    """A 32-bit float. Raises WireError for anything else."""
    if not isinstance(value, bytes) or len(value) != 4:
        raise WireError("expected a 32-bit float")
    return float(struct.unpack("<f", value)[0])


def as_double(value: Value) -> float:
    """A 64-bit float. Raises WireError for anything else."""
    if not isinstance(value, bytes) or len(value) != 8:
        raise WireError("expected a 64-bit float")
    return float(struct.unpack("<d", value)[0])


def as_bytes(value: Value) -> bytes:
    """A string or a nested message. Raises WireError for anything else."""
    if not isinstance(value, bytes):
        raise WireError("expected bytes")
    return value


def as_int(value: Value) -> int:
    """An integer of the wire's varint. Raises WireError for anything else."""
    if not isinstance(value, int):
        raise WireError("expected an integer")
    return value


def _varint(message: bytes, position: int) -> tuple[int, int]:
    result = shift = 0
    for index in range(position, min(position + LONGEST_VARINT, len(message))):
        byte = message[index]
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, index + 1
        shift += 7
    raise WireError(f"an unfinished integer at byte {position}")
