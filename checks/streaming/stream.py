"""One pass over two checkpoints: each byte is read once, hashed, and compared with its counterpart while in memory."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TYPE_CHECKING

from checks.checkpoint.index import ByteSource, CheckpointIndex, TensorInfo, shown
from checks.statistics.elementwise import ElementwiseSums
from checks.statistics.kernel_cpu import BLOCK, ITEM_SIZES, PieceSums
from checks.streaming.job import Job, JobQueue, Part, Settings, Sums
from checks.streaming.reader import Allocate, PageBuffer, TensorReader, ordinary_memory
from checks.streaming.ring import Track
from checks.streaming.whole_tensors import TORCH_DTYPES

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
# Bytes of whole tensors, and of beginnings of tensors, by which a pass is ahead of its caller at most.
KEPT_MEMORY = 128 << 20
GPU_KEPT_MEMORY = 512 << 20
# Fewer tracks are better than less memory for each.
TRACK_MEMORY = 8 << 20


@dataclass(frozen=True, slots=True)
class TensorResult:
    """What the pass found out about a pair of tensors, or about one tensor without counterpart.

    `candidate`, `reference`: names; None for the side without counterpart. `sums`: None without counterpart.
    `candidate_sha256`, `reference_sha256`: of the stored bytes, in hex; None if the pass does not hash it.
    `heads`: the first elements of both, flat, on the CPU, as many as were asked for. `whole`: both tensors on the
    device, if they were asked for.
    """

    candidate: str | None
    reference: str | None
    sums: ElementwiseSums | None = None
    candidate_sha256: str | None = None
    reference_sha256: str | None = None
    heads: tuple[torch.Tensor, torch.Tensor] | None = field(default=None, compare=False, repr=False)
    whole: tuple[torch.Tensor, torch.Tensor] | None = field(default=None, compare=False, repr=False)


def stream_pair(
    candidate: CheckpointIndex,
    reference: CheckpointIndex,
    sources: tuple[ByteSource, ByteSource],
    pairs: Sequence[tuple[str, str]],
    *,
    hashing: bool = True,
    hashed: tuple[Set[str], Set[str]] = (frozenset(), frozenset()),
    head: Callable[[TensorInfo], int] | None = None,
    keep: Set[str] = frozenset(),
    device: str = "cpu",
    threads: int | None = None,
    memory: int | None = None,
    piece: int | None = None,
    room: int | None = None,
) -> Iterator[TensorResult]:
    """Read two checkpoints once, side by side; yield a result for each pair, and for each tensor without counterpart.

    `pairs`: names in the candidate and in the reference of the tensors to compare, each in one pair at most. Tensors in
    no pair are hashed too; without `hashing` they are not read. Results come in the order of the candidate's tensors in
    its shards, with the reference's leftover tensors among them: the same in every run.
    `hashed`: names of each side whose hash is known: they are read only if they are compared.
    `head`: how many of the first elements of the tensors of a pair the result is to hold. `keep`: the candidate's names
    of the pairs whose tensors it is to hold, whole, on the device. The pass is ahead of its caller by at most `room`
    bytes of these (default: 128 MiB, for a GPU 512 MiB), or by one pair; whoever holds results holds their tensors.
    `device`: where pairs are compared, "cpu" or a GPU. `threads`: how many hash and compare, two at least (default: one
    for each core that this process may use); others only wait for reads. `memory`: bytes of all buffers together, at
    most (default: 64 MiB, for a GPU 512 MiB). `piece`: bytes of one piece, at most (default: 1 MiB if both checkpoints
    are in the page cache, else 4 MiB, for a GPU 16 MiB; less where the memory asks for it).

    Threads run from the first result on; close the iterator, or drop it, to give the pass up.
    Raises ValueError for names that are not there, tensors in two pairs, pairs of different sizes or of dtypes that are
    not compared, names in `keep` that are in no pair, and too little memory. The iterator raises CheckpointUnavailable,
    which names shard and tensor, when a read fails.
    """
    partner = _checked(candidate, reference, pairs)
    if stray := keep - partner.keys():
        raise ValueError(f"{shown(min(stray))} is to be kept and in no pair")
    jobs = _plan(candidate, reference, partner, hashed if hashing else None)
    for job in jobs:
        if job.is_pair:
            job.is_whole = job.parts[0].tensor.name in keep
            for part in job.parts:
                part.head = min(head(part.tensor), part.tensor.elements) if head else 0
                kept = part.tensor.elements if job.is_whole else part.head
                part.keeps = kept * ITEM_SIZES[part.tensor.dtype]
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
    kept_memory = room if room is not None else GPU_KEPT_MEMORY if is_gpu else KEPT_MEMORY
    settings = Settings(readers, make_sums, allocate, device, reads_ahead, tracks, size, buffers, kept_memory)
    return _run(jobs, settings)


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
    hashed: tuple[Set[str], Set[str]] | None,
) -> list[Job]:
    """Jobs in the order of the candidate's bytes; tensors without counterpart two by two, so that no thread idles.

    `hashed`: whose hash is known on either side; None to hash nothing.
    """
    jobs: list[Job] = []
    lone: list[Part] = []
    taken = set(partner.values())

    def part(side: int, tensor: TensorInfo) -> Part:
        return Part(side, tensor, is_hashed=hashed is not None and tensor.name not in hashed[side])

    def add(parts: Sequence[Part], is_pair: bool = False) -> None:
        jobs.append(Job(len(jobs), tuple(parts), is_pair))

    leftover = deque(part(1, tensor) for tensor in _in_order(reference) if tensor.name not in taken)
    leftover = deque(one for one in leftover if one.is_hashed)
    for tensor in _in_order(candidate):
        ours = part(0, tensor)
        if tensor.name in partner:
            add([ours, part(1, reference.tensors[partner[tensor.name]])], is_pair=True)
        elif ours.is_hashed:
            lone.append(ours)
            if leftover:
                lone.append(leftover.popleft())
            if len(lone) >= 2:
                add(lone[:2])
                lone = lone[2:]
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


def _run(jobs: list[Job], settings: Settings) -> Iterator[TensorResult]:
    """Start the threads, hand on results in the order of the jobs, and end the threads whatever happens."""
    queue = JobQueue(jobs, settings.room)
    results: SimpleQueue[Job | BaseException] = SimpleQueue()
    tracks = [Track(queue, results.put, settings) for _ in range(min(settings.tracks, len(jobs)))]
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
            job = finished.pop(number)
            yield from _results(job, settings.device)
            if job.keeps:  # the caller has taken the result: it asks for the next
                queue.hand_on(job)
                for track in tracks:
                    track.wake()
    finally:
        for track in tracks:
            track.stop()
        for track in tracks:
            track.join()


def _results(job: Job, device: str) -> list[TensorResult]:
    digests = [part.hash.hexdigest() if part.hash else None for part in job.parts]
    names = [part.tensor.name for part in job.parts]
    if job.sums is not None:
        whole = None
        ours, theirs = (_kept(part) for part in job.parts)
        if job.is_whole:
            shapes = [part.tensor.shape for part in job.parts]
            whole = (ours.reshape(shapes[0]).to(device), theirs.reshape(shapes[1]).to(device))
            # Whoever holds the beginning must not hold all of it.
            ours, theirs = (flat[: part.head].clone() for flat, part in zip((ours, theirs), job.parts, strict=True))
        sums = job.sums.result()
        return [TensorResult(names[0], names[1], sums, digests[0], digests[1], heads=(ours, theirs), whole=whole)]
    return [
        TensorResult(None, name, reference_sha256=digest)
        if part.side
        else TensorResult(name, None, candidate_sha256=digest)
        for part, name, digest in zip(job.parts, names, digests, strict=True)
    ]


def _kept(part: Part) -> torch.Tensor:
    """The elements that were kept of a tensor, flat; the part lets go of them."""
    import torch

    dtype: torch.dtype = getattr(torch, TORCH_DTYPES[part.tensor.dtype])
    kept, part.kept = part.kept, None
    return torch.empty(0, dtype=dtype) if kept is None else torch.from_numpy(kept).view(dtype)
