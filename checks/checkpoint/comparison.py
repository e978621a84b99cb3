"""One pass over two checkpoints: sums of tensors of equal name and shape, hashes, and equal tensors under any name."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from checks.checkpoint.checkpoint import Checkpoint, TensorEntry
from checks.checkpoint.roles import CATEGORIES

if TYPE_CHECKING:
    from checks.statistics.elementwise import ElementwiseSums

# Categories whose elements are no weight matrix of a layer.
_NOT_IN_LAYERS = frozenset({"norm", "bias", "embedding", "output"})
# Rows of these share a mean direction within a model, which correlates by chance like one vector.
_SHARED_DIRECTION = frozenset({"embedding", "output"})
# From here on five standard deviations of a chance cosine, 5/sqrt(n), are at most 0.1.
TELLING_ELEMENTS = 2500


@dataclass(frozen=True)
class TensorComparison:
    """Two tensors of equal name and shape, and their sums."""

    entry: TensorEntry
    sums: ElementwiseSums

    @property
    def cosine(self) -> float | None:
        """Centred cosine, -1 to 1; None for a constant tensor or one without finite values."""
        return self.sums.centred_cosine

    @property
    def freedom(self) -> int:
        """Independent elements of the cosine: centring takes one."""
        return max(0, self.sums.n - 1)


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

    @cached_property
    def is_layered(self) -> bool:
        """Do the candidate's names number its layers? Otherwise all its matrices are one block, layer 0."""
        return self._stack is not None

    def layers(self) -> list[int]:
        """Layers of the candidate that have weight matrices."""
        return sorted(self._matrices_by_layer)

    def layer(self, layer: int) -> CosineSummary:
        """The weight matrices of one layer."""
        return self._summary(self._matrices_by_layer.get(layer, []))

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
        )

    def layer_cosines(self) -> dict[int, float | None]:
        """The centred cosine of every layer; None where nothing could be compared."""
        return {index: self.layer(index).cosine for index in self.layers()}

    def category(self, category: str) -> CosineSummary:
        """All tensors of one category, except those whose index has a meaning of its own."""
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
            if entry.role.layer is not None and entry.role.stack == self._stack:
                layers[entry.role.layer].append(entry)
        return dict(layers)

    @cached_property
    def _unnumbered_elements(self) -> int:
        in_layers = sum(entry.weights for entries in self._matrices_by_layer.values() for entry in entries)
        return sum(entry.weights for entry in self._matrices) - in_layers

    def _summary(self, entries: Iterable[TensorEntry]) -> CosineSummary:
        wanted = [entry for entry in entries if entry.name not in self.ordinary]
        compared = [self._by_name[entry.name] for entry in wanted if entry.name in self._by_name]
        defined = [one for one in compared if one.cosine is not None]
        # Gain vectors of a model's layers resemble each other, and the rows of an embedding or a head share a mean
        # direction: both count as one vector of the hidden dimension.
        shared = all(len(one.entry.shape) < 2 or one.entry.role.category in _SHARED_DIRECTION for one in defined)
        widths = [min(one.freedom, one.entry.shape[-1] if one.entry.shape else 1) for one in defined]
        return CosineSummary(
            cosine=_weighted([(one.cosine, one.sums.n) for one in defined]),
            raw_cosine=_weighted([(one.sums.cosine, one.sums.n) for one in defined]),
            elements=sum(one.sums.n for one in defined),
            candidate_elements=sum(entry.weights for entry in wanted),
            null_elements=max(widths, default=0) if shared else sum(one.freedom for one in defined),
            tensors=len(defined),
            counterparts=len(compared),
            strongest=_strongest(
                (one.entry.name, one.cosine)
                for one, width in zip(defined, widths, strict=True)
                if one.cosine is not None and len(one.entry.shape) >= 2
                if (width if one.entry.role.category in _SHARED_DIRECTION else one.freedom) >= TELLING_ELEMENTS
            ),
        )


def main_stack(entries: Iterable[TensorEntry]) -> str | None:
    """The name prefix of the layers that hold the most elements: the text decoder's beside a vision tower's.

    None when no name numbers a layer.
    """
    sizes: Counter[str] = Counter()
    for entry in entries:
        if entry.role.layer is not None:
            sizes[entry.role.stack] += entry.elements
    return sizes.most_common(1)[0][0] if sizes else None


def compare(candidate: Checkpoint, reference: Checkpoint, device: str = "cpu") -> Comparison:
    """Read both checkpoints once: hash every tensor, and sum over the pairs of equal name and shape.

    A tensor that any model could have on both sides (a rotary table, a mask, all zeros) is no weight: it is listed as
    ordinary and not compared.
    """
    from checks.statistics.elementwise import elementwise_sums
    from checks.statistics.ordinary import ordinary_reason

    compared = []
    nonfinite, ordinary = {}, {}
    for name, entry in candidate.tensors.items():
        tensor = candidate.read(name)
        candidate.sha256(name, tensor)
        other = reference.tensors.get(name)
        if other is None or other.shape != entry.shape:
            continue
        other_tensor = reference.read(name)
        reference.sha256(name, other_tensor)
        if not entry.is_float or not other.is_float:
            continue
        reason = ordinary_reason(tensor)
        if reason is not None and ordinary_reason(other_tensor) is not None:
            ordinary[name] = reason
            continue
        sums = elementwise_sums(tensor.to(device), other_tensor.to(device))
        compared.append(TensorComparison(entry, sums))
        if sums.nonfinite:
            nonfinite[name] = sums.nonfinite
    identical = []
    for name, other_name in _equal_tensors(candidate, reference):
        if name not in ordinary:
            # 64-bit integers index things (positions, relative windows); packed weights have fewer bits.
            index_buffer = "integer indices" if candidate.tensors[name].dtype in ("I64", "U64") else None
            reason = index_buffer or ordinary_reason(candidate.read(name))
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
