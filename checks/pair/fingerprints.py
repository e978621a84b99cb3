"""What is kept of every tensor of a checkpoint after one read, so that tensors are found again under any name."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from checks.checkpoint.checkpoint import Checkpoint
from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.stored_weight import read_weight, stored_weight

if TYPE_CHECKING:
    from checks.statistics.shape_pairing import ShapePairing, ShapeSample
    from checks.statistics.sketch import SketchMatch, TensorSketch


@dataclass(frozen=True)
class Fingerprints:
    """Of each usable tensor of a checkpoint its name, sketch and sample, in one order.

    `excluded`: the others, with the reason: any model could have them, they are packed, or too short.
    """

    names: tuple[str, ...]
    sketches: tuple[TensorSketch, ...]
    samples: tuple[ShapeSample, ...]
    excluded: dict[str, str]


@dataclass(frozen=True)
class NamelessComparison:
    """Two checkpoints compared whatever their tensors are called.

    `matches`: for each of the candidate's tensors the most similar of the reference's of equal size, by sketch.
    `pairing`: tensors paired by shape and content. Both count tensors as `candidate` and `reference` do.
    """

    candidate: Fingerprints
    reference: Fingerprints

    @cached_property
    def matches(self) -> tuple[SketchMatch, ...]:
        """The best match of every sketch."""
        from checks.statistics.sketch import best_matches

        return tuple(best_matches(self.candidate.sketches, self.reference.sketches))

    @cached_property
    def pairing(self) -> ShapePairing:
        """Tensors of equal shape, assigned to each other and tested."""
        from checks.statistics.shape_pairing import pair_by_shape

        return pair_by_shape(self.candidate.samples, self.reference.samples)

    def sketch_share(self, jaccard: float, hamming: float) -> float:
        """Share of the candidate's sketched elements in tensors that reach either documented bound, 0 to 1."""
        total = sum(one.elements for one in self.candidate.sketches)
        found = sum(
            self.candidate.sketches[match.index].elements
            for match in self.matches
            if (match.similarity.jaccard or 0.0) > jaccard
            or (match.similarity.hamming is not None and match.similarity.hamming < hamming)
        )
        return found / total if total else 0.0


def fingerprints(checkpoint: Checkpoint, seed: int = 0) -> Fingerprints:
    """Sketch and sample of every tensor, each read once; quantised ones by the values that they stand for.

    Tensors in a format that is not read are excluded with the reason. Raises CheckpointUnavailable for plain ones that
    cannot be read.
    """
    from checks.statistics.ordinary import ordinary_reason
    from checks.statistics.shape_pairing import shape_sample
    from checks.statistics.sketch import sketch

    names, sketches, samples, excluded = [], [], [], {}
    for name, entry in checkpoint.tensors.items():
        if getattr(entry.role, "companion_of", None):
            excluded[name] = "it belongs to another tensor's values"
            continue
        try:
            tensor = read_weight(checkpoint, stored_weight(checkpoint, name), widen=False)
        except CheckpointUnavailable as error:
            if entry.is_float:
                raise
            excluded[name] = str(error)
            continue
        if reason := ordinary_reason(tensor):
            excluded[name] = f"any model could have it: {reason}"
            continue
        one, sample = sketch(tensor, seed), shape_sample(tensor, seed)
        if one.reason is not None and sample.reason is not None:
            excluded[name] = sample.reason
            continue
        names.append(name)
        sketches.append(one)
        samples.append(sample)
    return Fingerprints(tuple(names), tuple(sketches), tuple(samples), excluded)
