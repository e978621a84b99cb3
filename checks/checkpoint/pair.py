"""Candidate and reference side by side: one pass over their tensors that every check of the pair shares."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from checks.checkpoint.checkpoint import Checkpoint, TensorEntry
from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.model import Model
from checks.checkpoint.roles import CATEGORIES

if TYPE_CHECKING:
    from checks.statistics.elementwise import ElementwiseSums
    from checks.statistics.units import CombinedUnitTest, UnitTest

# Categories whose elements are no weight matrix of a layer.
_NOT_IN_LAYERS = frozenset({"norm", "bias", "embedding", "output"})


@dataclass(frozen=True)
class TensorComparison:
    """Two tensors of equal name and shape, and their sums."""

    entry: TensorEntry
    sums: ElementwiseSums

    @property
    def cosine(self) -> float | None:
        """Centred cosine, -1 to 1; None for a constant tensor or one without finite values."""
        return self.sums.centred_cosine


@dataclass(frozen=True)
class CosineSummary:
    """Size-weighted centred cosine of a group of tensors, and how much of the candidate it speaks of."""

    cosine: float | None
    raw_cosine: float | None
    elements: int  # elements compared
    candidate_elements: int  # elements of the same kind that the candidate has
    null_elements: int  # independent elements that the null spread 5/sqrt(n) may count on
    tensors: int

    @property
    def coverage(self) -> float:
        """Share of the candidate's elements of this kind that was compared, 0 to 1."""
        return self.elements / self.candidate_elements if self.candidate_elements else 0.0


@dataclass(frozen=True)
class Comparison:
    """Everything that one pass over a pair computes."""

    candidate: Checkpoint
    compared: tuple[TensorComparison, ...]
    identical: tuple[tuple[str, str], ...]  # (candidate's, reference's) names of tensors of equal bytes
    ordinary: dict[str, str] = field(default_factory=dict)  # equal tensors that any model could have: name → reason
    nonfinite: dict[str, int] = field(default_factory=dict)  # tensor → elements that are not finite on either side

    @cached_property
    def is_layered(self) -> bool:
        """Do the candidate's names number its layers? Otherwise all its matrices are one block, layer 0."""
        return any(entry.role.layer is not None for entry in self.candidate.tensors.values())

    def layers(self) -> list[int]:
        """Layers of the candidate that have weight matrices."""
        return sorted({self._layer(entry) for entry in self._matrices()})

    def layer(self, layer: int) -> CosineSummary:
        """The weight matrices of one layer."""
        return self._summary(entry for entry in self._matrices() if self._layer(entry) == layer)

    def mean(self, layers: Sequence[int] | None = None) -> CosineSummary:
        """Mean over layers (all, or some) of their size-weighted centred cosine: every layer weighs the same."""
        per_layer = [self.layer(index) for index in (self.layers() if layers is None else layers)]
        defined = [summary for summary in per_layer if summary.cosine is not None]
        matrices = sum(summary.candidate_elements for summary in per_layer)
        return CosineSummary(
            cosine=_weighted([(summary.cosine, 1) for summary in defined]),
            raw_cosine=_weighted([(summary.raw_cosine, 1) for summary in defined]),
            elements=sum(summary.elements for summary in per_layer),
            candidate_elements=matrices,
            null_elements=sum(summary.null_elements for summary in defined),
            tensors=sum(summary.tensors for summary in per_layer),
        )

    def layer_cosines(self) -> dict[int, float | None]:
        """The centred cosine of every layer; None where nothing could be compared."""
        return {index: self.layer(index).cosine for index in self.layers()}

    def category(self, category: str) -> CosineSummary:
        """All tensors of one category, except those whose index has a meaning of its own."""
        return self._summary(
            entry
            for entry in self.candidate.tensors.values()
            if entry.role.category == category and not entry.role.index_has_meaning
        )

    def categories(self) -> list[str]:
        """Categories that the candidate has and that can decide."""
        present = {entry.role.category for entry in self.candidate.tensors.values() if not entry.role.index_has_meaning}
        return [category for category in CATEGORIES if category in present]

    @cached_property
    def _by_name(self) -> dict[str, TensorComparison]:
        return {one.entry.name: one for one in self.compared}

    def _layer(self, entry: TensorEntry) -> int:
        if not self.is_layered:
            return 0
        return -1 if entry.role.layer is None else entry.role.layer

    def _matrices(self) -> list[TensorEntry]:
        return [
            entry
            for entry in self.candidate.tensors.values()
            if len(entry.shape) >= 2
            and entry.role.category not in _NOT_IN_LAYERS
            and (entry.role.layer is not None or not self.is_layered)
        ]

    def _summary(self, entries: Iterable[TensorEntry]) -> CosineSummary:
        wanted = list(entries)
        total = sum(entry.elements for entry in wanted)
        compared = [self._by_name[entry.name] for entry in wanted if entry.name in self._by_name]
        defined = [one for one in compared if one.cosine is not None]
        elements = sum(one.entry.elements for one in defined)
        vectors_only = all(len(one.entry.shape) < 2 for one in defined)
        # Gain vectors of a model's layers resemble each other: they count as one vector, the longest.
        null_elements = max((one.sums.n for one in defined), default=0) if vectors_only else elements
        return CosineSummary(
            cosine=_weighted([(one.cosine, one.sums.n) for one in defined]),
            raw_cosine=_weighted([(one.sums.cosine, one.sums.n) for one in defined]),
            elements=elements,
            candidate_elements=total,
            null_elements=null_elements,
            tensors=len(defined),
        )


@dataclass(frozen=True)
class NeuronGroup:
    """The permutation test of the hidden units of one MLP (of one expert)."""

    layer: int
    category: str
    expert: int | None
    test: UnitTest


class Pair:
    """A candidate and a reference, or one component of both. Statistics are computed once and shared."""

    def __init__(self, candidate: Model, reference: Model, device: Callable[[], str] = lambda: "cpu") -> None:
        self.candidate = candidate
        self.reference = reference
        self._device = device

    def read(self) -> dict[str, Any]:
        """What was read, for the record: digests and sizes of both sides."""
        return {
            side: {"name": model.name, "tensors": len(model.checkpoint.tensors), "sha256": model.checkpoint.digest()}
            for side, model in (("candidate", self.candidate), ("reference", self.reference))
        }

    @cached_property
    def _comparison(self) -> Comparison:
        return compare(self.candidate.checkpoint, self.reference.checkpoint, self._device())

    def elementwise(self) -> Comparison:
        """Sums, hashes and equal tensors of the pair. Raises CheckpointUnavailable."""
        return self._comparison

    @cached_property
    def _neuron_groups(self) -> tuple[NeuronGroup, ...]:
        return tuple(neuron_groups(self.candidate.checkpoint, self.reference.checkpoint, self._device()))

    def neurons(self) -> tuple[NeuronGroup, ...]:
        """The unit permutation test of every MLP of equal shape. Raises CheckpointUnavailable."""
        return self._neuron_groups

    def units(self) -> CombinedUnitTest | None:
        """The permutation tests of all MLPs combined; None when no MLP of equal shape can be tested."""
        from checks.statistics.units import combine

        return combine(group.test for group in self.neurons())


def compare(candidate: Checkpoint, reference: Checkpoint, device: str = "cpu") -> Comparison:
    """Read both checkpoints once: hash every tensor, and sum over the pairs of equal name and shape."""
    from checks.statistics.elementwise import elementwise_sums
    from checks.statistics.ordinary import ordinary_reason

    compared = []
    nonfinite = {}
    for name, entry in candidate.tensors.items():
        tensor = candidate.read(name)
        candidate.sha256(name, tensor)
        other = reference.tensors.get(name)
        if other is None or other.shape != entry.shape:
            continue
        other_tensor = reference.read(name)
        reference.sha256(name, other_tensor)
        if entry.is_float and other.is_float:
            sums = elementwise_sums(tensor.to(device), other_tensor.to(device))
            compared.append(TensorComparison(entry, sums))
            if sums.nonfinite:
                nonfinite[name] = sums.nonfinite
    identical, ordinary = [], {}
    for name, other_name in _equal_tensors(candidate, reference):
        reason = ordinary_reason(candidate.read(name))
        if reason is None:
            identical.append((name, other_name))
        else:
            ordinary[name] = reason
    return Comparison(candidate, tuple(compared), tuple(identical), ordinary, nonfinite)


def _equal_tensors(candidate: Checkpoint, reference: Checkpoint) -> list[tuple[str, str]]:
    """Tensors of equal bytes and dtype, names and shapes ignored; one reference name for each of the candidate's."""
    by_hash: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, entry in reference.tensors.items():
        by_hash[entry.dtype, reference.sha256(name)].append(name)
    pairs = []
    for name, entry in candidate.tensors.items():
        names = by_hash.get((entry.dtype, candidate.sha256(name)))
        if names:
            pairs.append((name, name if name in names else names[0]))
    return pairs


def neuron_groups(candidate: Checkpoint, reference: Checkpoint, device: str = "cpu") -> list[NeuronGroup]:
    """The unit permutation test (T1a) of each MLP that both sides have with equal shapes, by layer and expert index."""
    from checks.statistics.units import UnitTest, unit_permutation_test

    ours, theirs = _mlp_matrices(candidate), _mlp_matrices(reference)
    groups = []
    for key, kinds in ours.items():
        others = theirs.get(key, {})
        if not {"up", "down"} <= kinds.keys() or kinds.keys() != others.keys():
            continue
        if any(kinds[kind].shape != others[kind].shape for kind in kinds):
            continue
        units = kinds["up"].shape[0]
        if kinds["down"].shape[1] != units:
            raise CheckpointUnavailable(
                f"{candidate.directory}: {kinds['down'].stored_name} has {kinds['down'].shape[1]} columns where "
                f"{kinds['up'].stored_name} has {units} rows; the checkpoint does not fit its own names"
            )
        views_a = [_units_first(candidate, kinds[kind], kind, device) for kind in sorted(kinds)]
        views_b = [_units_first(reference, others[kind], kind, device) for kind in sorted(kinds)]
        layer, category, expert = key
        if all(bool(view.isfinite().all()) for view in (*views_a, *views_b)):
            test = unit_permutation_test(views_a, views_b)
        else:
            test = UnitTest(None, None, None, units, "its matrices hold non-finite values")
        groups.append(NeuronGroup(layer, category, None if expert < 0 else expert, test))
    return groups


def _mlp_matrices(checkpoint: Checkpoint) -> dict[tuple[int, str, int], dict[str, TensorEntry]]:
    groups: dict[tuple[int, str, int], dict[str, TensorEntry]] = defaultdict(dict)
    for entry in checkpoint.tensors.values():
        group, kind = entry.role.mlp_group, entry.role.kind
        if group is not None and kind is not None and len(entry.shape) == 2 and entry.is_float:
            groups[group][kind] = entry
    return dict(sorted(groups.items()))


def _units_first(checkpoint: Checkpoint, entry: TensorEntry, kind: str, device: str) -> Any:
    """An MLP matrix with its hidden units as rows."""
    matrix = checkpoint.read(entry.name).to(device)
    return matrix.T if kind == "down" else matrix


def _weighted(pairs: list[tuple[float | None, int]]) -> float | None:
    """Mean of the defined values, weighted by size; None when there is none."""
    defined = [(value, size) for value, size in pairs if value is not None]
    total = sum(size for _, size in defined)
    if not total:
        return None
    return math.fsum(value * size for value, size in defined) / total
