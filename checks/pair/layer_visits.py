"""What the measures of a pair want of each layer, taken while the layer is at hand."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from checks.checkpoint.errors import CheckpointUnavailable
from checks.pair import layer_spectra, measures, row_clouds
from checks.pair.mlp_pairs import REPRESENTATIVES

if TYPE_CHECKING:
    from checks.checkpoint.canonical import CanonicalModel
    from checks.pair.aligned import CommonFrame
    from checks.pair.layer_sweep import Visitor
    from checks.pair.pair import Pair

Measure = Callable[["Pair"], Any]

# The measures of each check that want something of every layer. What is not listed is read when a check asks for it.
WANTED_BY: Mapping[str, tuple[Measure, ...]] = {
    "independence.units": (measures.pairing,),
    "independence.channels": (measures.channels,),
    "independence.neurons": (measures.matching_by_tokens,),
    "independence.anchored": (measures.matching_by_anchors,),
    "independence.alignment": (measures.alignment, measures.matching_by_anchors),
    "distribution.pca": (measures.clouds,),
    "distribution.wasserstein": (measures.clouds, measures.elements),
    "distribution.spectrum": (measures.spectra,),
}


def layer_visitors(pair: Pair, wanted: Collection[Measure]) -> list[Visitor]:
    """Visitors for these measures, except for what cannot be had: whoever asks for that hears why."""
    visitors: list[Visitor] = []
    for make, those in _VISITORS:
        if not those.isdisjoint(wanted):
            with suppress(CheckpointUnavailable):
                visitor = make(pair)
                visitors += [] if visitor is None else [visitor]
    return visitors


def _channels(pair: Pair) -> Visitor | None:
    sweep = pair.once(measures.channel_sweep)
    return None if sweep is None else sweep.visit


def _samples(pair: Pair) -> Visitor:
    sides = pair.once(measures.samples)

    def visit(layer: int | None) -> None:
        for side in sides:
            if layer is not None and layer in side.places:
                for place in side.some(layer, REPRESENTATIVES):
                    side.signature(place)

    return visit


def _alignment(pair: Pair) -> Visitor | None:
    if not len(pair.once(measures.tokens)):
        return None

    made: list[CommonFrame | None] = []

    def visit(layer: int | None) -> None:
        if layer is None:
            return
        if not made:
            # When the first layer comes, by when the embeddings are mostly there; once, also if it fails.
            made.append(None)
            made[0] = pair.once(measures.frame)
        if made[0] is not None:
            made[0].visit(layer)

    return visit


def _clouds(pair: Pair) -> Visitor | None:
    ours, theirs = pair.canonical
    # Weights that are read in part have no whole embedding, without which there is nothing to take.
    if pair.is_sampled or ours.hidden_size != theirs.hidden_size:
        return None
    return _of_each(pair, lambda model, layer, _: row_clouds.visit_clouds(model, layer, measures.SEED))


def _elements(pair: Pair) -> Visitor | None:
    if pair.is_sampled:
        return None  # as for clouds
    return _of_each(pair, lambda model, layer, _: row_clouds.visit_elements(model, layer, measures.SEED))


def _spectra(pair: Pair) -> Visitor:
    return _of_each(pair, lambda model, layer, config: layer_spectra.visit_spectra(model, layer, config))


def _of_each(pair: Pair, take: Callable[[CanonicalModel, int | None, Mapping[str, Any]], None]) -> Visitor:
    """Takes something of a layer of each model that has it, by the model and its config.json."""
    configs = (pair.candidate.checkpoint.config, pair.reference.checkpoint.config)

    def visit(layer: int | None) -> None:
        for model, config in zip(pair.canonical, configs, strict=True):
            if layer is None or layer in model.layers:
                take(model, layer, config)

    return visit


# Who takes what these measures want of a layer.
_VISITORS: tuple[tuple[Callable[[Pair], Visitor | None], frozenset[Measure]], ...] = (
    (_channels, frozenset({measures.channels})),
    (_samples, frozenset({measures.pairing, measures.matching_by_tokens, measures.matching_by_anchors})),
    (_alignment, frozenset({measures.alignment})),
    (_clouds, frozenset({measures.clouds})),
    (_elements, frozenset({measures.elements})),
    (_spectra, frozenset({measures.spectra})),
)
