"""The wire format of protocol buffers, against messages written by hand and hostile bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checks.wire import WireError, as_bytes, as_double, as_float, as_int, fields


def varint(value: int) -> bytes:
    out = bytearray()
    while True:
        value, low = value >> 7, value & 0x7F
        out.append(low | (0x80 if value else 0))
        if not value:
            return bytes(out)


FIELD = st.tuples(st.integers(1, 2**28), st.one_of(st.integers(0, 2**63), st.binary(max_size=50)))


@given(st.lists(FIELD, max_size=10))
def test_what_was_written_is_read(written: list[tuple[int, int | bytes]]) -> None:
    message = b""
    for number, value in written:
        if isinstance(value, int):
            message += varint(number << 3) + varint(value)
        else:
            message += varint(number << 3 | 2) + varint(len(value)) + value
    assert list(fields(message)) == written


@given(st.binary(max_size=60))
def test_any_bytes_are_a_message_or_an_error(message: bytes) -> None:
    try:
        found = list(fields(message))
    except WireError:
        return
    assert sum(len(value) for _, value in found if isinstance(value, bytes)) <= len(message)


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (b"\x0a\x05ab", "passes the end"),
        (b"\x0d\x00\x00", "passes the end"),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", "passes the end"),
        (b"\x08", "unfinished"),
        (b"\xff" * 11, "unfinished"),
        (b"\x0b", "wire type 3"),
        (b"\x02\x00", "field number 0"),
    ],
)
def test_broken_messages_are_named(message: bytes, says: str) -> None:
    with pytest.raises(WireError, match=says):
        list(fields(message))


def test_numbers_are_little_endian() -> None:
    message = b"\x0d\x00\x00\xc0\x3f" + b"\x11\x00\x00\x00\x00\x00\x00\xf8\x3f"
    (_, single), (_, double) = fields(message)
    assert as_float(single) == as_double(double) == 1.5


@pytest.mark.parametrize(("convert", "value"), [(as_float, b"123"), (as_double, 1), (as_bytes, 1), (as_int, b"1")])
def test_a_field_of_another_type_is_an_error(convert: object, value: object) -> None:
    with pytest.raises(WireError, match="expected"):
        convert(value)  # type: ignore[operator]
