"""What of two checkpoints is read: whole tensors, experts, rows, and blocks at random, as a plan that costs no memory.

`sliced` turns a plan into an index whose tensors are the pieces, so that the pass over a pair reads them like any other
tensors; `estimates` turns the sums of the pieces back into what they say of the tensors.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from itertools import pairwise
from math import inf, prod
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.index import CheckpointIndex, TensorInfo, shown
from checks.statistics.sampling import BlockDesign, CosineEstimate, estimate_cosine

if TYPE_CHECKING:
    from checks.statistics.elementwise import ElementwiseSums
    from checks.streaming.stream import TensorResult

SCREEN, SAMPLE, FULL = "screen", "sample", "full"
MODES = (SCREEN, SAMPLE, FULL)
# The largest range that is asked for at once, in bytes.
LARGEST_RANGE = 16 << 20


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """What the user asks for: `--read`, `--budget` (bytes of both models together) and `--seed`.

    Without a budget, `screen` reads 5 GB at most and `sample` a fifth. Raises ValueError for other modes and budgets.
    """

    mode: str
    budget: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"{self.mode!r} is no way to read: expected {', '.join(MODES)}")
        if self.budget is not None and self.budget <= 0:
            raise ValueError(f"a budget of {self.budget} bytes reads nothing: expected a positive number")


@dataclass(frozen=True, slots=True)
class TensorRead:
    """What is read of one tensor of `elements`: all of it, ranges of elements [start, stop), blocks by a design."""

    elements: int
    whole: bool = False
    runs: tuple[tuple[int, int], ...] = ()
    design: BlockDesign | None = None

    def ranges(self) -> list[tuple[int, int]]:
        """The pieces in order, apart from the whole: no element stands in two.

        Blocks stay as they were drawn, since an estimate rests on them; of runs it is what lies in no block.
        """
        blocks = self.design.ranges() if self.design else []
        pieces, done = list(blocks), 0
        for first, stop in sorted(self.runs):
            start = max(first, done)
            for number in range(bisect_right(blocks, start, key=itemgetter(1)), len(blocks)):
                if blocks[number][0] >= stop:
                    break
                pieces.append((start, blocks[number][0]))
                start = blocks[number][1]
            pieces.append((start, stop))
            done = max(done, stop)
        return sorted((start, stop) for start, stop in pieces if start < stop)

    @property
    def elements_read(self) -> int:
        """Elements of the whole, if that is read, and of all pieces."""
        if self.design and not self.runs:
            pieces = self.design.elements_read
        else:
            pieces = sum(stop - start for start, stop in self.ranges())
        return self.elements * self.whole + pieces


@dataclass(frozen=True)
class SideRead:
    """What is read of one checkpoint. Tensors that are in no `reads` are not read.

    `layers`: read whole, routed experts apart; of `all_layers`. `experts`: the routed experts that are read whole, by
    layer; of `all_experts` in each. `embedding`: the token embedding. `bytes`: of the reads and of the headers.
    `token_row_bytes`: those of them that are rows of shared tokens, with what lies between near ones.
    """

    reads: Mapping[str, TensorRead]
    layers: tuple[int, ...]
    all_layers: tuple[int, ...]
    experts: Mapping[int, tuple[int, ...]]
    all_experts: Mapping[int, int]
    embedding: str | None
    bytes: int
    all_bytes: int
    token_row_bytes: int = 0

    def is_whole(self, name: str) -> bool:
        """Is this tensor read in full?"""
        return name in self.reads and self.reads[name].whole

    @property
    def longest_unread_run(self) -> int:
        """The most layers in a row of which none is read whole: a reuse confined to them escapes tests of layers."""
        read = [position for position, layer in enumerate(self.all_layers) if layer in set(self.layers)]
        return max(b - a - 1 for a, b in pairwise([-1, *read, len(self.all_layers)]))


class Compared(NamedTuple):
    """A pair of tensors, and what is read of both: the same elements."""

    reference: str
    read: TensorRead


@dataclass(frozen=True)
class ReadPlan:
    """What is read of a pair. Equal requests for equal checkpoints give equal plans, on every machine.

    `compared`: by the candidate's names, what is read of both sides at the same positions. `tokens`: of how many shared
    tokens, the first ones, all rows are read.
    """

    request: ReadRequest
    candidate: SideRead
    reference: SideRead
    compared: Mapping[str, Compared]
    tokens: int = 0

    @property
    def may_support(self) -> bool:
        """May a check that passes on what is read support the claim? A screening may only refute."""
        return self.request.mode != SCREEN

    @property
    def bytes(self) -> int:
        """Bytes that are read of both sides, headers included."""
        return self.candidate.bytes + self.reference.bytes

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what is read: plans that read the same of the same checkpoints have the same."""
        sides = [
            {name: [one.whole, one.runs, one.design and astuple(one.design)] for name, one in side.reads.items()}
            for side in (self.candidate, self.reference)
        ]
        text = json.dumps([self.request.mode, self.tokens, sides], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def unseen(self) -> tuple[int, float]:
        """A change confined to so many elements, or to this share, of one compared tensor is missed with probability
        above .05: the largest of each over the tensors.
        """
        elements, share = 0, 0.0
        for _, read in self.compared.values():
            if not read.whole:
                design = read.design
                unseen = design.unseen_blocks() * design.block if design else read.elements - read.elements_read
                elements, share = max(elements, unseen), max(share, unseen / read.elements)
        return elements, share

    def as_evidence(self) -> dict[str, Any]:
        """The facts for a record."""
        return {
            "mode": self.request.mode,
            "seed": self.request.seed,
            "budget": self.request.budget,
            "may_support": self.may_support,
            "share": self.bytes / max(1, self.candidate.all_bytes + self.reference.all_bytes),
            "compared_tensors": len(self.compared),
            "shared_tokens": self.tokens,
            "unseen_elements_of_a_tensor": self.unseen[0],
            "unseen_share_of_a_tensor": self.unseen[1],
            **{
                side: {
                    "bytes": read.bytes,
                    "all_bytes": read.all_bytes,
                    "token_row_bytes": read.token_row_bytes,
                    "tensors": len(read.reads),
                    "layers": list(read.layers),
                    "all_layers": len(read.all_layers),
                    "longest_run_of_unread_layers": read.longest_unread_run,
                    "experts": sum(map(len, read.experts.values())),
                    "all_experts": sum(read.all_experts.values()),
                }
                for side, read in (("candidate", self.candidate), ("reference", self.reference))
            },
        }


def slice_name(name: str, start: int, stop: int) -> str:
    """The name of the elements [start, stop) of a tensor in a sliced index."""
    return f"{name}[{start}:{stop}]"


def item_size(tensor: TensorInfo) -> int | None:
    """Bytes of one element; None where that is no whole number, so that the tensor is read in full or not at all."""
    size = tensor.stop - tensor.start
    return size // tensor.elements if tensor.elements and size and size % tensor.elements == 0 else None


def sliced(
    index: CheckpointIndex, reads: Mapping[str, TensorRead], names: Iterable[str] | None = None
) -> CheckpointIndex:
    """An index of the pieces that are read of the tensors (of all, or of `names`: a layer at a time saves memory).

    A whole tensor keeps its name; a piece is called `name[start:stop]`, in elements, and has the shape of rows if it is
    whole rows, else one dimension. Raises KeyError for a tensor that is not read, and CheckpointUnavailable if a tensor
    of the checkpoint is called like a piece of another.
    """
    tensors: dict[str, TensorInfo] = {}
    for name in reads if names is None else names:
        tensor, read = index.tensors[name], reads[name]
        if read.whole:
            tensors[name] = tensor
        for start, stop in read.ranges():
            piece = _piece(tensor, start, stop)
            if piece.name in index.tensors:
                raise CheckpointUnavailable(
                    f"{index.origin}: the tensor {shown(piece.name)} is called like a piece of another; rename it, or "
                    "read the checkpoint with --read full"
                )
            tensors[piece.name] = piece
    return replace(index, tensors=tensors)


def slice_pairs(plan: ReadPlan, names: Iterable[str] | None = None) -> list[tuple[str, str]]:
    """Which pieces of both sides are compared with each other, of all tensors or of the candidate's `names`."""
    pairs = []
    for name in plan.compared if names is None else names:
        other, read = plan.compared[name]
        if read.whole:
            pairs.append((name, other))
        pairs += [(slice_name(name, *piece), slice_name(other, *piece)) for piece in read.ranges()]
    return pairs


def byte_ranges(
    index: CheckpointIndex, reads: Mapping[str, TensorRead], gap: int = 0, largest: int = LARGEST_RANGE
) -> Iterator[tuple[str, int, int]]:
    """What a plan reads of a checkpoint as few ranges of bytes (shard, start, stop), in order, none of them twice.

    Ranges that touch, or are at most `gap` bytes apart, become one request, of at most `largest` bytes.
    """
    by_shard: dict[str, list[tuple[int, int]]] = {}
    for name, read in reads.items():
        tensor = index.tensors[name]
        pieces = [tensor] if read.whole else [_piece(tensor, *piece) for piece in read.ranges()]
        by_shard.setdefault(tensor.shard, []).extend((piece.start, piece.stop) for piece in pieces)
    for shard, ranges in sorted(by_shard.items()):
        merged: list[tuple[int, int]] = []
        for start, stop in sorted(ranges):
            if merged and start <= merged[-1][1] + gap:
                merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
            elif start < stop:
                merged.append((start, stop))
        for start, stop in merged:
            for first in range(start, stop, largest):
                yield shard, first, min(stop, first + largest)


def estimates(
    plan: ReadPlan, results: Iterable[TensorResult], names: Collection[str] | None = None
) -> dict[str, CosineEstimate]:
    """What the pass over the pieces says of the tensors that were compared (all, or `names`), by the candidate's names.

    Tensors of which only runs were read (experts, rows) have the cosine of these, and no interval. Those of which a
    piece has no sums (it was not read) are left out.
    """
    sums = {result.candidate: result.sums for result in results if result.sums is not None}
    found: dict[str, CosineEstimate] = {}
    for name in plan.compared if names is None else names:
        read = plan.compared[name].read
        ranges = read.design.ranges() if read.design else read.runs
        pieces = [name] if read.whole else [slice_name(name, *piece) for piece in ranges]
        if any(piece not in sums for piece in pieces):
            continue
        if read.design and not read.whole:
            found[name] = estimate_cosine(read.design, [sums[piece] for piece in pieces])
        else:
            found[name] = _of_runs(read, [sums[piece] for piece in pieces])
    return found


def _of_runs(read: TensorRead, sums: list[ElementwiseSums]) -> CosineEstimate:
    """The cosine of the elements that were read, without an interval unless they are all."""
    from checks.statistics.elementwise import concatenate

    size = max(1, read.elements_read)
    of_these = estimate_cosine(BlockDesign(size, size, 0, 0), [concatenate(sums)])
    if read.elements_read >= read.elements:
        return of_these
    unread = read.elements - read.elements_read
    return replace(
        of_these,
        variance=inf,
        blocks=len(sums) + 1,
        blocks_read=len(sums),
        elements=read.elements,
        drawn_share=0.0,
        unseen_elements=unread,
    )


def _piece(tensor: TensorInfo, start: int, stop: int) -> TensorInfo:
    """Some elements of a tensor, as a tensor of its own."""
    size = item_size(tensor)
    if size is None or not 0 <= start < stop <= tensor.elements:
        raise ValueError(f"{shown(tensor.name)}: elements {start} to {stop} cannot be read on their own")
    row = prod(tensor.shape[1:])
    is_rows = len(tensor.shape) > 1 and start % row == stop % row == 0
    shape = ((stop - start) // row, *tensor.shape[1:]) if is_rows else (stop - start,)
    begin = tensor.start + start * size
    name = slice_name(tensor.name, start, stop)
    return TensorInfo(name, tensor.dtype, shape, tensor.shard, begin, begin + (stop - start) * size)
