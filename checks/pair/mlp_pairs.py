"""Which MLPs of two models to compare: layers and experts paired by what no renumbering or rotation changes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

from checks.checkpoint.canonical import MlpPlace
from checks.pair.mlp_samples import MlpSamples, spread

if TYPE_CHECKING:
    from torch import Tensor

PlacePair = tuple[MlpPlace, MlpPlace]

# Layers of the candidate that are tested, evenly spread; of layers with many experts fewer.
LAYERS = 16
LAYERS_OF_MANY = 4
MANY_EXPERTS = 8
# Experts that stand for their layer when layers are compared; experts of the candidate that look for their counterpart.
REPRESENTATIVES = 4
EXPERTS = 16
# Pairs of MLPs that are tested in all, if not every layer has one; and mismatched pairs.
PAIRS = 16
MISMATCHED = 16
# Neurons of one layer whose copies are sought in another, and the share that makes it a copy.
COPY_ROWS = 64
COPIED = 0.25


@dataclass(frozen=True)
class MlpPairing:
    """`mapped`: pairs of MLPs that may belong together. `mismatched`: pairs that do not. `layer_map`: candidate's layer
    to reference's, of all layers. `searched`: pairs of layers and experts that were compared to find the map.
    `copies`: layers of either model that repeat each other."""

    mapped: tuple[PlacePair, ...]
    mismatched: tuple[PlacePair, ...]
    layer_map: Mapping[int, int]
    searched: int
    copies: tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]


def layer_scores(a: MlpSamples, b: MlpSamples) -> Tensor:
    """How well neurons of each layer of a find partners in each layer of b, by signature: [layers, layers].

    Raises CheckpointUnavailable.
    """
    import torch

    from checks.statistics.neuron_signature import block_similarity

    signatures = [
        [[side.signature(place) for place in side.some(layer, REPRESENTATIVES)] for layer in side.places]
        for side in (a, b)
    ]
    rows = [
        torch.stack(
            [torch.stack([block_similarity(x, y) for x in one for y in other]).amax() for other in signatures[1]]
        )
        for one in signatures[0]
    ]
    return torch.stack(rows).nan_to_num(0.0)


def map_layers(a: MlpSamples, b: MlpSamples) -> dict[int, int]:
    """The reference's layer for each of the candidate's, by signature; empty if a side has no MLP.

    Needs no correction where it serves a test that is exact under renumbering. Raises CheckpointUnavailable.
    """
    from checks.statistics.layer_map import layer_map

    if not a.places or not b.places:
        return {}
    theirs = list(b.places)
    return {one: theirs[place] for one, place in zip(a.places, layer_map(layer_scores(a, b)), strict=True)}


def pair_mlps(a: MlpSamples, b: MlpSamples, layer_map: Mapping[int, int] | None = None) -> MlpPairing:
    """Pairs of MLPs to test and mismatched ones for the null.

    `layer_map`: the reference's layer for each of the candidate's, where it is known; else by signature. Of layers with
    several MLPs each of the candidate's (of many, 16) gets the one with the most similar summary; the most similar
    pairs are kept.
    Raises CheckpointUnavailable.
    """
    found = layer_map is None
    layer_map = map_layers(a, b) if layer_map is None else layer_map
    layer_map = {one: other for one, other in layer_map.items() if one in a.places and other in b.places}
    searched = len(a.places) * len(b.places) if found else 0
    mapped: list[PlacePair] = []
    layers = spread(list(layer_map), _layer_count(a, b))
    for one in layers:
        pairs, compared = _pairs_of_layer(a, b, one, layer_map[one], max(1, PAIRS // len(layers)))
        mapped += pairs
        searched += compared
    copies = (_copies(a, [one for one, _ in mapped]), _copies(b, [other for _, other in mapped]))
    mismatched = _mismatched(mapped, copies)
    return MlpPairing(tuple(mapped), tuple(mismatched), dict(layer_map), max(searched, len(mapped)), copies)


def _layer_count(a: MlpSamples, b: MlpSamples) -> int:
    most = max((len(places) for side in (a, b) for places in side.places.values()), default=1)
    return LAYERS_OF_MANY if most > MANY_EXPERTS else LAYERS


def _pairs_of_layer(a: MlpSamples, b: MlpSamples, one: int, other: int, count: int) -> tuple[list[PlacePair], int]:
    import torch

    from checks.statistics.layer_map import expert_pairs

    ours, theirs = a.some(one, EXPERTS), b.places[other]
    # Count and summary one MLP after the other: more than a few are not kept, and would be read twice.
    summaries = [
        {place: side.summary(place).cpu() for place in places if side.neurons(place).count}
        for side, places in ((a, ours), (b, theirs))
    ]
    if not all(summaries):
        return [], 0
    ours, theirs = (tuple(one) for one in summaries)
    if len(ours) == len(theirs) == 1:
        return [(ours[0], theirs[0])], 0
    features = [torch.stack(list(one.values())) for one in summaries]
    pairs, compared = expert_pairs(features[0], features[1], count)
    return [(ours[pair.candidate], theirs[pair.reference]) for pair in pairs], compared


def _mismatched(
    mapped: list[PlacePair], copies: tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]]
) -> list[PlacePair]:
    """Pairs of MLPs of layers that do not belong together, among those that are tested anyway."""
    from checks.statistics.layer_map import mismatched_pairs

    first_of: tuple[dict[int, MlpPlace], dict[int, MlpPlace]] = ({}, {})
    for pair in mapped:
        for side, place in enumerate(pair):
            first_of[side].setdefault(place.layer, place)
    layers = mismatched_pairs(
        sorted({(one.layer, other.layer) for one, other in mapped}),
        sorted(first_of[0]),
        sorted(first_of[1]),
        lambda layer: _with_copies(layer, copies[0]),
        lambda layer: _with_copies(layer, copies[1]),
        MISMATCHED,
    )
    return [(first_of[0][one], first_of[1][other]) for one, other in layers]


def _with_copies(layer: int, copies: Collection[tuple[int, int]]) -> set[int]:
    return {layer} | {other for pair in copies if layer in pair for other in pair}


def _copies(samples: MlpSamples, places: list[MlpPlace]) -> tuple[tuple[int, int], ...]:
    """Pairs of layers of one model that repeat each other: most neurons of one have the same neighbour by two views."""
    from checks.statistics.double_matching import nearest_agreement

    by_layer = {place.layer: place for place in places}
    found = []
    for one, other in combinations(sorted(by_layer), 2):
        x, y = samples.neurons(by_layer[one]), samples.neurons(by_layer[other])
        if len(x.others) != len(y.others):
            continue
        rows = slice(0, COPY_ROWS)
        first, second = x.fixed[rows] @ y.fixed.T, x.others[0][rows] @ y.others[0].T
        if nearest_agreement(first, second) > COPIED:
            found.append((one, other))
    return tuple(found)
