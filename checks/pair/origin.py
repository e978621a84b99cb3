"""The initial weights that a claim states, beside candidate and reference, MLP by MLP."""

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

    from checks.statistics.origin import OriginTest
    from checks.statistics.units import CombinedUnitTest, UnitTest

ATTENTION = ("q", "k", "v", "o")

Opener = Callable[[ModelSource], Checkpoint]


@dataclass(frozen=True)
class Origin:
    """What the initial weights have to do with candidate and reference; all MLPs together.

    `regenerated`: the weights were made again from generator and seed, and any published ones are equal bit for bit.
    `start`, `reference_start`: see `OriginTest`; None when no MLP has equal shapes in all three models. `beyond`: what
    both share beyond the initial weights, of the groups mlp, attention and embedding that all three have.
    `steps`: effect of the permutation test between initial weights and each checkpoint of the training, in order.
    """

    regenerated: bool
    reason: str
    start: CombinedUnitTest | None
    reference_start: CombinedUnitTest | None
    beyond: Mapping[str, CombinedUnitTest]
    mlps: int
    steps: Mapping[str, float | None] = field(default_factory=dict)

    @property
    def beyond_by_size(self) -> float | None:
        """What both share of MLPs or of attention beyond the initial weights: the larger |mean row cosine|, 0 to 1."""
        return max((abs(test.effect) for name, test in self.beyond.items() if name != "embedding"), default=None)

    @property
    def embedding_beyond(self) -> float:
        """The same of the embedding; 0 where the models have none in common."""
        return abs(self.beyond["embedding"].effect) if "embedding" in self.beyond else 0.0


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
    tests = _tests(*models)
    groups = {
        "mlp": combine(test.beyond for test in tests),
        "attention": combine(
            _beyond(models, part, layer)
            for layer in models[1].layers
            for part in ATTENTION
            if _all_have(models, part, layer)
        ),
        "embedding": combine(_beyond(models, part) for part in ("embedding", "head") if _all_have(models, part)),
    }
    return Origin(
        regenerated,
        reason,
        combine(test.start for test in tests),
        combine(test.reference_start for test in tests),
        {name: test for name, test in groups.items() if test is not None},
        len(tests),
        {source.where: _resemblance(models[0], CanonicalModel(open_source(source), device)) for source in stated.steps},
    )


def _tests(initial: CanonicalModel, candidate: CanonicalModel, reference: CanonicalModel) -> list[OriginTest]:
    """The tests of every MLP that all three have in the same place and shape."""
    from checks.statistics.origin import origin_test

    return [origin_test(*views) for views in _common_mlps(initial, candidate, reference)]


def _all_have(models: Sequence[CanonicalModel], part: str, layer: int | None = None) -> bool:
    return all(model.has(part, layer) for model in models)


def _beyond(models: Sequence[CanonicalModel], part: str, layer: int | None = None) -> UnitTest:
    """What candidate and reference share of one matrix beyond the initial one, row by row."""
    from checks.statistics.origin import without_start
    from checks.statistics.units import UnitTest, unit_permutation_test

    initial, ours, theirs = (model.matrix(part, layer) for model in models)
    if not initial.shape == ours.shape == theirs.shape or not _are_finite([[initial, ours, theirs]]):
        return UnitTest(None, None, None, ours.shape[0], "the shapes differ, or values are not finite")
    return unit_permutation_test([without_start(ours, initial)], [without_start(theirs, initial)])


def _resemblance(initial: CanonicalModel, step: CanonicalModel) -> float | None:
    """Mean row cosine of initial weights and one checkpoint of the training; None without MLPs of equal shape."""
    from checks.statistics.units import combine, unit_permutation_test

    joint = combine(unit_permutation_test(*views) for views in _common_mlps(step, initial))
    return None if joint is None or not math.isfinite(joint.effect) else joint.effect


def _common_mlps(*models: CanonicalModel) -> Iterator[list[list[Tensor]]]:
    """The views of each MLP that all models have in the same place and shape, of finite values: one list per model."""
    places = [_places(model) for model in models]
    for key in places[0]:
        if not all(key in one for one in places):
            continue
        views = [_views(model.mlp(one[key])) for model, one in zip(models, places, strict=True)]
        if len({tuple(view.shape for view in one) for one in views}) == 1 and _are_finite(views):
            yield views


def _places(model: CanonicalModel) -> dict[tuple[int, str, int | None], MlpPlace]:
    return {place.key: place for layer in model.layers for place in model.mlps(layer)}


def _views(mlp: Mlp) -> list[Tensor]:
    """The matrices with the hidden units as rows."""
    gate = [] if mlp.gate is None else [mlp.gate]
    return [*gate, mlp.up, mlp.down.T]


def _are_finite(views: list[list[Tensor]]) -> bool:
    return all(bool(view.isfinite().all()) for one in views for view in one)
