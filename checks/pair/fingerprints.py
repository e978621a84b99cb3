"""What is kept of every tensor of a checkpoint after one read, so that tensors are found again under any name."""

from __future__ import annotations

import base64
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from checks.checkpoint.checkpoint import Checkpoint
from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.stored_weight import read_weight, stored_weight
from checks.streaming.planned_source import NotPlanned

if TYPE_CHECKING:
    from torch import Tensor

    from checks.statistics.shape_pairing import ShapePairing, ShapeSample
    from checks.statistics.sketch import SketchMatch, TensorSketch

# Of all positions and hashes.
SEED = 0
_ORDINARY = "any model could have it: "
# Lines along every axis but the last two that are looked at.
_LINES = 16


@dataclass(frozen=True)
class Fingerprint:
    """Of one tensor its sketch and sample; or why it has none: any model could have it, it is packed, or too short.

    `is_uncertain`: any model could have it as far as its beginning tells, and the whole of it has to be looked at.
    """

    sketch: TensorSketch | None = None
    sample: ShapeSample | None = None
    excluded: str | None = None
    is_uncertain: bool = False

    @property
    def ordinary(self) -> str | None:
        """Why any model could have the tensor, if that is why it is excluded."""
        is_ordinary = self.excluded is not None and self.excluded.startswith(_ORDINARY)
        return self.excluded[len(_ORDINARY) :] if self.excluded and is_ordinary else None


@dataclass(frozen=True)
class Fingerprints:
    """Of each usable tensor of a checkpoint its name, sketch and sample, in one order.

    `excluded`: the others, with the reason.
    """

    names: tuple[str, ...]
    sketches: tuple[TensorSketch, ...]
    samples: tuple[ShapeSample, ...]
    excluded: dict[str, str]

    @classmethod
    def of(cls, found: Mapping[str, Fingerprint]) -> Fingerprints:
        """Those of all tensors, by name."""
        usable = {name: one for name, one in found.items() if one.excluded is None}
        sketches = tuple(one.sketch for one in usable.values() if one.sketch is not None)
        samples = tuple(one.sample for one in usable.values() if one.sample is not None)
        excluded = {name: one.excluded for name, one in found.items() if one.excluded is not None}
        return cls(tuple(usable), sketches, samples, excluded)


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


def fingerprints(checkpoint: Checkpoint) -> Fingerprints:
    """Sketch and sample of every tensor, each read once; see `read_fingerprint`. Raises CheckpointUnavailable."""
    return Fingerprints.of({name: read_fingerprint(checkpoint, name) for name in checkpoint.tensors})


def read_fingerprint(checkpoint: Checkpoint, name: str) -> Fingerprint:
    """The fingerprint of one tensor, which is read; of a quantised one by the values that it stands for.

    A tensor in a format that is not read is excluded with the reason. Raises CheckpointUnavailable for a plain one that
    cannot be read, NotPlanned for any that is not to be.
    """
    from checks.statistics.ordinary import ordinary_reason
    from checks.statistics.shape_pairing import shape_sample
    from checks.statistics.sketch import sketch

    entry = checkpoint.tensors[name]
    if getattr(entry.role, "companion_of", None):
        return Fingerprint(excluded="it belongs to another tensor's values")
    try:
        tensor = read_weight(checkpoint, stored_weight(checkpoint, name), widen=False)
    except CheckpointUnavailable as error:
        if entry.is_float or isinstance(error, NotPlanned):
            raise
        return Fingerprint(excluded=str(error))
    if reason := ordinary_reason(tensor):
        return _ordinary(reason)
    return _usable(sketch(tensor, SEED), shape_sample(tensor, SEED))


def settled(found: Fingerprint, reason_of_all: Callable[[], str | None]) -> Fingerprint:
    """The fingerprint once all of the tensor was looked at.

    `reason_of_all`: why any model could have the tensor; called if its beginning does not tell.
    """
    if not found.is_uncertain:
        return found
    reason = reason_of_all()
    return replace(found, is_uncertain=False) if reason is None else _ordinary(reason)


# From a part of the elements


def wanted_positions(shape: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """The elements that `picked_fingerprint` needs: rising and distinct positions in stored order."""
    return _places(shape)[0]


def picked_fingerprint(shape: tuple[int, ...], values: Tensor) -> Fingerprint:
    """The fingerprint of a tensor of plain floats, of which the elements at `wanted_positions` are given.

    The same as that of all of it, except where `is_uncertain` says so.
    """
    from checks.statistics.ordinary import head_elements, may_be_ordinary, ordinary_reason
    from checks.statistics.shape_pairing import shape_sample_of
    from checks.statistics.sketch import sketch_of

    _, sketched, sampled, *lines = _places(shape)
    found = _usable(sketch_of(values[sketched], math.prod(shape), SEED), shape_sample_of(values[sampled], shape, SEED))
    head = values[: head_elements(shape)]
    may_be = may_be_ordinary(head, shape)
    if len(head) == math.prod(shape):
        reason = ordinary_reason(head.reshape(shape)) if may_be else None
        return found if reason is None else _ordinary(reason)
    may_be = may_be or any(may_be_ordinary(values[one].reshape(-1), one.shape) for one in lines)
    return replace(found, is_uncertain=may_be)


@lru_cache(maxsize=16)
def _places(shape: tuple[int, ...]) -> tuple[npt.NDArray[np.int64], ...]:
    """`wanted_positions` of a shape; and where among them stand those of the sketch, of the sample, and of `_lines`."""
    from checks.statistics.ordinary import head_elements
    from checks.statistics.shape_pairing import shape_positions
    from checks.statistics.sketch import sketch_positions

    parts = [sketch_positions(math.prod(shape), SEED), shape_positions(shape, SEED), *_lines(shape)]
    arrays = [part.numpy() for part in parts]
    wanted = np.unique(np.concatenate([np.arange(head_elements(shape)), *(one.reshape(-1) for one in arrays)]))
    return wanted, *(np.searchsorted(wanted, one) for one in arrays)


def _lines(shape: tuple[int, ...]) -> list[Tensor]:
    """Of each axis that the beginning of a tensor does not show, some lines along it: positions [lines, size]."""
    import torch

    from checks.statistics.ordinary import LARGEST_HEAD, SHORTEST_LINE
    from checks.statistics.positions import sample_positions

    plain = [size for size in shape if size != 1]
    hidden = len(plain) - (2 if not plain or plain[-1] * SHORTEST_LINE <= LARGEST_HEAD else 1)
    found = []
    for axis, size in enumerate(plain[: max(0, hidden)]):
        if size >= SHORTEST_LINE:
            stride = math.prod(plain[axis + 1 :])
            begins = sample_positions(math.prod(plain) // size, _LINES, SEED)
            found.append((begins // stride * (stride * size) + begins % stride)[:, None] + torch.arange(size) * stride)
    return found


def _usable(sketch: TensorSketch, sample: ShapeSample) -> Fingerprint:
    if sketch.reason is not None and sample.reason is not None:
        return Fingerprint(excluded=sample.reason)
    return Fingerprint(sketch, sample)


def _ordinary(reason: str) -> Fingerprint:
    return Fingerprint(excluded=_ORDINARY + reason)


# In a store


def as_json(one: Fingerprint) -> dict[str, Any]:
    """A fingerprint for a file, of which no bit is lost."""
    if one.sketch is None or one.sample is None:
        return {"excluded": one.excluded}
    sketch, sample = dict(vars(one.sketch)), dict(vars(one.sample))
    if one.sketch.simhash is not None:
        sketch["simhash"] = _text(np.packbits(one.sketch.simhash.numpy()))
    sketch["minhash"] = _stored(one.sketch.minhash)
    sample |= {name: _stored(sample[name]) for name in ("pairing", "block")}
    sample["turned"] = sample["turned"] and [_stored(part) for part in sample["turned"]]
    return {"sketch": sketch, "sample": sample}


def from_json(stored: Mapping[str, Any]) -> Fingerprint:
    """The fingerprint that `as_json` wrote. Raises ValueError, KeyError or TypeError for anything else."""
    import torch

    from checks.statistics.shape_pairing import ShapeSample
    from checks.statistics.sketch import BITS, TensorSketch

    if "excluded" in stored:
        return Fingerprint(excluded=str(stored["excluded"]))
    sketch, sample = dict(stored["sketch"]), dict(stored["sample"])
    if sketch["simhash"] is not None:
        bits = np.unpackbits(np.frombuffer(base64.b64decode(sketch["simhash"]), np.uint8), count=BITS)
        sketch["simhash"] = torch.from_numpy(bits.astype(bool))
    sketch |= {"minhash": _read(sketch["minhash"], np.int32), "frequencies": tuple(sketch["frequencies"])}
    sample |= {name: _read(sample[name], np.float32) for name in ("pairing", "block")}
    sample |= {"shape": tuple(sample["shape"]), "turned": None if sample["turned"] is None else _pair(sample["turned"])}
    return Fingerprint(TensorSketch(**sketch), ShapeSample(**sample))


def _stored(tensor: Tensor | None) -> list[Any] | None:
    return None if tensor is None else [list(tensor.shape), _text(tensor.numpy())]


def _text(array: npt.NDArray[Any]) -> str:
    return base64.b64encode(array.tobytes()).decode()


def _read(stored: Sequence[Any] | None, dtype: type[np.generic]) -> Tensor | None:
    import torch

    if stored is None:
        return None
    shape, text = stored
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype).reshape(shape).copy())


def _pair(stored: Sequence[Any]) -> tuple[Tensor | None, ...]:
    first, second = stored
    return _read(first, np.float32), _read(second, np.float32)
