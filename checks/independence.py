"""Calibrated tests of independence: p-values from a null that holds whatever the training data were."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from checks.checkpoint.neurons import NeuronGroup
    from checks.checkpoint.pair import Pair
    from checks.evidence.judge import Judge
    from checks.statistics.units import UnitTest


def units(pair: Pair, judge: Judge) -> None:
    """Does the numbering of the candidate's MLP neurons agree with the reference's?

    Null hypothesis: independent initialisation. Initial weights are exchangeable over hidden units and the usual
    optimisers treat all units alike, so that any renumbering of the candidate's neurons was as likely as the one found.
    Statistic: Hoeffding's permutation z of the row-normalised up, gate and down views of each MLP with equal shapes
    (experts by index), combined over layers by Stouffer; exact mean and variance, normal tail, two-sided. The same for
    the gates alone, since negating the up and down weights of a neuron changes nothing but the sign of those views, and
    for each MLP, since one inherited expert is lost in a mean. All these tests share the level.
    Documented: Zhu et al., Independence Tests for Language Models, ICML 2025, arXiv 2502.12292, theorem 1.
    Known false positives: a shared initialisation seed, which is no inheritance; structured initialisation and
    learning rates that depend on the unit's index break the null.
    Blind to: permuted neurons, rotated residual streams, other hidden sizes, layers under other numbers.
    """
    groups = pair.neurons()
    tests = pair.units()
    if tests is None:
        if groups:
            judge.inconclusive("no power: the MLPs of equal shape have no variation to test", read=pair.read())
        judge.not_applicable("no MLP has a counterpart of equal shape in the same place", read=pair.read())
    judge.calibrated(
        tests,
        read=pair.read(),
        mlps=sum(group.test.z is not None for group in groups),
        units=sum(group.test.units for group in groups),
        z_per_layer=_by_layer(groups, lambda group: group.test),
        gate_z_per_layer=_by_layer(groups, lambda group: group.gate),
        note="a shared initialisation seed trips this test too",
    )


def _by_layer(
    groups: Sequence[NeuronGroup], test_of: Callable[[NeuronGroup], UnitTest | None]
) -> dict[int, list[float]]:
    """The z of each layer's MLPs, those without one left out."""
    layers: dict[int, list[float]] = {}
    for group in groups:
        test = test_of(group)
        if test is not None and test.z is not None:
            layers.setdefault(group.layer, []).append(test.z)
    return layers
