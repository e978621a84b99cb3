"""What one pass over two checkpoints says: cosines by layer and category, and equal tensors under any name."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from checks.checkpoint.checkpoint import Checkpoint, TensorEntry
from checks.checkpoint.roles import CATEGORIES
from checks.pair.matching import predicts_further_tokens, tensor_pairs
from checks.pair.telling_tensors import why_undecided

if TYPE_CHECKING:
    from checks.pair.fingerprints import Fingerprints
    from checks.pair.layer_sweep import LayerSweep
    from checks.pair.ledger import LayerStore
    from checks.pair.neurons import NeuronGroup
    from checks.statistics.elementwise import ElementwiseSums
    from checks.statistics.magnitude import RobustCosine
    from checks.statistics.sampling import CosineEstimate
    from checks.streaming.read_plan import ReadPlan

# Categories whose elements are no weight matrix of a layer.
_NOT_IN_LAYERS = frozenset({"norm", "bias", "embedding", "output"})
# Rows of these share a mean direction within a model, which correlates by chance like one vector.
_SHARED_DIRECTION = frozenset({"embedding", "output"})
# From here on five standard deviations of a chance cosine, 5/sqrt(n), are at most 0.1.
TELLING_ELEMENTS = 2500


@dataclass(frozen=True)
class TensorComparison:
    """Two tensors of equal role, or name, and shape. `sums`: None if they are equal, and were not read to know it.

    `estimate`: of tensors that were read by a plan, in part or whole; there are no sums of all elements then, and
    `drawn` are those of what was read. `robust`: of some tensors, see `companions`.
    """

    entry: TensorEntry
    sums: ElementwiseSums | None
    reference_name: str | None = None
    estimate: CosineEstimate | None = None
    drawn: ElementwiseSums | None = None
    robust: RobustCosine | None = None

    @property
    def cosine(self) -> float | None:
        """Centred cosine, -1 to 1, estimated if need be; None for a constant tensor or one without finite values."""
        if self.estimate is not None:
            return self.estimate.cosine
        return 1.0 if self.sums is None else self.sums.centred_cosine

    @property
    def certain_cosine(self) -> float | None:
        """The centred cosine, or of an estimate the end of its interval that is nearer to 0; None without either."""
        if self.estimate is None or self.estimate.is_complete or self.estimate.drawn_equal:
            return self.cosine
        interval = self.estimate.interval
        if interval is None:
            return None
        return 0.0 if interval[0] <= 0 <= interval[1] else min(interval, key=abs)

    @property
    def raw_cosine(self) -> float | None:
        """Cosine of the tensors as they are, -1 to 1; None for zeros, without finite values, and for an estimate."""
        if self.estimate is not None:
            return None
        return 1.0 if self.sums is None else self.sums.cosine

    @property
    def elements(self) -> int:
        """Elements that are finite on both sides; of an estimate those that it speaks of, read or not."""
        return self.entry.elements if self.sums is None else self.sums.n

    @property
    def freedom(self) -> int:
        """Independent elements of the cosine, of those that were read: centring takes one."""
        return max(0, (self.elements if self.estimate is None else self.estimate.elements_read) - 1)


@dataclass(frozen=True)
class CosineSummary:
    """Size-weighted centred cosine of a group of tensors, and how much of the candidate it speaks of."""

    cosine: float | None
    raw_cosine: float | None
    elements: int  # finite elements compared
    candidate_elements: int  # elements of the same kind that the candidate has
    null_elements: int  # independent elements that the null spread 5/sqrt(n) may count on
    tensors: int
    counterparts: int  # tensors with a counterpart, also those whose cosine is undefined
    strongest: tuple[str, float] | None = None  # the matrix with the largest |cosine|, of those large enough to tell
    estimate: CosineEstimate | None = None  # where not everything was read
    may_support: bool = True  # False where so little was read that it may only contradict

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
    ordinary: dict[str, str] = field(default_factory=dict)  # tensors that any model could have: name → reason
    nonfinite: dict[str, int] = field(default_factory=dict)  # tensor → elements that are not finite on either side
    neurons: tuple[NeuronGroup, ...] | None = None  # the tests of the MLPs' neurons, if they were asked for
    fingerprints: tuple[Fingerprints, Fingerprints] | None = None  # of all tensors, if they were asked for
    plan: ReadPlan | None = None  # what was read; None for everything
    paired: frozenset[str] = frozenset()  # with a plan: the candidate's tensors with a counterpart, read or not

    @property
    def is_sampled(self) -> bool:
        """Was it read in part, so that cosines are estimates, and there are no hashes and sums?"""
        return self.plan is not None

    @cached_property
    def is_layered(self) -> bool:
        """Do the candidate's names number its layers? Otherwise all its matrices are one block, layer 0."""
        return self._stack is not None

    @cached_property
    def undecided(self) -> dict[str, str]:
        """Compared tensors whose likeness says nothing by itself, norms apart: name → reason; see `why_undecided`."""
        entries = (one.entry for one in self.compared if one.entry.role.category != "norm")
        reasons = ((entry.name, why_undecided(entry)) for entry in entries if not entry.role.index_has_meaning)
        return {name: reason for name, reason in reasons if reason is not None}

    def layers(self) -> list[int]:
        """Layers of the candidate that have weight matrices."""
        return sorted(self._matrices_by_layer)

    def layer(self, layer: int) -> CosineSummary:
        """The weight matrices of one layer."""
        return self._summary(self._matrices_by_layer.get(layer, []), self._is_read(layer))

    def mean(self, layers: Sequence[int] | None = None) -> CosineSummary:
        """Mean over layers (all, or some) of their size-weighted centred cosine: every layer weighs the same.

        Its variance is Σ(1/n_l)/L² for layers of n_l independent elements, which gives the null elements. Matrices that
        belong to no layer of the main stack count as not compared.
        """
        per_layer = [self.layer(index) for index in (self.layers() if layers is None else layers)]
        defined = [summary for summary in per_layer if summary.cosine is not None]
        variance = math.fsum(1 / max(1, summary.null_elements) for summary in defined)
        return CosineSummary(
            cosine=_weighted([(summary.cosine, 1) for summary in defined]),
            raw_cosine=_weighted([(summary.raw_cosine, 1) for summary in defined]),
            elements=sum(summary.elements for summary in per_layer),
            candidate_elements=sum(summary.candidate_elements for summary in per_layer) + self._unnumbered_elements,
            null_elements=int(len(defined) ** 2 / variance) if defined else 0,
            tensors=sum(summary.tensors for summary in per_layer),
            counterparts=sum(summary.counterparts for summary in per_layer),
            strongest=_strongest(summary.strongest for summary in per_layer),
            estimate=_combined((summary.estimate, 1) for summary in defined),
            may_support=self.plan is None or self.plan.may_support,
        )

    def layer_cosines(self) -> dict[int, float | None]:
        """The centred cosine of every layer; None where nothing could be compared."""
        return {index: self.layer(index).cosine for index in self.layers()}

    def category(self, category: str) -> CosineSummary:
        """The tensors of one category, except those whose index has or may have a meaning of its own."""
        return self._summary(
            [
                entry
                for entry in self.candidate.tensors.values()
                if entry.role.category == category and not entry.role.index_has_meaning
            ]
        )

    def categories(self) -> list[str]:
        """Categories that the candidate has and that can decide."""
        present = {entry.role.category for entry in self.candidate.tensors.values() if not entry.role.index_has_meaning}
        return [category for category in CATEGORIES if category in present]

    @cached_property
    def _by_name(self) -> dict[str, TensorComparison]:
        return {one.entry.name: one for one in self.compared}

    @cached_property
    def _matrices(self) -> list[TensorEntry]:
        return [
            entry
            for entry in self.candidate.tensors.values()
            if len(entry.shape) >= 2 and entry.role.category not in _NOT_IN_LAYERS and entry.name not in self.ordinary
        ]

    @cached_property
    def _stack(self) -> str | None:
        return main_stack(self._matrices)

    @cached_property
    def _matrices_by_layer(self) -> dict[int, list[TensorEntry]]:
        if self._stack is None:
            return {0: self._matrices} if self._matrices else {}
        layers: dict[int, list[TensorEntry]] = defaultdict(list)
        for entry in self._matrices:
            is_counted_on = predicts_further_tokens(entry)
            if entry.role.layer is not None and entry.role.stack == self._stack and not is_counted_on:
                layers[entry.role.layer].append(entry)
        return dict(layers)

    @cached_property
    def _unnumbered_elements(self) -> int:
        in_layers = sum(entry.weights for entries in self._matrices_by_layer.values() for entry in entries)
        return sum(entry.weights for entry in self._matrices) - in_layers

    def _is_read(self, layer: int) -> bool:
        """Does what was read say something of a layer? A screening does of those that it read whole."""
        return self.plan is None or self.plan.may_support or not self.is_layered or layer in self.plan.candidate.layers

    def _summary(self, entries: Iterable[TensorEntry], is_read: bool = True) -> CosineSummary:
        wanted = [entry for entry in entries if entry.name not in self.ordinary]
        compared = [self._by_name[entry.name] for entry in wanted if is_read and entry.name in self._by_name]
        # The norms of a category are pooled and count as one vector; other tensors have to be able to tell alone, since
        # nothing else of their group may have a counterpart.
        usable = [one for one in compared if one.entry.role.category == "norm" or why_undecided(one.entry) is None]
        defined = [one for one in usable if one.cosine is not None]
        # Gain vectors of a model's layers resemble each other, and the rows of an embedding or a head share a mean
        # direction: both count as one vector of the hidden dimension.
        shared = all(len(one.entry.shape) < 2 or one.entry.role.category in _SHARED_DIRECTION for one in defined)
        widths = [min(one.freedom, one.entry.shape[-1] if one.entry.shape else 1) for one in defined]
        return CosineSummary(
            cosine=_weighted([(one.cosine, one.elements) for one in defined]),
            raw_cosine=_weighted([(one.raw_cosine, one.elements) for one in defined]),
            elements=sum(one.elements for one in defined),
            candidate_elements=sum(entry.weights for entry in wanted),
            null_elements=max(widths, default=0) if shared else sum(one.freedom for one in defined),
            tensors=len(defined),
            counterparts=len(compared) if self.plan is None else sum(entry.name in self.paired for entry in wanted),
            strongest=_strongest(
                (one.entry.name, one.certain_cosine)
                for one, width in zip(defined, widths, strict=True)
                if one.certain_cosine is not None and why_undecided(one.entry) is None
                if (width if one.entry.role.category in _SHARED_DIRECTION else one.freedom) >= TELLING_ELEMENTS
            ),
            estimate=_combined((one.estimate, one.elements) for one in defined),
            may_support=self.plan is None or self.plan.may_support,
        )


def main_stack(entries: Iterable[TensorEntry]) -> str | None:
    """The name prefix of the layers that hold the most elements: the text decoder's beside a vision tower's.

    Blocks that predict further tokens are no such layers. None when no name numbers a layer.
    """
    sizes: Counter[str] = Counter()
    for entry in entries:
        if entry.role.layer is not None and not predicts_further_tokens(entry):
            sizes[entry.role.stack] += entry.elements
    return sizes.most_common(1)[0][0] if sizes else None


def compare(
    candidate: Checkpoint,
    reference: Checkpoint,
    device: str = "cpu",
    *,
    with_neurons: bool = False,
    with_fingerprints: bool = False,
    store: LayerStore | None = None,
    sweep: LayerSweep | None = None,
) -> Comparison:
    """Read both checkpoints once: hash every tensor, and sum over the pairs of equal role, or name, and shape.

    A tensor that any model could have on both sides (a rotary table, a mask, all zeros) is no weight: it is listed as
    ordinary and not compared. `with_neurons`: test the neurons of the MLPs as well, from the same reading.
    `with_fingerprints`: take those of all tensors from it. `store`: layers that it has are not read again. `sweep`:
    gets the layers that are read. Raises CheckpointUnavailable.
    """
    from checks.pair.measurement import measure

    measured = measure(candidate, reference, device, with_neurons, store, with_fingerprints, sweep)
    compared = tuple(
        TensorComparison(candidate.tensors[name], one.sums, other, robust=one.robust)
        for (name, other), one in measured.tensors.items()
        if one.ordinary is None
    )
    nonfinite = {one.entry.name: one.sums.nonfinite for one in compared if one.sums and one.sums.nonfinite}
    return Comparison(
        candidate,
        compared,
        measured.identical,
        dict(measured.ordinary),
        nonfinite,
        neurons=measured.neurons,
        fingerprints=measured.fingerprints,
    )


def compare_part(
    candidate: Checkpoint,
    reference: Checkpoint,
    plan: ReadPlan,
    device: str = "cpu",
    *,
    with_neurons: bool = False,
    store: LayerStore | None = None,
) -> Comparison:
    """Like `compare`, from what a plan reads: cosines are estimates, and of equal bytes only is known what
    published digests tell.

    Raises CheckpointUnavailable.
    """
    from checks.pair.partial import measure_part

    measured = measure_part(candidate, reference, plan, device, with_neurons, store)
    for side in (candidate, reference):
        side.require_unchanged()
    tensors = {names: one for names, one in measured.tensors.items() if one.ordinary is None}
    return Comparison(
        candidate,
        tuple(
            TensorComparison(candidate.tensors[name], None, other, one.estimate, one.sums, one.robust)
            for (name, other), one in tensors.items()
        ),
        measured.identical,
        {name: one.ordinary for (name, _), one in measured.tensors.items() if one.ordinary is not None},
        {name: one.sums.nonfinite for (name, _), one in tensors.items() if one.sums.nonfinite},
        measured.neurons,
        plan=plan,
        paired=frozenset(tensor_pairs(candidate, reference)),
    )


def _combined(parts: Iterable[tuple[CosineEstimate | None, int]]) -> CosineEstimate | None:
    """The estimate of a weighted mean; None of none."""
    from checks.statistics.sampling import combine

    estimates = [(estimate, float(weight)) for estimate, weight in parts if estimate is not None]
    return combine(estimates) if estimates else None


def _strongest(tensors: Iterable[tuple[str, float] | None]) -> tuple[str, float] | None:
    """The tensor with the largest |cosine|; None of none."""
    return max((one for one in tensors if one is not None), key=lambda one: abs(one[1]), default=None)


def _weighted(pairs: list[tuple[float | None, int]]) -> float | None:
    """Mean of the defined values, weighted by size; None when there is none."""
    defined = [(value, size) for value, size in pairs if value is not None]
    total = sum(size for _, size in defined)
    if not total:
        return None
    return math.fsum(value * size for value, size in defined) / total
