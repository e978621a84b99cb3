"""The initial weights that a claim states, beside candidate and reference, matrix by matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from checks.checkpoint.canonical import CanonicalModel, Mlp, MlpPlace
from checks.checkpoint.checkpoint import Checkpoint
from checks.checkpoint.initial import equal_bits, regenerate
from checks.claim.initial import InitialWeights
from checks.claim.model import ModelSource

if TYPE_CHECKING:
    from torch import Tensor

    from checks.statistics.units import CombinedUnitTest, UnitTest

    Views = list[Tensor]  # the matrices of one MLP with hidden units as rows, or one other matrix

# Matrices of fewer rows (routers of few experts) have too few permutations to show where they began.
FEWEST_ROWS = 16

Opener = Callable[[ModelSource], Checkpoint]


@dataclass(frozen=True)
class OriginBlock:
    """One MLP (`group` mlp), one other matrix of a layer (matrix) or of the vocabulary (embedding), all three models.

    `start`: z of the permutation test of the initial weights and the candidate; `beyond`: mean row cosine of candidate
    and reference without their initial weights, see `beyond_start`. Each None where it cannot be had.
    """

    name: str
    group: str
    start: float | None
    beyond: float | None


@dataclass(frozen=True)
class Origin:
    """What the initial weights have to do with candidate and reference.

    `regenerated`: the weights were made again from generator and seed, and any published ones are equal bit for bit.
    `start`, `reference_start`: all MLPs of the candidate, of the reference, together; None where no MLP has the shape
    of the initial ones. `blocks`: everything of the candidate that was looked at, one by one.
    `steps`: effect of the permutation test between initial weights and each checkpoint of the training, in order.
    """

    regenerated: bool
    reason: str
    start: CombinedUnitTest | None
    reference_start: CombinedUnitTest | None
    blocks: tuple[OriginBlock, ...]
    steps: Mapping[str, float | None] = field(default_factory=dict)

    @property
    def mlps(self) -> int:
        """How many MLPs were compared with the initial ones."""
        return 0 if self.start is None else self.start.tests

    @property
    def weakest_start(self) -> OriginBlock | None:
        """The part of the candidate with the least trace of the initial weights; one without a z comes first."""
        return min(self.blocks, key=lambda one: -math.inf if one.start is None else one.start, default=None)

    @property
    def unmeasured(self) -> tuple[str, ...]:
        """Parts of the candidate for which nobody can say what is shared beyond the initial weights."""
        return tuple(one.name for one in self.blocks if one.beyond is None)

    def largest_beyond(self, *groups: str) -> OriginBlock | None:
        """The part of these groups that shares most beyond the initial weights; None where none was measured."""
        measured = [one for one in self.blocks if one.group in groups and one.beyond is not None]
        return max(measured, key=lambda one: abs(one.beyond or 0.0), default=None)


def origin(
    stated: InitialWeights, candidate: Checkpoint, reference: Checkpoint, open_source: Opener, device: str = "cpu"
) -> Origin:
    """Compare both models with the initial weights that the claim states.

    Weights that generator and seed give are made again in a temporary directory. Raises CheckpointUnavailable when
    weights cannot be read or made again.
    """
    published = None if stated.checkpoint is None else open_source(stated.checkpoint)
    if stated.generator is None or stated.seed is None:
        assert published is not None
        reason = "published initial weights can be made up (the reference and noise); name their generator and seed"
        return _compared(False, reason, published, stated, candidate, reference, open_source, device)
    with TemporaryDirectory(prefix="from-scratch-initial-") as directory:
        made = regenerate(candidate, stated.generator, stated.seed, Path(directory))
        reason = f"made again by {stated.generator} from seed {stated.seed}"
        equal, total = equal_bits(made, published) if published is not None else (0, 0)
        if equal < total:
            reason += f", but only {equal} of {total} tensors are those that were published"
        return _compared(equal == total, reason, made, stated, candidate, reference, open_source, device)


def _compared(
    regenerated: bool,
    reason: str,
    initial: Checkpoint,
    stated: InitialWeights,
    candidate: Checkpoint,
    reference: Checkpoint,
    open_source: Opener,
    device: str,
) -> Origin:
    from checks.statistics.units import combine

    models = [CanonicalModel(checkpoint, device) for checkpoint in (initial, candidate, reference)]
    blocks: list[OriginBlock] = []
    starts: list[UnitTest] = []
    reference_starts: list[UnitTest] = []
    for name, group, views in _parts(models):
        start, reference_start, beyond = _block_tests(*views)
        blocks.append(OriginBlock(name, group, start.z, beyond.effect))
        if group == "mlp":
            starts.append(start)
            reference_starts.append(reference_start)
    return Origin(
        regenerated,
        reason,
        combine(starts),
        combine(reference_starts),
        tuple(blocks),
        {source.where: _resemblance(models[0], CanonicalModel(open_source(source), device)) for source in stated.steps},
    )


def _parts(models: Sequence[CanonicalModel]) -> Iterator[tuple[str, str, list[Views | None]]]:
    """Name, group and views of everything of the candidate, the second model; None where another model lacks it."""
    candidate = models[1]
    places = [_places(model) for model in models]
    for key, place in places[1].items():
        kind = "MLP" if place.expert is None else f"{place.kind} expert {place.expert}"
        views = [_views(model.mlp(one[key])) if key in one else None for model, one in zip(models, places, strict=True)]
        yield f"layer {place.layer} {kind}", "mlp", views
    for layer in (*candidate.layers, None):
        parts = ("embedding", "head") if layer is None else sorted(candidate.parts(layer))
        for part in parts:
            ours = _matrix(candidate, part, layer)
            if ours is None or ours.shape[0] < FEWEST_ROWS:
                continue
            matrices = [ours if model is candidate else _matrix(model, part, layer) for model in models]
            name, group = (part, "embedding") if layer is None else (f"layer {layer} {part}", "matrix")
            yield name, group, [None if one is None else [one] for one in matrices]


def _matrix(model: CanonicalModel, part: str, layer: int | None) -> Tensor | None:
    """A part that is a matrix; None for norms and what the model does not have."""
    if not model.has(part, layer):
        return None
    try:
        matrix = model.matrix(part, layer)
    except KeyError:  # a norm
        return None
    return matrix if matrix.ndim == 2 else None


def _block_tests(initial: Views | None, candidate: Views | None, reference: Views | None) -> tuple[UnitTest, ...]:
    """Initial weights with the candidate and with the reference, and what these two share beyond them."""
    from checks.statistics.origin import beyond_start
    from checks.statistics.units import UnitTest, unit_permutation_test

    none = UnitTest(None, None, None, 0, "the shapes differ, or values are not finite")
    start = reference_start = beyond = none
    if initial and candidate and _comparable(initial, candidate):
        start = unit_permutation_test(initial, candidate)
    if initial and reference and _comparable(initial, reference):
        reference_start = unit_permutation_test(initial, reference)
    if initial and candidate and reference and _comparable(initial, candidate, reference):
        beyond = beyond_start(initial, candidate, reference)
    return start, reference_start, beyond


def _comparable(*models: Views) -> bool:
    return len({tuple(view.shape for view in one) for one in models}) == 1 and _are_finite(models)


def _resemblance(initial: CanonicalModel, step: CanonicalModel) -> float | None:
    """Mean row cosine of initial weights and one checkpoint of the training; None without MLPs of equal shape."""
    from checks.statistics.units import combine, unit_permutation_test

    joint = combine(unit_permutation_test(*views) for views in _common_mlps(step, initial))
    return None if joint is None or not math.isfinite(joint.effect) else joint.effect


def _common_mlps(*models: CanonicalModel) -> Iterator[list[Views]]:
    """The views of each MLP that all models have in the same place and shape, of finite values: one list per model."""
    places = [_places(model) for model in models]
    for key in places[0]:
        if not all(key in one for one in places):
            continue
        views = [_views(model.mlp(one[key])) for model, one in zip(models, places, strict=True)]
        if _comparable(*views):
            yield views


def _places(model: CanonicalModel) -> dict[tuple[int, str, int | None], MlpPlace]:
    return {place.key: place for layer in model.layers for place in model.mlps(layer)}


def _views(mlp: Mlp) -> Views:
    """The matrices with the hidden units as rows."""
    gate = [] if mlp.gate is None else [mlp.gate]
    return [*gate, mlp.up, mlp.down.T]


def _are_finite(views: Sequence[Views]) -> bool:
    return all(bool(view.isfinite().all()) for one in views for view in one)
