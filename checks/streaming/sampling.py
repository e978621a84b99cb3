"""Which parts of two checkpoints to read, when reading all of them would cost too much.

- screen: norms, routers, rows of the embedding, and a few whole layers within a budget; it may refute, never support.
- sample: a fifth of the bytes, or as many as the budget says but a tenth at least: up to two thirds of them for whole
  layers and experts, the rest for blocks at random of every tensor that has a counterpart.
- full: everything.

Both parts keep bytes free for the rows of tokens that both vocabularies share, see `token_rows`.

Layers are drawn by the seed, one of each of equal strata of the depth beside the first and the last; the seed turns
the experts and draws the blocks. No list is longer than what is read, whatever sizes a header states.
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
from checks.streaming.token_rows import Runs, TokenTables, room_for_rows, row_runs, tokens_that_fit
from checks.streaming.whole_layers import Layers, Picked, layers_of, least_bytes, pick_layers, picked_bytes

SCREEN_BUDGET = 5_000_000_000
SAMPLE_SHARE, LEAST_SAMPLE_SHARE = 0.2, 0.1
# Share of a sample that whole layers and experts may take.
WHOLE_SHARE = 2 / 3
# A sample reads smaller tensors in full; a larger norm, router or bias is not believed to be small.
SMALL_TENSOR, LARGEST_OF_SMALL_KIND = 128 << 10, 32 << 20
SMALL_KINDS = frozenset({"norm", "router", "bias"})
# Rows of paired embeddings that a screening draws, for their cosine.
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
    runs: dict[str, Runs] = field(default_factory=dict)
    designs: dict[str, BlockDesign] = field(default_factory=dict)
    rows: dict[str, Runs] = field(default_factory=dict)

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

    @property
    def bytes_of_rows(self) -> int:
        """Bytes of the rows of tokens."""
        return sum(
            (stop - start) * (item_size(self.tensors[name]) or 0)
            for name, runs in self.rows.items()
            for start, stop in runs
        )

    def reads(self) -> dict[str, TensorRead]:
        """What was chosen, in the order in which the tensors are stored."""
        chosen = self.whole | self.runs.keys() | self.designs.keys() | self.rows.keys()
        return {
            name: TensorRead(
                tensor.elements,
                name in self.whole,
                (*self.runs.get(name, ()), *self.rows.get(name, ())),
                self.designs.get(name),
            )
            for name, tensor in self.tensors.items()
            if name in chosen
        }

    def tables(self, names: Iterable[str]) -> list[TensorInfo]:
        """Tables by name, without those that are read whole. Raises ValueError for what is no table."""
        found = []
        for name in names:
            table = self.tensors.get(name)
            if table is None or len(table.shape) != 2 or not item_size(table):
                raise ValueError(f"{self.side.index.origin}: {shown(name)} is no table of rows of whole bytes")
            found += [] if name in self.whole else [table]
        return found

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
    tables: TokenTables = TokenTables(),  # noqa: B008 - frozen
) -> ReadPlan:
    """What to read of a pair, and of which tensors the same elements on both sides.

    `pairs`: stored names in the candidate and in the reference of the tensors to compare position by position.
    `tables`: of which the rows of shared tokens are wanted; as many are read as fit.
    Raises BudgetTooSmall; ValueError for names that are not there or come twice, pairs of different sizes, and rows
    that a table does not have.
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
    if request.mode == SCREEN:
        _draw_rows(sides, partners, request.seed)
    fixed = sum(side.bytes for side in sides)
    layers = _layers(sides)
    blocked = partners.items() if request.mode == SAMPLE else ()
    floor = bytes_of_blocks(_incomplete(sides, blocked))
    least_layer = least_bytes(layers, partners, request.seed)
    least = fixed + floor + least_layer
    budget = _budget(request, sides, least)
    token_tables = sides[0].tables(tables.candidate), sides[1].tables(tables.reference)
    room_of_rows = room_for_rows(chain(*token_tables), request.mode, budget - least)
    room = budget - fixed - floor - room_of_rows
    if request.mode == SAMPLE:
        room = min(room, max(least_layer, int((budget - fixed) * WHOLE_SHARE)))
    picked = pick_layers(layers, partners, request.seed, room)
    for side, one, layer_set in zip(sides, picked, layers, strict=True):
        side.take_layers(layer_set, one)
    left = budget - fixed - picked_bytes(layers, picked) - room_of_rows
    for (tensor, other), design in draw_blocks(_incomplete(sides, blocked), request.seed, left):
        sides[0].designs[tensor.name] = sides[1].designs[other.name] = design
    tokens = tokens_that_fit(token_tables, tables.rows, request.mode, room_of_rows)
    for side, side_tables, rows in zip(sides, token_tables, tables.rows, strict=True):
        side.rows |= {table.name: row_runs(table, rows[:tokens]) for table in side_tables if tokens}
    return _finished(request, sides, partners, layers, picked, tokens)


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


def _draw_rows(sides: tuple[_Reads, _Reads], partners: Mapping[str, str], seed: int) -> None:
    """Draw blocks of embeddings that are compared position by position, of rows that are whole on both sides."""
    names = sides[0].embedding(), sides[1].embedding()
    if names[0] is None or names[1] is None or partners.get(names[0]) != names[1]:
        return
    widest = max(_row_bytes(side, name) for side, name in zip(sides, names, strict=True) if name is not None)
    for side, name in zip(sides, names, strict=True):
        if name is None or name in side.whole:
            continue
        tensor = side.tensors[name]
        count = max(1, BLOCK // widest)
        blocks, wanted = -(-tensor.shape[0] // count), -(-EMBEDDING_ROWS // count)
        drawn = max(0, min(wanted, blocks) - 2)
        side.designs[name] = BlockDesign(tensor.elements, count * tensor.shape[1], drawn, seed_of(seed, names[0]))


def _row_bytes(side: _Reads, name: str) -> int:
    tensor = side.tensors[name]
    return (tensor.stop - tensor.start) // tensor.shape[0]


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
    tokens: int = 0,
) -> ReadPlan:
    ours, theirs = (_side_read(side, one, picks) for side, one, picks in zip(sides, layers, picked, strict=True))
    compared = {}
    for name, other in partners.items():
        if name in ours.reads and other in theirs.reads:
            # Rows of tokens serve other ends: position by position they would be another sample.
            a = replace(ours.reads[name], runs=sides[0].runs.get(name, ()))
            b = replace(theirs.reads[other], runs=sides[1].runs.get(other, ()))
            both = TensorRead(
                a.elements,
                a.whole and b.whole,
                a.runs if a.runs == b.runs else (),
                a.design if a.design == b.design else None,
            )
            if both.elements_read:
                compared[name] = Compared(other, both)
    return ReadPlan(request, ours, theirs, compared, tokens)


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
        token_row_bytes=side.bytes_of_rows,
    )


def _bytes(tensor: TensorInfo, read: TensorRead) -> int:
    """Bytes that are read of a tensor."""
    size = tensor.stop - tensor.start
    return size if read.whole else read.elements_read * (item_size(tensor) or 0)
