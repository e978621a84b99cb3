"""Every layer of a pair once in memory, for all checks that want something of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from checks.checkpoint.canonical import CanonicalModel
from checks.checkpoint.checkpoint import Checkpoint
from checks.checkpoint.errors import CheckpointUnavailable
from checks.pair import channel_views
from checks.pair.mlp_pairs import REPRESENTATIVES
from checks.pair.mlp_samples import spread
from checks.streaming.holding import holding

if TYPE_CHECKING:
    from checks.checkpoint.index import ByteSource, TensorInfo

# Bytes of tensors that are held of each model.
HELD_BYTES = 1 << 30

# Takes what a check wants of a layer of both models, or of what belongs to no layer (None), by reading it.
Visitor = Callable[[int | None], None]


@dataclass(frozen=True)
class Stop:
    """One layer of both models (None: what belongs to none), and its tensors that are held on each side."""

    layer: int | None
    tensors: tuple[Set[str], Set[str]]


class LayerSweep:
    """Shows each layer to all visitors while its tensors are held: from a pass that reads them, else read for this.

    Layers come in the order in which the candidate stores them, the same in every run. A visitor asks the models for
    what it wants; what is held costs no reading. What a visitor cannot take it leaves: whoever needs it asks again, and
    meets the same failure. `limit`: bytes held of each model. Of layers that are larger, and of experts that are not
    held, visitors read what they want.
    """

    def __init__(
        self,
        sides: tuple[Checkpoint, Checkpoint],
        models: tuple[CanonicalModel, CanonicalModel],
        visitors: Sequence[Visitor],
        limit: int = HELD_BYTES,
    ) -> None:
        self._sides = sides
        self._visitors = visitors
        self._stops = _stops(sides, models)
        self._place = 0
        self._awaited: set[tuple[int, str]] = set()
        self._lock = threading.Lock()
        for side in sides:
            side.held.limit = limit

    def source(self, side: int, source: ByteSource, streamed: Collection[str]) -> ByteSource:
        """The source of one side for the pass. `streamed`: stored names of the tensors that it will read."""
        checkpoint = self._sides[side]
        wanted = {name: stop.layer is None for stop in self._stops for name in stop.tensors[side]}
        infos = {
            entry.stored_name: (name, entry.stored)
            for name, entry in checkpoint.tensors.items()
            if name in wanted
            and entry.stored_name in streamed
            and 0 < entry.stored.stop - entry.stored.start <= checkpoint.held.limit
        }
        if not infos:
            return source

        def done(tensor: TensorInfo, data: bytearray | None) -> None:
            name = infos[tensor.name][0]
            if data is not None:
                checkpoint.held.put(name, data, lasting=wanted[name])
            # Whoever completes the next layer lets the visitors in, and the others wait: no reader runs far ahead.
            with self._lock:
                self._awaited.discard((side, name))
                self._advance()

        with self._lock:
            self._awaited |= {(side, name) for name, _ in infos.values()}
        return holding(source, (info for _, info in infos.values()), done, checkpoint.held.limit // 2)

    def finish(self) -> None:
        """Visit the layers that no pass brought; what is wanted of them is read now, once for all visitors."""
        with self._lock:
            self._awaited.clear()
            self._advance()

    def _advance(self) -> None:
        """Visit the next layers as long as all is there that the pass brings of them."""
        while self._place < len(self._stops):
            stop = self._stops[self._place]
            if any((side, name) in self._awaited for side in (0, 1) for name in stop.tensors[side]):
                return
            self._place += 1
            for visitor in self._visitors:
                # Whatever it is, it is the asking check's own failure, and no other's.
                with suppress(Exception):
                    visitor(stop.layer)
            for checkpoint, tensors in zip(self._sides, stop.tensors, strict=True):
                # Small models stay, for whoever asks later.
                if not checkpoint.held.has_room(checkpoint.held.limit // 2):
                    checkpoint.held.drop(tensors)


def _stops(sides: tuple[Checkpoint, Checkpoint], models: tuple[CanonicalModel, CanonicalModel]) -> list[Stop]:
    """All layers of both, in the order in which the last of each is stored: in the candidate, else in the reference."""
    held = [
        {layer: _held_of(checkpoint, model, layer) for layer in model.tensors_by_layer}
        for checkpoint, model in zip(sides, models, strict=True)
    ]

    def place(layer: int | None) -> tuple[int, str, int]:
        for number, checkpoint in enumerate(sides):
            infos = [checkpoint.tensors[name].stored for name in held[number].get(layer, ())]
            if infos:
                return (number, *max((info.shard, info.stop) for info in infos))
        return 2, "", 0

    layers = sorted(held[0].keys() | held[1].keys(), key=place)
    empty: frozenset[str] = frozenset()
    return [Stop(layer, (held[0].get(layer, empty), held[1].get(layer, empty))) for layer in layers]


def _held_of(checkpoint: Checkpoint, model: CanonicalModel, layer: int | None) -> frozenset[str]:
    """The tensors of a layer that are held: all but those of routed experts of which no visitor asks."""
    names = model.tensors_by_layer[layer]
    try:
        places = () if layer is None else model.mlps(layer)
    except CheckpointUnavailable:
        places = ()  # in a format that nobody reads
    experts = [place.expert for place in places if place.expert is not None]
    chosen = {*experts[: channel_views.EXPERTS], *(place.expert for place in spread(places, REPRESENTATIVES))}
    return frozenset(
        name for name in names if (expert := checkpoint.tensors[name].role.expert) is None or expert in chosen
    )
