"""Candidate and reference side by side: what every check of the pair shares."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from checks.checkpoint.canonical import CanonicalModel
from checks.checkpoint.checkpoint import Checkpoint
from checks.checkpoint.comparison import Comparison, compare
from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.matching import mlp_pairs
from checks.checkpoint.model import Model
from checks.checkpoint.neurons import NeuronGroup, neuron_groups, require_fit, unit_tests

if TYPE_CHECKING:
    from checks.checkpoint.ledger import LayerStore
    from checks.claim.initial import InitialWeights
    from checks.statistics.units import UnitTests

Measured = TypeVar("Measured")


class Pair:
    """A candidate and a reference, or one component of both. Statistics are computed once and shared.

    `tests_neurons`: does any check ask for `neurons` or `units`? Then one pass over the weights serves these too.
    `store`: keeps what was measured, layer by layer. `initial`: what the claim says of the initial weights.
    """

    def __init__(
        self,
        candidate: Model,
        reference: Model,
        device: Callable[[], str] = lambda: "cpu",
        claimed_prefixes: tuple[str, ...] = ("",),
        *,
        tests_neurons: bool = True,
        store: LayerStore | None = None,
        initial: InitialWeights | None = None,
    ) -> None:
        self.candidate = candidate
        self.reference = reference
        self._claimed_prefixes = claimed_prefixes
        self._device = device
        self._tests_neurons = tests_neurons
        self._store = store
        self.initial = initial
        self._failure: CheckpointUnavailable | None = None
        self._measured: dict[Callable[[Pair], Any], Any] = {}

    def read(self) -> dict[str, Any]:
        """What was read, for the record: digests, sizes, and what of the candidate no component of the claim names."""
        sides: dict[str, Any] = {
            side: {
                "name": model.name,
                "prefix": model.checkpoint.prefix,
                "tensors": len(model.checkpoint.tensors),
                "elements": model.checkpoint.parameters,
                "roles": model.checkpoint.roles.summary(),
                **model.checkpoint.provenance,
                **_digests(model.checkpoint),
            }
            for side, model in (("candidate", self.candidate), ("reference", self.reference))
        }
        sides["candidate"]["outside_components"] = self.candidate.checkpoint.share_outside(self._claimed_prefixes)
        return sides

    def elementwise(self) -> Comparison:
        """Sums, hashes and equal tensors of the pair. Raises CheckpointUnavailable, the same way every time."""
        if self._failure is not None:
            raise type(self._failure)(str(self._failure))
        try:
            return self._comparison
        except CheckpointUnavailable as error:
            self._failure = error
            raise

    @cached_property
    def canonical(self) -> tuple[CanonicalModel, CanonicalModel]:
        """Candidate and reference in canonical form, on the device. Raises CheckpointUnavailable."""
        ours, theirs = (CanonicalModel(one.checkpoint, self._device()) for one in (self.candidate, self.reference))
        return ours, theirs

    @property
    def device(self) -> str:
        """The torch device of this worker."""
        return self._device()

    def once(self, measure: Callable[[Pair], Measured]) -> Measured:
        """What `measure` finds of this pair: measured when first asked for, then shared by all checks."""
        if measure not in self._measured:
            self._measured[measure] = measure(self)
        found: Measured = self._measured[measure]
        return found

    def neurons(self) -> tuple[NeuronGroup, ...]:
        """The unit permutation tests of every MLP of equal shape. Raises CheckpointUnavailable."""
        require_fit(self.candidate.checkpoint, mlp_pairs(self.candidate.checkpoint, self.reference.checkpoint))
        neurons = self.elementwise().neurons
        return self._neuron_groups if neurons is None else neurons

    def units(self) -> UnitTests | None:
        """The permutation tests of all MLPs together; None when no MLP of equal shape can be tested."""
        return unit_tests(self.candidate.checkpoint, self.neurons())

    @cached_property
    def _comparison(self) -> Comparison:
        return compare(
            self.candidate.checkpoint,
            self.reference.checkpoint,
            self._device(),
            with_neurons=self._tests_neurons,
            store=self._store,
        )

    @cached_property
    def _neuron_groups(self) -> tuple[NeuronGroup, ...]:
        return tuple(neuron_groups(self.candidate.checkpoint, self.reference.checkpoint, self._device()))


def _digests(checkpoint: Checkpoint) -> dict[str, Any]:
    """What tells which weights were read: one digest of all tensors; or those that the hub publishes of the shards, if
    not all tensors were read. Raises CheckpointUnavailable.
    """
    unread = {entry.stored.shard for name, entry in checkpoint.tensors.items() if name not in checkpoint._sha256}
    published = {name: checkpoint.index.shards[name].published_sha256 for name in sorted(unread)}
    if published and all(published.values()):
        return {"sha256": None, "shards": published}
    return {"sha256": checkpoint.digest()}
