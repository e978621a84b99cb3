"""Calibrated tests of independence: p-values from a null that holds whatever the training data were."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from checks.checkpoint.pair import Pair
    from checks.evidence.judge import Judge

NO_EQUAL_MLP = "no MLP has a counterpart of equal shape in the same layer"


def units(pair: Pair, judge: Judge) -> None:
    """Does the numbering of the candidate's MLP neurons agree with the reference's?

    Null hypothesis: independent initialisation. Initial weights are exchangeable over hidden units and the usual
    optimisers treat all units alike, so that any renumbering of the candidate's neurons was as likely as the one found.
    Statistic: Hoeffding's permutation z of the row-normalised up, gate and down views of each MLP with equal shapes
    (experts by index), combined over layers by Stouffer; exact mean and variance, normal tail, two-sided.
    Documented: Zhu et al., Independence Tests for Language Models, ICML 2025, arXiv 2502.12292, theorem 1.
    Known false positives: a shared initialisation seed, which is no inheritance; structured initialisation and
    learning rates that depend on the unit's index break the null.
    Blind to: permuted neurons, rotated residual streams, other hidden sizes, layers under other numbers.
    """
    groups = pair.neurons()
    combined = pair.units()
    if combined is None:
        reason = "the MLPs of equal shape have no variation to test" if groups else NO_EQUAL_MLP
        judge.not_applicable(reason, read=pair.read())
    z_per_layer: dict[int, list[float | None]] = {}
    for group in groups:
        z_per_layer.setdefault(group.layer, []).append(group.test.z)
    judge.calibrated(
        combined,
        read=pair.read(),
        mlps=len(groups),
        units=sum(group.test.units for group in groups),
        z_per_layer=z_per_layer,
        note="a shared initialisation seed trips this test too",
    )
