"""One pass over two checkpoints: each byte is read once, hashed, and compared with its counterpart while in memory."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from queue import SimpleQueue
from typing import TYPE_CHECKING

from checks.checkpoint.index import ByteSource, CheckpointIndex, TensorInfo, equal_shards, shown
from checks.checkpoint.reader import PAGE, Allocate, PageBuffer, TensorReader, ordinary_memory, page_floor
from checks.checkpoint.ring import Job, Part, Settings, Sums, Track
from checks.statistics.elementwise import ElementwiseSums
from checks.statistics.kernel_cpu import BLOCK, ITEM_SIZES, PieceSums

if TYPE_CHECKING:
    import torch

# Bytes of all buffers together, at most; on a GPU, whose copies are larger, page-locked.
MEMORY = 64 << 20
GPU_MEMORY = 512 << 20
# Bytes of a piece: what stays in a core's cache while it is read, hashed and compared; what keeps a disk or a network
# busy; what keeps a GPU busy. A piece is a multiple of the smallest, which holds whole blocks of every dtype.
CACHED_PIECE = 1 << 20
WAITING_PIECE = 4 << 20
GPU_PIECE = 16 << 20
SMALLEST_PIECE = BLOCK * max(ITEM_SIZES.values())
# Buffers of each of the two rings of a track: so few that neither side waits for the other at every piece; as many as
# there are to be requests in flight.
FEWEST_BUFFERS = 2
ENOUGH_BUFFERS = 4
WAITING_BUFFERS = 8
# Fewer tracks are better than less memory for each.
TRACK_MEMORY = 8 << 20

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


@dataclass(frozen=True, slots=True)
class TensorResult:
    """What the pass found out about a pair of tensors, or about one tensor without counterpart.

    `candidate`, `reference`: names; None for the side without counterpart. `sums`: None without counterpart.
    `candidate_sha256`, `reference_sha256`: of the stored bytes, in hex; None if the pass does not hash.
    `is_identical`: nothing was read, since both stand in shards of equal published SHA-256; sums and hashes are None.
    """

    candidate: str | None
    reference: str | None
    sums: ElementwiseSums | None = None
    candidate_sha256: str | None = None
    reference_sha256: str | None = None
    is_identical: bool = False


def stream_pair(
    candidate: CheckpointIndex,
    reference: CheckpointIndex,
    sources: tuple[ByteSource, ByteSource],
    pairs: Sequence[tuple[str, str]],
    *,
    hashing: bool = True,
    skip_identical: bool = True,
    device: str = "cpu",
    threads: int | None = None,
    memory: int | None = None,
    piece: int | None = None,
) -> Iterator[TensorResult]:
    """Read two checkpoints once, side by side; yield a result for each pair, and for each tensor without counterpart.

    `pairs`: names in the candidate and in the reference of the tensors to compare, each in one pair at most. Tensors in
    no pair are hashed too; without `hashing` they are not read. Results come in the order of the candidate's tensors in
    its shards, with the reference's leftover tensors among them: the same in every run.
    `skip_identical`: do not read pairs of one name in shards of equal published SHA-256; their results come first.
    `device`: where pairs are compared, "cpu" or a GPU. `threads`: how many hash and compare, two at least (default: one
    for each core that this process may use); others only wait for reads. `memory`: bytes of all buffers together, at
    most (default: 64 MiB, for a GPU 512 MiB). `piece`: bytes of one piece, at most (default: 1 MiB if both checkpoints
    are in the page cache, else 4 MiB, for a GPU 16 MiB; less where the memory asks for it).

    Threads run from the first result on; close the iterator, or drop it, to give the pass up.
    Raises ValueError for names that are not there, tensors in two pairs, pairs of different sizes or of dtypes that are
    not compared, and too little memory. The iterator raises CheckpointUnavailable, which names shard and tensor, when a
    read fails.
    """
    partner = _checked(candidate, reference, pairs)
    identical = equal_shards(candidate, reference) if skip_identical else frozenset()
    skipped = frozenset(name for name in identical if partner.get(name) == name)
    jobs = _plan(candidate, reference, partner, skipped, hashing)
    readers = (TensorReader(candidate, sources[0]), TensorReader(reference, sources[1]))
    reads_ahead = not all(
        reader.is_cached({part.tensor.shard for job in jobs for part in job.parts if part.side == side})
        for side, reader in enumerate(readers)
    )
    is_gpu = device != "cpu"
    memory = memory or (GPU_MEMORY if is_gpu else MEMORY)
    tracks = max(1, min((threads or _cores()) // 2, memory // TRACK_MEMORY))
    wanted = GPU_PIECE if is_gpu else WAITING_PIECE if reads_ahead else CACHED_PIECE
    size, buffers = _ring_size(
        memory // (2 * tracks), piece or wanted, WAITING_BUFFERS if reads_ahead else ENOUGH_BUFFERS
    )
    make_sums, allocate = _comparer(device)
    settings = Settings(readers, make_sums, allocate, hashing, reads_ahead, tracks, size, buffers)
    return _run(jobs, [TensorResult(name, name, is_identical=True) for name in sorted(skipped)], settings)


def layer_blocks(
    index: CheckpointIndex,
    source: ByteSource,
    blocks: Iterable[Sequence[str]],
    device: str = "cpu",
    *,
    requests: int = WAITING_BUFFERS,
) -> Iterator[dict[str, torch.Tensor]]:
    """Whole tensors on `device`, by name, one block (such as the matrices of a layer) after the other.

    `blocks`: the names of each. Memory holds one block, and what the caller keeps. `requests` reads are in flight, in
    the order of the names. Raises ValueError for a name that is not there or comes twice (each tensor is read once) and
    for dtypes that torch does not have; CheckpointUnavailable, which names shard and tensor, when a read fails.
    """
    reader = TensorReader(index, source)
    allocate = ordinary_memory if device == "cpu" else _comparer(device)[1]
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
    cuts = [tensor.start, *range(first + WAITING_PIECE, tensor.stop, WAITING_PIECE), tensor.stop]
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


def _checked(
    candidate: CheckpointIndex, reference: CheckpointIndex, pairs: Sequence[tuple[str, str]]
) -> dict[str, str]:
    """The reference's name by the candidate's. Raises ValueError for pairs that cannot be compared."""
    partner: dict[str, str] = {}
    taken = set()
    for name, other in pairs:
        if name not in candidate.tensors or other not in reference.tensors:
            raise ValueError(f"{shown(name)} and {shown(other)}: no such tensors in the candidate and the reference")
        if name in partner or other in taken:
            raise ValueError(f"{shown(name)} and {shown(other)}: a tensor may stand in one pair, since it is read once")
        partner[name] = other
        taken.add(other)
        a, b = candidate.tensors[name], reference.tensors[other]
        if a.elements != b.elements:
            raise ValueError(f"{shown(name)} has {a.elements} elements and {shown(other)} {b.elements}")
        for tensor in (a, b):
            if tensor.dtype not in ITEM_SIZES:
                raise ValueError(f"{shown(tensor.name)} is {tensor.dtype}; compared are {', '.join(ITEM_SIZES)}")
            if tensor.stop - tensor.start != tensor.elements * ITEM_SIZES[tensor.dtype]:
                raise ValueError(f"{shown(tensor.name)} has {tensor.stop - tensor.start} bytes for {tensor.shape}")
    return partner


def _plan(
    candidate: CheckpointIndex,
    reference: CheckpointIndex,
    partner: Mapping[str, str],
    skipped: Set[str],
    hashing: bool,
) -> list[Job]:
    """Jobs in the order of the candidate's bytes; tensors without counterpart two by two, so that no thread idles."""
    jobs: list[Job] = []
    lone: list[Part] = []
    taken = set(partner.values())
    leftover = deque(Part(1, tensor) for tensor in _in_order(reference) if tensor.name not in taken)

    def add(parts: Sequence[Part], is_pair: bool = False) -> None:
        jobs.append(Job(len(jobs), tuple(parts), is_pair))

    for tensor in _in_order(candidate):
        if tensor.name in partner:
            if tensor.name not in skipped:
                add([Part(0, tensor), Part(1, reference.tensors[partner[tensor.name]])], is_pair=True)
        elif hashing:
            lone.append(Part(0, tensor))
            if leftover:
                lone.append(leftover.popleft())
            if len(lone) >= 2:
                add(lone[:2])
                lone = lone[2:]
    if hashing:
        lone.extend(leftover)
        for first in range(0, len(lone), 2):
            add(lone[first : first + 2])
    return jobs


def _in_order(index: CheckpointIndex) -> list[TensorInfo]:
    """Tensors as they lie in the shards."""
    return sorted(index.tensors.values(), key=lambda tensor: (tensor.shard, tensor.start))


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _ring_size(memory: int, piece: int, buffers: int) -> tuple[int, int]:
    """Bytes of a piece and number of buffers of a ring that takes `memory` bytes, at most `piece` and `buffers`.

    Raises ValueError if the memory is too little.
    """
    piece = max(SMALLEST_PIECE, piece // SMALLEST_PIECE * SMALLEST_PIECE)
    while piece > SMALLEST_PIECE and memory // PageBuffer.footprint(piece) < ENOUGH_BUFFERS:
        piece = piece // 2 // SMALLEST_PIECE * SMALLEST_PIECE
    buffers = min(buffers, memory // PageBuffer.footprint(piece))
    if buffers < FEWEST_BUFFERS:
        least = 2 * FEWEST_BUFFERS * PageBuffer.footprint(SMALLEST_PIECE)
        raise ValueError(f"the memory of the pass must be {least} bytes or more, and in proportion for more threads")
    return piece, buffers


def _comparer(device: str) -> tuple[Callable[[str, str], Sums], Allocate]:
    """What compares on a device, and the memory that it likes to be given. Raises ValueError for unknown devices."""
    if device == "cpu":
        return PieceSums, ordinary_memory
    from checks.statistics.kernel_cuda import DevicePieceSums, gpu, pinned_memory

    name = gpu(device)  # here, since a thread's current GPU is its own
    return lambda dtype_a, dtype_b: DevicePieceSums(dtype_a, dtype_b, name), pinned_memory


def _run(jobs: list[Job], known: list[TensorResult], settings: Settings) -> Iterator[TensorResult]:
    """Start the threads, hand on results in the order of the jobs, and end the threads whatever happens."""
    yield from known
    todo = deque(jobs)
    results: SimpleQueue[Job | BaseException] = SimpleQueue()
    tracks = [Track(todo, results.put, settings) for _ in range(min(settings.tracks, len(jobs)))]
    try:
        for track in tracks:
            track.start()
        finished: dict[int, Job] = {}
        for number in range(len(jobs)):
            while number not in finished:
                job = results.get()
                if isinstance(job, BaseException):
                    raise job
                finished[job.number] = job
            yield from _results(finished.pop(number))
    finally:
        for track in tracks:
            track.stop()
        for track in tracks:
            track.join()


def _results(job: Job) -> list[TensorResult]:
    digests = [part.hash.hexdigest() if part.hash else None for part in job.parts]
    names = [part.tensor.name for part in job.parts]
    if job.sums is not None:
        return [TensorResult(names[0], names[1], job.sums.result(), digests[0], digests[1])]
    return [
        TensorResult(None, name, reference_sha256=digest)
        if part.side
        else TensorResult(name, None, candidate_sha256=digest)
        for part, name, digest in zip(job.parts, names, digests, strict=True)
    ]
