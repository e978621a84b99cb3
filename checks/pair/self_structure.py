"""A model's own MLPs against each other: repeated layers, copied experts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from checks.checkpoint.canonical import CanonicalModel, MlpPlace

if TYPE_CHECKING:
    from torch import Tensor

    from checks.statistics.self_structure import SelfStructure

# Hidden units of each MLP that are compared.
UNITS = 128
# Routed experts that stand for their layer when layers are compared.
EXPERTS = 2


@dataclass(frozen=True)
class SearchedGroup:
    """One group of MLPs of equal shape: `name`, where each stands, and what the search found."""

    name: str
    places: tuple[MlpPlace, ...]
    found: SelfStructure


def search_layers(model: CanonicalModel, seed: int = 0) -> tuple[SearchedGroup, ...]:
    """MLPs of different layers against each other: dense, shared, and two routed experts of each number.

    Raises CheckpointUnavailable.
    """
    groups: dict[tuple[str, int, bool], list[MlpPlace]] = defaultdict(list)
    for layer in model.layers:
        for place in model.mlps(layer):
            if (place.expert or 0) < EXPERTS:
                name = place.kind if place.expert is None else f"{place.kind} {place.expert}"
                groups[name, place.units, place.has_gate].append(place)
    return tuple(_search(model, name, places, seed) for (name, *_), places in groups.items() if len(places) > 1)


def search_experts(model: CanonicalModel, seed: int = 0) -> tuple[SearchedGroup, ...]:
    """The routed experts of every layer against each other. Raises CheckpointUnavailable."""
    groups: dict[tuple[int, int, bool], list[MlpPlace]] = defaultdict(list)
    for layer in model.layers:
        for place in model.mlps(layer):
            if place.kind == "routed":
                groups[layer, place.units, place.has_gate].append(place)
    return tuple(
        _search(model, f"layer {layer}", found, seed) for (layer, *_), found in groups.items() if len(found) > 1
    )


def _search(model: CanonicalModel, name: str, places: Sequence[MlpPlace], seed: int) -> SearchedGroup:
    from checks.statistics.positions import sample_positions
    from checks.statistics.self_structure import search_duplicates

    rows = sample_positions(places[0].units, UNITS, seed)

    def views(number: int) -> list[Tensor]:
        mlp = model.mlp(places[number], rows=rows)
        return [mlp.up, mlp.down.T] if mlp.gate is None else [mlp.up, mlp.gate, mlp.down.T]

    return SearchedGroup(name, tuple(places), search_duplicates(len(places), views, seed))
