"""Whole tensors of a checkpoint, block by block, for what needs all of a matrix at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from typing import TYPE_CHECKING

from checks.checkpoint.index import ByteSource, CheckpointIndex, TensorInfo, shown
from checks.streaming.reader import PAGE, Allocate, PageBuffer, TensorReader, ordinary_memory, page_floor

if TYPE_CHECKING:
    import torch

# Bytes of a request, and how many are in flight.
REQUEST = 4 << 20
REQUESTS = 8

# Names of torch's dtypes by those of safetensors, for whole tensors.
TORCH_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "U16": "uint16",
    "I16": "int16",
    "F16": "float16",
    "BF16": "bfloat16",
    "U32": "uint32",
    "I32": "int32",
    "F32": "float32",
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
}


def layer_blocks(
    index: CheckpointIndex,
    source: ByteSource,
    blocks: Iterable[Sequence[str]],
    device: str = "cpu",
    *,
    requests: int = REQUESTS,
) -> Iterator[dict[str, torch.Tensor]]:
    """Whole tensors on `device`, by name, one block (such as the matrices of a layer) after the other.

    `blocks`: the names of each. Memory holds one block, and what the caller keeps. `requests` reads are in flight, in
    the order of the names. Raises ValueError for a name that is not there or comes twice (each tensor is read once) and
    for dtypes that torch does not have; CheckpointUnavailable, which names shard and tensor, when a read fails.
    """
    reader = TensorReader(index, source)
    allocate = _memory(device)
    seen: set[str] = set()
    with ThreadPoolExecutor(requests) as pool:
        for names in blocks:
            for name in names:
                if name not in index.tensors or name in seen:
                    raise ValueError(f"{shown(name)}: {'comes twice' if name in seen else 'no such tensor'}")
                if index.tensors[name].dtype not in TORCH_DTYPES:
                    raise ValueError(f"{shown(name)}: torch has no dtype {index.tensors[name].dtype}; unpack it first")
                seen.add(name)
            yield _read_block(pool, reader, [index.tensors[name] for name in names], allocate, device)


def _memory(device: str) -> Allocate:
    """The memory that is read into. Raises ValueError for unknown devices."""
    if device == "cpu":
        return ordinary_memory
    from checks.statistics.kernel_cuda import gpu, pinned_memory

    gpu(device)
    return pinned_memory


def _read_block(
    pool: ThreadPoolExecutor, reader: TensorReader, tensors: Sequence[TensorInfo], allocate: Allocate, device: str
) -> dict[str, torch.Tensor]:
    loads = [_load(pool, reader, tensor, allocate) for tensor in tensors]
    reads = [read for _, reads in loads for read in reads]
    try:
        for read in reads:
            read.result()
    finally:
        for read in reads:
            read.cancel()
    return {tensor.name: _whole(tensor, buffer).to(device) for tensor, (buffer, _) in zip(tensors, loads, strict=True)}


def _load(
    pool: ThreadPoolExecutor, reader: TensorReader, tensor: TensorInfo, allocate: Allocate
) -> tuple[PageBuffer, list[Future[memoryview]]]:
    """Memory for a whole tensor, and the reads that fill it; those after the first begin with a page."""
    buffer = PageBuffer(tensor.stop - tensor.start, allocate)
    first = page_floor(tensor.start)
    cuts = [tensor.start, *range(first + REQUEST, tensor.stop, REQUEST), tensor.stop]
    reads = []
    for start, stop in pairwise(cuts):
        place = buffer.after((page_floor(start) - first) // PAGE)
        reads.append(pool.submit(reader.read, tensor, start, stop, place))
    return buffer, reads


def _whole(tensor: TensorInfo, buffer: PageBuffer) -> torch.Tensor:
    import torch

    dtype: torch.dtype = getattr(torch, TORCH_DTYPES[tensor.dtype])
    if tensor.start == tensor.stop:
        return torch.empty(tensor.shape, dtype=dtype)
    stored = torch.frombuffer(buffer.place(tensor.start, tensor.stop), dtype=torch.uint8)
    # A tensor may begin anywhere in its file, but not anywhere in memory.
    return (stored.clone() if stored.data_ptr() % dtype.itemsize else stored).view(dtype).reshape(tensor.shape)
