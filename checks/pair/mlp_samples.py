"""The neurons of a model's MLPs, sampled by size, read once and kept as long as memory allows."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

from checks.checkpoint.canonical import CanonicalModel, MlpPlace
from checks.checkpoint.errors import CheckpointUnavailable

if TYPE_CHECKING:
    from torch import Tensor

    from checks.statistics.neuron_signature import Neurons

# Neurons of each of the candidate's MLPs, and of the reference's: more, so that most of the largest have a partner.
UNITS = (1024, 2048)
# Bytes of neurons that are kept for each model; what is dropped is read again.
KEPT_BYTES = 3 << 30


Item = TypeVar("Item")


class MlpSamples:
    """Neurons, signatures and summaries of the MLPs of one model. Each MLP is read when it is first asked for.

    `count`: neurons of each MLP at most, the largest ones (`make_neurons`). `with_up`: False to compare with a model of
    the other kind, with or without a gate. `layers`: restrict to these.
    """

    def __init__(
        self,
        model: CanonicalModel,
        count: int,
        with_up: bool = True,
        layers: tuple[int, ...] | None = None,
        kept_bytes: int = KEPT_BYTES,
    ) -> None:
        self.model = model
        self._with_up = with_up
        self.places: dict[int, tuple[MlpPlace, ...]] = {}
        for layer in model.layers if layers is None else layers:
            if found := model.mlps(layer):
                self.places[layer] = found
        self._count = count
        self._kept_bytes = kept_bytes
        self._neurons: OrderedDict[MlpPlace, Neurons] = OrderedDict()
        self._signatures: dict[MlpPlace, Tensor] = {}
        self._summaries: dict[MlpPlace, Tensor] = {}

    @property
    def is_dense(self) -> bool:
        """Has every layer one MLP?"""
        return all(len(places) == 1 for places in self.places.values())

    def neurons(self, place: MlpPlace) -> Neurons:
        """The sampled neurons of an MLP, norms folded. Raises CheckpointUnavailable."""
        from checks.statistics.neuron_signature import make_neurons

        if place in self._neurons:
            self._neurons.move_to_end(place)
            return self._neurons[place]
        mlp = self.model.mlp(place, folded=True)
        try:
            found = make_neurons(mlp.gate, mlp.up, mlp.down, self._count)
        except ValueError as error:
            raise CheckpointUnavailable(f"the MLP of layer {place.layer} ({name_of(place)}): {error}") from error
        self._neurons[place] = found = found if self._with_up else found.without_up()
        held = sum(_bytes(one) for one in self._neurons.values())
        while held > self._kept_bytes and len(self._neurons) > 1:
            held -= _bytes(self._neurons.popitem(last=False)[1])
        return found

    def signature(self, place: MlpPlace) -> Tensor:
        """Features of the sampled neurons that no change of basis or numbering alters. Raises CheckpointUnavailable."""
        from checks.statistics.neuron_signature import signature

        if place not in self._signatures:
            self._signatures[place] = signature(self.neurons(place))
        return self._signatures[place]

    def summary(self, place: MlpPlace) -> Tensor:
        """Features of the MLP as a whole. Raises CheckpointUnavailable."""
        from checks.statistics.neuron_signature import summary

        if place not in self._summaries:
            self._summaries[place] = summary(self.neurons(place))
        return self._summaries[place]

    def some(self, layer: int, count: int) -> tuple[MlpPlace, ...]:
        """MLPs of a layer: all of a few, else `count` evenly spread ones, the first and the last among them."""
        places = self.places[layer]
        return places if len(places) <= count else tuple(spread(places, count))


def sample_mlps(
    candidate: CanonicalModel,
    reference: CanonicalModel,
    units: tuple[int, int] = UNITS,
    layers: tuple[tuple[int, ...] | None, tuple[int, ...] | None] = (None, None),
) -> tuple[MlpSamples, MlpSamples]:
    """The MLPs of both models, sampled so that they can be compared: `units` neurons of each, of the reference more.

    Where one model has gates and the other has none, both do without the up projections. `layers`: only these.
    """
    kinds = [
        {place.has_gate for layer in model.layers for place in model.mlps(layer)} for model in (candidate, reference)
    ]
    with_up = len(kinds[0] | kinds[1]) < 2
    return (
        MlpSamples(candidate, units[0], with_up, layers[0]),
        MlpSamples(reference, units[1], with_up, layers[1]),
    )


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """At most `count` of the items, 2 or more, evenly spread, the first and the last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(number * (len(items) - 1) / (count - 1))] for number in range(count)]


def name_of(place: MlpPlace) -> str:
    """`dense`, `shared` or `expert 3`."""
    return place.kind if place.expert is None else f"expert {place.expert}"


def _bytes(neurons: Neurons) -> int:
    views = (neurons.fixed, *neurons.others)
    return sum(view.numel() * view.element_size() for view in views)
