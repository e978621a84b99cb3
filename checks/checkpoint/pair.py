"""Candidate and reference side by side: what every check of the pair shares."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

from checks.checkpoint.comparison import Comparison, compare
from checks.checkpoint.model import Model
from checks.checkpoint.neurons import NeuronGroup, neuron_groups, unit_tests

if TYPE_CHECKING:
    from checks.statistics.units import UnitTests


class Pair:
    """A candidate and a reference, or one component of both. Statistics are computed once and shared."""

    def __init__(
        self,
        candidate: Model,
        reference: Model,
        device: Callable[[], str] = lambda: "cpu",
        claimed_prefixes: tuple[str, ...] = ("",),
    ) -> None:
        self.candidate = candidate
        self.reference = reference
        self._claimed_prefixes = claimed_prefixes
        self._device = device

    def read(self) -> dict[str, Any]:
        """What was read, for the record: digests, sizes, and what of the candidate no component of the claim names."""
        sides: dict[str, Any] = {
            side: {
                "name": model.name,
                "prefix": model.checkpoint.prefix,
                "tensors": len(model.checkpoint.tensors),
                "elements": model.checkpoint.parameters,
                "roles": model.checkpoint.roles.inferred_because or dict(model.checkpoint.roles.templates),
                "sha256": model.checkpoint.digest(),
            }
            for side, model in (("candidate", self.candidate), ("reference", self.reference))
        }
        sides["candidate"]["outside_components"] = self.candidate.checkpoint.share_outside(self._claimed_prefixes)
        return sides

    def elementwise(self) -> Comparison:
        """Sums, hashes and equal tensors of the pair. Raises CheckpointUnavailable."""
        return self._comparison

    def neurons(self) -> tuple[NeuronGroup, ...]:
        """The unit permutation tests of every MLP of equal shape. Raises CheckpointUnavailable."""
        return self._neuron_groups

    def units(self) -> UnitTests | None:
        """The permutation tests of all MLPs together; None when no MLP of equal shape can be tested."""
        return unit_tests(self.candidate.checkpoint, self.neurons())

    @cached_property
    def _comparison(self) -> Comparison:
        return compare(self.candidate.checkpoint, self.reference.checkpoint, self._device())

    @cached_property
    def _neuron_groups(self) -> tuple[NeuronGroup, ...]:
        return tuple(neuron_groups(self.candidate.checkpoint, self.reference.checkpoint, self._device()))
