"""TensorBoard event files: scalars by tag and step, read without TensorFlow.

A file is a TFRecord: length (8 bytes), its checksum (4), an Event message, its checksum (4). Checksums are not
verified: they guard against a bad disk, not against an author. Field numbers are those of tensorboard's event.proto,
summary.proto and tensor.proto.
"""

from __future__ import annotations

import struct
from typing import Any

from checks.logs.records import MOST_RECORDS, UnreadableLog
from checks.wire import WireError, as_bytes, as_double, as_float, as_int, fields

HEADER, FOOTER = 12, 4
STEP, SUMMARY = 2, 5
VALUE = 1
TAG, SIMPLE_VALUE, TENSOR = 1, 2, 8
TENSOR_TYPE, TENSOR_CONTENT, FLOAT_VALUES, DOUBLE_VALUES = 1, 4, 5, 6
FLOAT, DOUBLE = 1, 2


def rows_of_events(data: bytes) -> tuple[list[dict[str, Any]], int]:
    """One row for each scalar of an event file, and how many bytes at the end are no whole record.

    Raises UnreadableLog.
    """
    rows: list[dict[str, Any]] = []
    position = 0
    while position + HEADER <= len(data):
        size = int.from_bytes(data[position : position + 8], "little")
        end = position + HEADER + size
        if end + FOOTER > len(data):
            break
        try:
            rows.extend(_scalars(data[position + HEADER : end]))
        except WireError as error:
            raise UnreadableLog(f"the record at byte {position} is not a TensorBoard event ({error})") from error
        if len(rows) > MOST_RECORDS:
            raise UnreadableLog(f"it has more than {MOST_RECORDS} scalars")
        position = end + FOOTER
    if not position:
        raise UnreadableLog("it has no whole record of TensorBoard events")
    return rows, len(data) - position


def _scalars(event: bytes) -> list[dict[str, Any]]:
    step, found = 0, []
    for number, value in fields(event):
        if number == STEP:
            step = as_int(value)
        elif number == SUMMARY:
            found += [_scalar(as_bytes(one)) for kind, one in fields(as_bytes(value)) if kind == VALUE]
    return [{"step": step, tag: number} for tag, number in found if number is not None]


def _scalar(message: bytes) -> tuple[str, float | None]:
    tag, scalar = "", None
    for number, value in fields(message):
        if number == TAG:
            tag = as_bytes(value)[:200].decode("utf-8", "replace")
        elif number == SIMPLE_VALUE:
            scalar = as_float(value)
        elif number == TENSOR:
            scalar = _of_tensor(as_bytes(value))
    return tag, scalar


def _of_tensor(message: bytes) -> float | None:
    """The number of a tensor with one element, as TensorFlow 2 writes scalars; None for anything else."""
    kind, contents = 0, b""
    for number, value in fields(message):
        if number == TENSOR_TYPE:
            kind = as_int(value)
        elif number in (TENSOR_CONTENT, FLOAT_VALUES, DOUBLE_VALUES):
            contents = as_bytes(value)
    if kind == FLOAT and len(contents) == struct.calcsize("<f"):
        return as_float(contents)
    if kind == DOUBLE and len(contents) == struct.calcsize("<d"):
        return as_double(contents)
    return None
