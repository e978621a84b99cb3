from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.torch import save, save_file

from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.header import BITS, FIRST_READ, header_size, parse_header, read_header
from checks.checkpoint.index import TensorInfo

FILE = "model.safetensors"


def packed(header: object, data: bytes = b"", pad: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text + pad)) + text + pad + data


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "U8", "shape": [2], "data_offsets": [0, 2], **changes}


def parse(content: bytes) -> list[TensorInfo]:
    return parse_header(content, len(content), FILE)


def refusal(content: bytes) -> str:
    with pytest.raises(CheckpointUnavailable) as caught:
        parse(content)
    return str(caught.value)


# What is read


TORCH_DTYPES = [
    "bool",
    "uint8",
    "int8",
    "uint16",
    "int16",
    "uint32",
    "int32",
    "uint64",
    "int64",
    "float16",
    "bfloat16",
    "float32",
    "float64",
    "complex64",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
    "float4_e2m1fn_x2",
]


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_agrees_with_safe_open_on_every_dtype_that_torch_saves(dtype: str, tmp_path: Path) -> None:
    if not hasattr(torch, dtype):
        pytest.skip("this torch does not have the dtype")
    values = torch.zeros(4, 16, dtype=torch.uint8).view(getattr(torch, dtype))
    save_file({"a": values, "b": values[:0].clone(), "c": values[0].clone()}, tmp_path / FILE)
    content = (tmp_path / FILE).read_bytes()
    found = {tensor.name: tensor for tensor in parse(content)}
    with safe_open(tmp_path / FILE, framework="pt") as opened:
        assert set(opened.keys()) == set(found)
        for name, tensor in found.items():
            view = opened.get_slice(name)
            assert (tensor.dtype, list(tensor.shape)) == (view.get_dtype(), view.get_shape())
    for name, raw in deserialize(content):
        assert content[found[name].start : found[name].stop] == raw["data"]


@pytest.mark.parametrize("dtype", BITS)
def test_every_known_dtype_is_one_of_safetensors_with_the_same_size(dtype: str) -> None:
    content = packed({"a": entry(dtype=dtype, shape=[8], data_offsets=[0, BITS[dtype]])}, bytes(BITS[dtype]))
    assert deserialize(content)[0][1]["shape"] == [8]
    assert parse(content) == [TensorInfo("a", dtype, (8,), FILE, len(content) - BITS[dtype], len(content))]


def test_tensors_come_in_file_order_with_offsets_from_the_beginning_of_the_file() -> None:
    header = {
        "z": entry(shape=[], data_offsets=[0, 1]),
        "empty": entry(shape=[0, 3], data_offsets=[1, 1]),
        "a": entry(shape=[2, 1], data_offsets=[1, 3]),
        "__metadata__": {"format": "pt"},
    }
    content = packed(header, b"xyz", pad=b"   ")
    tensors = parse(content)
    assert [tensor.name for tensor in tensors] == ["z", "empty", "a"]
    assert [content[tensor.start : tensor.stop] for tensor in tensors] == [b"x", b"", b"yz"]
    assert [tensor.elements for tensor in tensors] == [1, 0, 2]


@pytest.mark.parametrize("header", [b"{}", b" {}  ", b'{"__metadata__": null}'], ids=repr)
def test_a_file_without_tensors_is_a_file(header: bytes) -> None:
    assert parse(packed(header)) == []


@pytest.mark.parametrize("tensors", [1, 5000], ids=["short", "long"])
def test_a_long_header_takes_a_second_read(tensors: int) -> None:
    content = save({f"model.layers.{number}.weight": torch.zeros(1) for number in range(tensors)})
    reads: list[tuple[int, int]] = []

    def read(start: int, stop: int) -> bytes:
        reads.append((start, stop))
        return content[start:stop]

    header = read_header(read, len(content), FILE)
    assert header == content[: header_size(content[:8], len(content), FILE)]
    assert len(parse_header(header, len(content), FILE)) == tensors
    first = (0, min(FIRST_READ, len(content)))
    assert reads == ([first] if len(header) <= FIRST_READ else [first, (FIRST_READ, len(header))])


# What is refused

GOOD = {"a": entry(), "b": entry(data_offsets=[2, 4])}
REFUSED: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "8 bytes at least, found 0"),
    "few bytes": (b"abc", "8 bytes at least, found 3"),
    "length beyond the file": (struct.pack("<Q", 100) + b"{}", "header of 100 bytes, expected at most 2"),
    "absurd length": (struct.pack("<Q", 2**63) + b"{}", "header of 9223372036854775808 bytes"),
    "a web page": (b"<!DOCTYPE html><html></html>", "no safetensors file or was cut"),
    "no JSON": (packed(b"hello"), "expected a JSON object"),
    "no UTF-8": (packed(b'{"\xff": 1}'), "expected a JSON object"),
    "nothing": (packed(b""), "expected a JSON object"),
    "a list": (packed([]), r"expected a JSON object, found \[\]"),
    "deep nesting": (packed(b'{"a":' + b"[" * 100_000), "too deeply nested"),
    "NaN": (packed(b'{"__metadata__": {"a": NaN}}'), "NaN is no JSON number"),
    "a number without end": (packed(b'{"a":{"shape":[' + b"9" * 5000 + b"]}}"), "expected a JSON object"),
    "half a character": (packed(b'{"\\ud800": 1}'), "printable characters"),
    "duplicate tensor": (
        packed(b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"a":1}', b"xx"),
        "the key .*a.* stands twice",
    ),
    "duplicate field": (packed(b'{"a":{"dtype":"U8","dtype":"I8"}}', b"xx"), "the key .*dtype.* stands twice"),
    "metadata is a list": (packed({"__metadata__": ["pt"]}), "__metadata__"),
    "metadata holds numbers": (packed({"__metadata__": {"format": 1}}), "__metadata__"),
    "tensor is no object": (packed({"a": ["U8", [2], [0, 2]]}, b"xx"), "tensor 'a': expected an object"),
    "no dtype": (packed({"a": {"shape": [2], "data_offsets": [0, 2]}}, b"xx"), "a dtype of F4.*found None"),
    "unknown dtype": (packed({"a": entry(dtype="F128")}, b"xx"), "a dtype of F4.*found 'F128'"),
    "dtype is no text": (packed({"a": entry(dtype=["U8"])}, b"xx"), "a dtype of"),
    "no shape": (packed({"a": {"dtype": "U8", "data_offsets": [0, 2]}}, b"xx"), "a shape of whole numbers"),
    "negative size": (packed({"a": entry(shape=[-2])}, b"xx"), "a shape of whole numbers"),
    "two negative sizes": (packed({"a": entry(shape=[-2, -1])}, b"xx"), "a shape of whole numbers"),
    "boolean size": (packed({"a": entry(shape=[True, 2])}, b"xx"), "a shape of whole numbers"),
    "fractional size": (packed({"a": entry(shape=[2.0])}, b"xx"), "a shape of whole numbers"),
    "size beyond 64 bits": (packed({"a": entry(shape=[0, 2**64])}, b"xx"), "a shape of whole numbers"),
    "shape that overflows": (packed({"a": entry(shape=[2**33, 2**33])}, b"xx"), "fewer than 2\\^64 elements"),
    "shape that overflows to its size": (packed({"a": entry(shape=[2**63, 2, 0])}, b""), "fewer than 2\\^64"),
    "bytes that do not fit the dtype": (packed({"a": entry(dtype="F32")}, b"xx"), "8 bytes for F32.*found '2 bytes'"),
    "half a byte": (packed({"a": entry(dtype="F4", shape=[3])}, b"xx"), "fills whole bytes with 4 bits"),
    "six bits": (packed({"a": entry(dtype="F6_E2M3", shape=[2])}, b"xx"), "fills whole bytes with 6 bits"),
    "negative offset": (packed({"a": entry(data_offsets=[-2, 0])}, b"xx"), "data_offsets of two whole numbers"),
    "reversed offsets": (packed({"a": entry(data_offsets=[2, 0])}, b"xx"), "that do not run backwards"),
    "three offsets": (packed({"a": entry(data_offsets=[0, 1, 2])}, b"xx"), "data_offsets of two whole numbers"),
    "boolean offsets": (packed({"a": entry(data_offsets=[False, 2])}, b"xx"), "data_offsets of two whole numbers"),
    "out of the file": (packed({"a": entry(data_offsets=[2, 4])}, b"xx"), "ends at byte .* of a file of"),
    "cut file": (packed(GOOD, b"xyz"), "tensor 'b' ends at byte .*the file was cut"),
    "overlap": (packed({"a": entry(), "b": entry(data_offsets=[1, 3])}, b"xyz"), "tensor 'b' .*overlaps"),
    "same bytes twice": (packed({"a": entry(), "b": entry()}, b"xy"), "tensor 'b' .*overlaps"),
    "hole before": (packed({"a": entry(data_offsets=[1, 3])}, b"xyz"), "tensor 'a' .*leaves a hole"),
    "hole between": (packed({"a": entry(), "b": entry(data_offsets=[3, 5])}, b"vwxyz"), "tensor 'b' .*hole"),
    "bytes after the last tensor": (packed(GOOD, b"vwxyz"), "expected the end of the file"),
    "NUL in a name": (packed({"a\0b": entry()}, b"xx"), r"tensor 'a\\x00b': expected a name"),
    "escape in a name": (packed({"\x1b[2J": entry()}, b"xx"), r"tensor '\\x1b\[2J': expected a name"),
    "endless name": (packed({"a" * 5000: entry()}, b"xx"), r"a{100}.*\.\.\.: expected a name of at most 1024"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    content, message = REFUSED[case]
    with pytest.raises(CheckpointUnavailable, match=message) as caught:
        parse(content)
    assert str(caught.value).startswith(f"{FILE}: ")
    assert "download" in str(caught.value)
    assert len(str(caught.value)) < 700
    assert str(caught.value).isprintable()


def test_header_that_was_not_read_to_its_end() -> None:
    content = packed(GOOD, b"wxyz")
    with pytest.raises(CheckpointUnavailable, match="bytes of header, found 20"):
        parse_header(content[:20], len(content), FILE)


def test_header_length_is_bounded_before_anything_is_read() -> None:
    reads: list[tuple[int, int]] = []

    def read(start: int, stop: int) -> bytes:
        reads.append((start, stop))
        return struct.pack("<Q", 25_000_001).ljust(stop - start, b" ")

    with pytest.raises(CheckpointUnavailable, match="header of 25000001 bytes, expected at most 25000000"):
        read_header(read, 10**12, FILE)
    assert reads == [(0, FIRST_READ)]


def test_errors_name_the_place_that_the_caller_gives() -> None:
    with pytest.raises(CheckpointUnavailable, match=r"^org/name@abc/model\.safetensors: "):
        parse_header(b"", 0, FILE, "org/name@abc/model.safetensors")


# Fuzz: a valid list or CheckpointUnavailable, and nothing accepted that safetensors does not accept likewise

SIZES = st.integers(0, 5) | st.sampled_from([-1, True, 1.0, 2**31, 2**32, 2**63, 2**64 - 1, 2**64, None, "1"])
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from([*BITS, "F128", None]),
        "shape": st.lists(SIZES, max_size=4) | st.none(),
        "data_offsets": st.lists(SIZES, min_size=1, max_size=3),
        "more": st.none(),
    },
)
NAMES = st.sampled_from(["a", "b", "model.norm.weight", "", "__metadata__", "é", "\0"])


@st.composite
def contiguous(draw: st.DrawFn) -> bytes:
    """A valid file of a few tensors, or one with a little wrong."""
    header: dict[str, Any] = {}
    end = 0
    for name in draw(st.lists(NAMES.filter(lambda name: name not in ("__metadata__", "\0")), unique=True)):
        dtype = draw(st.sampled_from(list(BITS)))
        shape = [*draw(st.lists(st.integers(0, 3), max_size=2)), 8]
        size = torch.Size(shape).numel() * BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    if header and draw(st.booleans()):
        changed = draw(st.sampled_from(sorted(header)))
        header[changed] |= draw(ENTRIES)
    return packed(header, bytes(end))


@st.composite
def mutated(draw: st.DrawFn) -> bytes:
    content = bytearray(draw(contiguous()))
    for _ in range(draw(st.integers(0, 3))):
        content[draw(st.integers(0, len(content) - 1))] = draw(st.integers(0, 255))
    return bytes(content[: len(content) - draw(st.integers(0, 3))])


@settings(max_examples=400)
@given(
    st.binary(max_size=60)
    | st.binary(max_size=60).map(packed)
    | st.dictionaries(NAMES, ENTRIES, max_size=3).map(lambda header: packed(header, b"xx"))
    | contiguous()
    | mutated()
)
@example(packed({"a": entry(shape=[0, 2**40, 2**40], data_offsets=[0, 0])}))
def test_any_bytes_are_parsed_as_safetensors_does_or_refused(content: bytes) -> None:
    try:
        tensors = parse(content)
    except CheckpointUnavailable:
        return
    theirs = dict(deserialize(content))
    assert {tensor.name for tensor in tensors} == set(theirs)
    for tensor in tensors:
        raw = theirs[tensor.name]
        assert (tensor.dtype, list(tensor.shape)) == (raw["dtype"], raw["shape"])
        assert content[tensor.start : tensor.stop] == raw["data"]


@settings(max_examples=200)
@given(contiguous())
def test_what_safetensors_reads_is_read(content: bytes) -> None:
    try:
        deserialize(content)
    except SafetensorError:
        refusal(content)
    else:
        parse(content)


def test_a_real_checkpoint_is_read(llama_tensors: Any, tmp_path: Path) -> None:
    tensors = llama_tensors(dtype=torch.bfloat16)
    save_file(tensors, tmp_path / FILE, metadata={"format": "pt"})
    content = (tmp_path / FILE).read_bytes()
    found = {tensor.name: tensor for tensor in parse(content)}
    assert {name: tensor.shape for name, tensor in found.items()} == {k: tuple(v.shape) for k, v in tensors.items()}
    assert sum(tensor.elements for tensor in found.values()) == sum(tensor.numel() for tensor in tensors.values())
