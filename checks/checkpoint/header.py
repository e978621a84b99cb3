"""The header of a safetensors file: which tensors stand where. Hostile until every byte range is checked.

A file is 8 bytes N (little-endian), N bytes of JSON, and the tensors one after the other without holes. What is
accepted here safetensors 0.8 accepts as well, with the same result; a key that stands twice, and names that no model
has (control characters, thousands of characters), are refused on top.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.index import LARGEST_JSON, TensorInfo, is_plain_text, load_json_object, shown

# The first read, in bytes: 97 % of headers on the hub are shorter (huggingface_hub measured and uses the same bound).
FIRST_READ = 100_000
LENGTH_BYTES = 8
LONGEST_NAME = 1024
LARGEST_COUNT = 2**64 - 1  # safetensors counts dimensions, elements and bits in 64 bits

# Bits of one element. Sub-byte tensors must fill whole bytes.
BITS = {
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("C64", "F64", "I64", "U64"), 64),
}


def read_header(read: Callable[[int, int], bytes], file_size: int, shard: str, where: str | None = None) -> bytes:
    """The bytes of a file's header, by one call `read(start, stop)`, and a second one if the header is longer.

    Raises CheckpointUnavailable when the stated length cannot be right, and whatever `read` raises.
    """
    prefix = read(0, min(FIRST_READ, file_size))
    size = header_size(prefix, file_size, shard, where)
    if size > len(prefix):
        prefix += read(len(prefix), size)
    return prefix[:size]


def header_size(prefix: bytes, file_size: int, shard: str, where: str | None = None) -> int:
    """Bytes from the beginning of a file to its first tensor, from the file's first 8 bytes.

    Raises CheckpointUnavailable for a length beyond the file or beyond what a header needs.
    """
    where = where or shard
    if len(prefix) < LENGTH_BYTES:
        raise CheckpointUnavailable(
            f"{where}: expected a safetensors file, which has 8 bytes at least, found {file_size}; download it again"
        )
    length = int.from_bytes(prefix[:LENGTH_BYTES], "little")
    longest = min(LARGEST_JSON, file_size - LENGTH_BYTES)
    if length > longest:
        raise CheckpointUnavailable(
            f"{where}: states a header of {length} bytes, expected at most {longest} in a file of {file_size}; it is "
            "no safetensors file or was cut: download it again"
        )
    return LENGTH_BYTES + length


def parse_header(prefix: bytes, file_size: int, shard: str, where: str | None = None) -> list[TensorInfo]:
    """The tensors of a file in the order in which they lie in it, from its first bytes (header_size says how many).

    `shard` is the file's name in the index and `where` its name in errors, if that is another. Raises
    CheckpointUnavailable, naming file and tensor, for anything that safetensors itself would not write.
    """
    where = where or shard
    data_start = header_size(prefix, file_size, shard, where)
    if len(prefix) < data_start:
        raise CheckpointUnavailable(
            f"{where}: expected {data_start} bytes of header, found {len(prefix)}; it was cut: download it again"
        )
    header = load_json_object(prefix[LENGTH_BYTES:data_start], where)
    _check_metadata(header.pop("__metadata__", None), where)
    tensors = [_tensor(name, entry, shard, data_start, where) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.stop, tensor.name))
    _check_ranges(tensors, data_start, file_size, where)
    return tensors


def _check_metadata(metadata: Any, where: str) -> None:
    """Free text that nothing here uses; still, what is no map of texts is not written by safetensors."""
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointUnavailable(
            f"{where}: __metadata__ is {shown(metadata)}, expected an object of texts; download the file again"
        )


def _tensor(name: str, entry: Any, shard: str, data_start: int, where: str) -> TensorInfo:
    def refuse(expected: str, found: object) -> CheckpointUnavailable:
        return CheckpointUnavailable(
            f"{where}: tensor {shown(name)}: expected {expected}, found {shown(found)}; download the file again, or "
            "ask its publisher for one that safetensors can open"
        )

    if not is_plain_text(name, LONGEST_NAME):
        raise refuse(f"a name of at most {LONGEST_NAME} printable characters", f"{len(name)} characters")
    if not isinstance(entry, dict):
        raise refuse("an object with dtype, shape and data_offsets", entry)
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in BITS:
        raise refuse(f"a dtype of {', '.join(BITS)}", dtype)
    if not isinstance(shape, list) or not all(_is_count(size) for size in shape):
        raise refuse("a shape of whole numbers from 0 to 2^64 - 1", shape)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(offset) for offset in offsets):
        raise refuse("data_offsets of two whole numbers", offsets)
    start, stop = offsets
    if start > stop:
        raise refuse("data_offsets that do not run backwards", offsets)
    elements = 1
    for size in shape:
        elements *= size
        if elements > LARGEST_COUNT:
            raise refuse("fewer than 2^64 elements", shape)
    size_in_bytes, half_byte = divmod(elements * BITS[dtype], 8)
    if half_byte:
        raise refuse(f"a shape that fills whole bytes with {BITS[dtype]} bits each", shape)
    if stop - start != size_in_bytes:
        raise refuse(f"{size_in_bytes} bytes for {dtype} of shape {shown(shape)}", f"{stop - start} bytes")
    return TensorInfo(name, dtype, tuple(shape), shard, data_start + start, data_start + stop)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= LARGEST_COUNT


def _check_ranges(tensors: list[TensorInfo], data_start: int, file_size: int, where: str) -> None:
    """Do the tensors, in offset order, fill the file from the header to its end, each byte once?"""
    end = data_start
    for tensor in tensors:
        if tensor.stop > file_size:
            raise CheckpointUnavailable(
                f"{where}: tensor {shown(tensor.name)} ends at byte {tensor.stop} of a file of {file_size}; the file "
                "was cut: download it again"
            )
        if tensor.start != end:
            problem = "overlaps the tensor before it" if tensor.start < end else "leaves a hole before it"
            raise CheckpointUnavailable(
                f"{where}: tensor {shown(tensor.name)} begins at byte {tensor.start}, expected {end}: it {problem}; "
                "download the file again, or ask its publisher for one that safetensors can open"
            )
        end = tensor.stop
    if end != file_size:
        raise CheckpointUnavailable(
            f"{where}: its tensors end at byte {end}, expected the end of the file at {file_size}; download it again"
        )
