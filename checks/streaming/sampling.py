"""Which parts of two checkpoints to read, when reading all of them would cost too much.

- screen: norms, routers, rows of the embedding, and a few whole layers within a budget; it may refute, never support.
- sample: a fifth of the bytes, or as many as the budget says but a tenth at least: up to two thirds of them for whole
  layers and experts, the rest for blocks at random of every tensor that has a counterpart.
- full: everything.

Layers and experts are spread evenly over the depth; the seed turns the experts and draws the blocks. No list is longer
than what is read, whatever sizes a header states.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain

from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.header import FIRST_READ
from checks.checkpoint.index import CheckpointIndex, TensorInfo, shown
from checks.checkpoint.roles import Role
from checks.statistics.sampling import BlockDesign
from checks.streaming.blocks import BLOCK, TensorPair, bytes_of_blocks, draw_blocks, seed_of
from checks.streaming.read_plan import (
    FULL,
    SAMPLE,
    SCREEN,
    Compared,
    ReadPlan,
    ReadRequest,
    SideRead,
    TensorRead,
    item_size,
)
from checks.streaming.whole_layers import Layers, Picked, layers_of, least_bytes, pick_layers, picked_bytes

SCREEN_BUDGET = 5_000_000_000
SAMPLE_SHARE, LEAST_SAMPLE_SHARE = 0.2, 0.1
# Share of a sample that whole layers and experts may take.
WHOLE_SHARE = 2 / 3
# A sample reads smaller tensors in full; a larger norm, router or bias is not believed to be small.
SMALL_TENSOR, LARGEST_OF_SMALL_KIND = 128 << 10, 32 << 20
SMALL_KINDS = frozenset({"norm", "router", "bias"})
# Rows of the embedding that are read when nobody says which.
EMBEDDING_ROWS = 2048

Pair = tuple[str, str]


class BudgetTooSmall(CheckpointUnavailable):
    """Not even the least that is worth reading fits into the budget. The text says how much is needed."""


@dataclass(frozen=True)
class Side:
    """A checkpoint, and the roles by stored name of the tensors that take part: those of one component."""

    index: CheckpointIndex
    roles: Mapping[str, Role]


@dataclass
class _Reads:
    """What was chosen of one checkpoint so far."""

    side: Side
    tensors: dict[str, TensorInfo]
    whole: set[str] = field(default_factory=set)
    runs: dict[str, tuple[tuple[int, int], ...]] = field(default_factory=dict)
    designs: dict[str, BlockDesign] = field(default_factory=dict)

    @cached_property
    def headers(self) -> int:
        """Bytes that reading the headers takes: of each shard up to its first tensor, or the first read."""
        index = self.side.index
        first = {name: min(shard.size, FIRST_READ) for name, shard in index.shards.items()}
        starts: dict[str, int] = {}
        for tensor in index.tensors.values():
            starts[tensor.shard] = min(tensor.start, starts.get(tensor.shard, tensor.start))
        return sum(max(size, starts.get(name, 0)) for name, size in first.items())

    @property
    def all_bytes(self) -> int:
        """Bytes of the tensors that take part, and of the headers."""
        return self.headers + sum(tensor.stop - tensor.start for tensor in self.tensors.values())

    @property
    def bytes(self) -> int:
        """Bytes that were chosen, and of the headers."""
        return self.headers + sum(_bytes(self.tensors[name], read) for name, read in self.reads().items())

    def reads(self) -> dict[str, TensorRead]:
        """What was chosen, in the order in which the tensors are stored."""
        chosen = self.whole | self.runs.keys() | self.designs.keys()
        return {
            name: TensorRead(tensor.elements, name in self.whole, self.runs.get(name, ()), self.designs.get(name))
            for name, tensor in self.tensors.items()
            if name in chosen
        }

    def embedding(self) -> str | None:
        """The largest embedding."""
        found = [
            tensor
            for name, tensor in self.tensors.items()
            if self.side.roles[name].category == "embedding" and len(tensor.shape) == 2 and item_size(tensor)
        ]
        return max(found, key=lambda tensor: tensor.elements).name if found else None

    def take_layers(self, layers: Layers, picked: Picked) -> None:
        """Read these layers and experts whole."""
        for number, experts in picked.items():
            layer = layers.layers[number]
            names = chain(layer.base, *(layer.experts.get(expert, ()) for expert in experts))
            self.whole.update(tensor.name for tensor in names)
            for tensor in layer.stacked:
                each = tensor.elements // layer.count
                self.runs[tensor.name] = tuple((expert * each, (expert + 1) * each) for expert in experts)


def plan_reads(
    candidate: Side,
    reference: Side,
    pairs: Sequence[Pair],
    request: ReadRequest,
    shared_rows: tuple[Sequence[int], Sequence[int]] | None = None,
) -> ReadPlan:
    """What to read of a pair, and of which tensors the same elements on both sides.

    `pairs`: stored names in the candidate and in the reference of the tensors to compare position by position.
    `shared_rows`: rows of both embeddings that belong to the same tokens; without them rows are drawn.
    Raises BudgetTooSmall; ValueError for names that are not there or come twice, pairs of different sizes, and rows
    that an embedding does not have.
    """
    sides = (_reads_of(candidate), _reads_of(reference))
    partners = _checked(sides, pairs)
    if request.mode == FULL:
        return _everything(request, sides, partners)
    turned = {other: name for name, other in partners.items()}
    for side, counterpart, names in ((sides[0], sides[1], partners), (sides[1], sides[0], turned)):
        side.whole |= {
            name
            for name in side.tensors
            if _is_small(side, name, counterpart.tensors.get(names.get(name, "")), request.mode)
        }
    drawn_rows = _choose_rows(sides, partners, request, shared_rows)
    fixed = sum(side.bytes for side in sides)
    layers = _layers(sides)
    blocked = [pair for pair in partners.items() if request.mode == SAMPLE and pair[0] not in drawn_rows]
    floor = bytes_of_blocks(_incomplete(sides, blocked))
    least_layer = least_bytes(layers, partners, request.seed)
    budget = _budget(request, sides, fixed + floor + least_layer)
    room = budget - fixed - floor
    if request.mode == SAMPLE:
        room = min(room, max(least_layer, int((budget - fixed) * WHOLE_SHARE)))
    picked = pick_layers(layers, partners, request.seed, room)
    for side, one, layer_set in zip(sides, picked, layers, strict=True):
        side.take_layers(layer_set, one)
    left = budget - fixed - picked_bytes(layers, picked)
    for (tensor, other), design in draw_blocks(_incomplete(sides, blocked), request.seed, left):
        sides[0].designs[tensor.name] = sides[1].designs[other.name] = design
    return _finished(request, sides, partners, layers, picked)


def _reads_of(side: Side) -> _Reads:
    index = side.index
    unknown = side.roles.keys() - index.tensors.keys()
    if unknown:
        raise ValueError(f"{index.origin}: {shown(min(unknown))} has a role and is no tensor")
    infos = sorted((index.tensors[name] for name in side.roles), key=lambda tensor: (tensor.shard, tensor.start))
    return _Reads(side, {tensor.name: tensor for tensor in infos})


def _checked(sides: tuple[_Reads, _Reads], pairs: Sequence[Pair]) -> dict[str, str]:
    """The reference's tensor by the candidate's."""
    partners: dict[str, str] = {}
    for name, other in pairs:
        if name not in sides[0].tensors or other not in sides[1].tensors:
            raise ValueError(f"{shown(name)} and {shown(other)}: no such tensors in the candidate and the reference")
        if name in partners:
            raise ValueError(f"{shown(name)}: a tensor may stand in one pair")
        partners[name] = other
        sizes = sides[0].tensors[name].elements, sides[1].tensors[other].elements
        if sizes[0] != sizes[1]:
            raise ValueError(f"{shown(name)} has {sizes[0]} elements and {shown(other)} {sizes[1]}")
    if len(set(partners.values())) < len(partners):
        raise ValueError("a tensor of the reference may stand in one pair")
    return partners


def _is_small(side: _Reads, name: str, partner: TensorInfo | None, mode: str) -> bool:
    """Is a tensor read in full because it is small? Of a pair both are, or none is."""
    tensor = side.tensors[name]
    size = max(one.stop - one.start for one in (tensor, partner or tensor))
    is_small_kind = side.side.roles[name].category in SMALL_KINDS or len(tensor.shape) < 2
    return (is_small_kind and size <= LARGEST_OF_SMALL_KIND) or (mode == SAMPLE and size <= SMALL_TENSOR)


def _layers(sides: tuple[_Reads, _Reads]) -> tuple[Layers, Layers]:
    one, other = (layers_of(side.tensors.values(), side.side.roles, side.whole) for side in sides)
    return one, other


def _choose_rows(
    sides: tuple[_Reads, _Reads],
    partners: Mapping[str, str],
    request: ReadRequest,
    shared_rows: tuple[Sequence[int], Sequence[int]] | None,
) -> set[str]:
    """Choose rows of the embeddings. Returns the candidate's tensor if blocks of it need not be drawn any more."""
    names = [side.embedding() for side in sides]
    if shared_rows is not None:
        for side, name, rows in zip(sides, names, shared_rows, strict=True):
            if name is not None and name not in side.whole:
                side.runs[name] = _runs_of_rows(side.tensors[name], rows)
        return set()
    is_paired = names[0] is not None and partners.get(names[0]) == names[1]
    if is_paired and request.mode == SAMPLE:
        return set()  # drawn with all others
    # Of a pair the same blocks, of rows that are whole on both sides.
    widths = [_row_bytes(side, name) for side, name in zip(sides, names, strict=True) if name is not None]
    for side, name in zip(sides, names, strict=True):
        if name is None or name in side.whole:
            continue
        tensor = side.tensors[name]
        count = max(1, BLOCK // (max(widths) if is_paired else _row_bytes(side, name)))
        blocks, wanted = -(-tensor.shape[0] // count), -(-EMBEDDING_ROWS // count)
        seed = seed_of(request.seed, names[0] if is_paired and names[0] else name)
        drawn = max(0, min(wanted, blocks) - 2)
        side.designs[name] = BlockDesign(tensor.elements, count * tensor.shape[1], drawn, seed)
    return {names[0]} if is_paired and names[0] else set()


def _row_bytes(side: _Reads, name: str) -> int:
    tensor = side.tensors[name]
    return (tensor.stop - tensor.start) // tensor.shape[0]


def _runs_of_rows(tensor: TensorInfo, rows: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Rows as ranges of elements, neighbours as one."""
    runs: list[tuple[int, int]] = []
    for row in sorted(set(rows)):
        if not 0 <= row < tensor.shape[0]:
            raise ValueError(f"{shown(tensor.name)} has {tensor.shape[0]} rows, and row {row} is asked for")
        if runs and runs[-1][1] == row:
            runs[-1] = (runs[-1][0], row + 1)
        else:
            runs.append((row, row + 1))
    return tuple((start * tensor.shape[1], stop * tensor.shape[1]) for start, stop in runs)


def _incomplete(sides: tuple[_Reads, _Reads], pairs: Iterable[Pair]) -> list[TensorPair]:
    """Pairs of which blocks are to be drawn: not read in full on both sides, and of elements of whole bytes."""
    tensors = [(sides[0].tensors[name], sides[1].tensors[other]) for name, other in pairs]
    return [
        (one, other)
        for one, other in tensors
        if not (one.name in sides[0].whole and other.name in sides[1].whole) and item_size(one) and item_size(other)
    ]


def _everything(request: ReadRequest, sides: tuple[_Reads, _Reads], partners: Mapping[str, str]) -> ReadPlan:
    layers = _layers(sides)
    for side in sides:
        side.whole |= side.tensors.keys()
    needed = sum(side.bytes for side in sides)
    if request.budget is not None and needed > request.budget:
        raise _too_small(request, sides, needed, "everything")
    return _finished(request, sides, partners, layers, ({}, {}))


def _budget(request: ReadRequest, sides: tuple[_Reads, _Reads], least: int) -> int:
    """Bytes that may be read of both sides."""
    if request.mode == SCREEN:
        if least > (request.budget or SCREEN_BUDGET):
            raise _too_small(request, sides, least, "norms, routers, rows of the embedding and one layer of each model")
        return request.budget or SCREEN_BUDGET
    total = sum(side.all_bytes for side in sides)
    if request.budget is None:
        return max(least, int(SAMPLE_SHARE * total))
    needed = max(least, int(LEAST_SAMPLE_SHARE * total))
    if needed > request.budget:
        raise _too_small(
            request, sides, needed, "a tenth of both models, with one layer and a few blocks of each tensor"
        )
    return request.budget


def _too_small(request: ReadRequest, sides: tuple[_Reads, _Reads], needed: int, what: str) -> BudgetTooSmall:
    budget = SCREEN_BUDGET if request.budget is None else request.budget
    less = {FULL: ", or choose --read sample", SAMPLE: ", or choose --read screen", SCREEN: ""}[request.mode]
    return BudgetTooSmall(
        f"{sides[0].side.index.origin} and {sides[1].side.index.origin}: --read {request.mode} reads {what}, which "
        f"takes {needed:,} bytes; the budget is {budget:,}: raise it with --budget {needed}{less}"
    )


def _finished(
    request: ReadRequest,
    sides: tuple[_Reads, _Reads],
    partners: Mapping[str, str],
    layers: tuple[Layers, Layers],
    picked: tuple[Picked, Picked],
) -> ReadPlan:
    ours, theirs = (_side_read(side, one, picks) for side, one, picks in zip(sides, layers, picked, strict=True))
    compared = {}
    for name, other in partners.items():
        if name in ours.reads and other in theirs.reads:
            a, b = ours.reads[name], theirs.reads[other]
            both = TensorRead(
                a.elements,
                a.whole and b.whole,
                a.runs if a.runs == b.runs else (),
                a.design if a.design == b.design else None,
            )
            if both.elements_read:
                compared[name] = Compared(other, both)
    return ReadPlan(request, ours, theirs, compared)


def _side_read(side: _Reads, layers: Layers, picked: Picked) -> SideRead:
    numbered = layers.layers if layers.are_numbered else {}
    experts = {number: layer.whole_experts(side.whole, picked.get(number, ())) for number, layer in numbered.items()}
    return SideRead(
        reads=side.reads(),
        layers=tuple(number for number, layer in numbered.items() if layer.is_whole(side.whole)),
        all_layers=tuple(numbered),
        experts={number: one for number, one in experts.items() if one},
        all_experts={number: len(layer.numbers) for number, layer in numbered.items() if layer.numbers},
        embedding=side.embedding(),
        bytes=side.bytes,
        all_bytes=side.all_bytes,
    )


def _bytes(tensor: TensorInfo, read: TensorRead) -> int:
    size = tensor.stop - tensor.start
    pieces = replace(read, whole=False).elements_read * (item_size(tensor) or 0)
    return size * read.whole + pieces
