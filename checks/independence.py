"""Calibrated tests of independence: p-values from a null that holds whatever the training data were."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING

from checks.applicable import require_embeddings, require_layers
from checks.evidence.decisions import Score
from checks.pair import measures
from checks.pair.probed_matching import either_probes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from checks.evidence.judge import Judge
    from checks.pair.neurons import NeuronGroup
    from checks.pair.pair import Pair
    from checks.statistics.block_matching import MatchingTest
    from checks.statistics.units import UnitTest

SHARED_SEED = "a shared initialisation seed trips this test too"
# Pairs of tensors that a record names.
SHOWN_PAIRS = 20


def units(pair: Pair, judge: Judge) -> None:
    """Does the numbering of the candidate's MLP neurons agree with the reference's?

    Null hypothesis: independent initialisation. Initial weights are exchangeable over hidden units and the usual
    optimisers treat all units alike, so that any renumbering of the candidate's neurons was as likely as the one found.
    Statistic: Hoeffding's permutation z of the row-normalised up, gate and down views of each MLP with equal shapes
    (experts by index), combined over layers by Stouffer; exact mean and variance, normal tail, two-sided. The same for
    the gates alone, since negating the up and down weights of a neuron changes nothing but the sign of those views, and
    for each MLP, since one inherited expert is lost in a mean. And for at most 16 MLPs that lie in other places or are
    stored in another way, paired by what no renumbering of neurons changes. Routed experts of a layer count as one
    observation, since they may be copies of each other. All these tests share the level.
    Documented: Zhu et al., Independence Tests for Language Models, ICML 2025, arXiv 2502.12292, theorem 1.
    Known false positives: a shared initialisation seed, which is no inheritance; structured initialisation and
    learning rates that depend on the unit's index break the null.
    Blind to: permuted neurons, rotated residual streams, other hidden sizes.
    """
    groups, others = pair.neurons(), pair.once(measures.mapped_units)
    tests = pair.once(measures.units)
    if tests is None:
        if groups or others.groups:
            judge.inconclusive("no power: the MLPs of equal shape have no variation to test", read=pair.read())
        judge.not_applicable("no MLP has a counterpart of equal shape", read=pair.read())
    judge.calibrated(
        tests,
        read=pair.read(),
        mlps=sum(group.test.z is not None for group in groups),
        units=sum(group.test.units for group in groups),
        z_per_layer=_by_layer(groups, lambda group: group.test),
        gate_z_per_layer=_by_layer(groups, lambda group: group.gate),
        mapped={group.module: group.test.z for group in others.groups},
        not_mapped_because=others.reason,
        note=SHARED_SEED,
    )


def channels(pair: Pair, judge: Judge) -> None:
    """Does the numbering of the candidate's residual channels agree with the reference's?

    Null hypothesis: independent initialisation. Initial weights are exchangeable over the channels of the residual
    stream as well, so that any renumbering was as likely as the one found. One permutation acts on the whole model, so
    this is one test, never one for each layer; norms, embedding and layers are also tested alone.
    Statistic: Hoeffding's permutation z over views of all layers with channels as rows, each row of each view at length
    1, constant columns left out.
    Documented: Zhu et al., arXiv 2502.12292, theorem 1, applied to the residual stream.
    Known false positives: a shared initialisation seed, which is no inheritance; structured initialisation.
    Blind to: permuted or rotated residual streams, other widths.
    """
    require_layers(pair, judge)
    tests = pair.once(measures.channels)
    if tests is None:
        judge.not_applicable("the residual streams differ in width", read=pair.read())
    scores = [
        Score(name, one.z, one.effect, one.scale)
        for name, one in (("whole", tests.whole), *tests.groups.items())
        if one.z is not None and one.effect is not None and one.scale is not None
    ]
    if not scores or scores[0].name != "whole":
        judge.inconclusive(f"no power: {tests.whole.reason}", read=pair.read())
    judge.scores(
        scores,
        tests=tests.tests,
        read=pair.read(),
        channels=tests.whole.channels,
        columns=tests.whole.columns,
        largest_of_random_permutations=tests.whole.largest_sampled,
        random_permutations=tests.whole.permutations,
        seed=tests.whole.seed,
        note=SHARED_SEED,
    )


def tensors(pair: Pair, judge: Judge) -> None:
    """Are tensors of equal shape alike, whatever they are called?

    Null hypothesis: independent initialisation; rows and columns of a tensor are exchangeable, as units and channels.
    Statistic: tensors of equal shape are assigned to each other by the centred cosine of some of their elements; each
    pair is then tested on others, so that the search needs no correction: the smaller of the permutation z over rows
    and over columns. The strongest pair, corrected for all pairs. A matrix with an axis below 16 is not tested.
    Documented: Zhu et al., arXiv 2502.12292, theorem 1; the pairing is this suite's.
    Known false positives: a shared initialisation seed; tensors that any model could have are left out by content.
    Blind to: permuted or rotated units, other shapes.
    """
    nameless = pair.once(measures.nameless)
    ours, theirs, pairing = nameless.candidate.names, nameless.reference.names, nameless.pairing
    scores = [
        Score(f"{ours[one.index]} = {theirs[one.other]}", one.z, one.effect, abs(one.z / one.effect))
        for one in pairing.pairs
        if one.z is not None and one.effect
    ]
    if not scores:
        judge.not_applicable("no tensor that could be tested has a counterpart of equal shape", read=pair.read())
    scores.sort(key=lambda score: -abs(score.z))
    judge.scores(
        scores[:SHOWN_PAIRS],
        scale=median(score.scale for score in scores),
        tests=pairing.tests,
        read=pair.read(),
        pairs=pairing.tests,
        unpaired=len(pairing.unpaired),
        searched=pairing.searched,
        seed=pairing.seed,
        note=SHARED_SEED,
    )


def neurons(pair: Pair, judge: Judge) -> None:
    """Do the candidate's neurons find their partners in the reference by what they make of the same tokens or text?

    Null hypothesis: independent training; matched by the gate and by the up projection, a neuron then finds two
    unrelated partners. Statistic: share of neurons to which both matchings give the same one, and Spearman's z of both
    matchings, over mapped blocks, against blocks that do not belong together in this run. The layer map is found by
    the same statistic and counted. Where fewer than 512 tokens are shared, or their embeddings show nothing, the probes
    are what enters the MLPs while both models read the same text, if they can be run here; the record says which.
    Documented: Zhu et al., arXiv 2502.12292, "MATCH"; null, probes and bounds of this suite.
    Known false positives: neurons that answer to one token arise in every model, which the in-run null shows.
    Blind to: a new vocabulary with fresh embeddings, to which neurons learn to answer otherwise, so that a forward pass
    does not help (independence.anchored does); layers whose surroundings are new.
    """
    require_layers(pair, judge)
    require_embeddings(pair, judge)
    by_tokens = pair.once(measures.matching_by_tokens)
    _judge_matching(pair, judge, either_probes(by_tokens, lambda: pair.once(measures.matching_by_text)))


def anchored(pair: Pair, judge: Judge) -> None:
    """Do the candidate's neurons find their partners by what they read from other neurons?

    Null hypothesis: as for independence.neurons. What a neuron reads from what others write does not change when the
    residual stream is permuted or rotated or the vocabulary replaced: neurons of other layers, first matched by the
    distribution of these products, are the probes.
    Statistic: share of neurons to which both matchings give the same partner, against mismatched blocks of this run.
    Documented: this suite; null measured on the lineage zoo (benchmarks/results/matching-null-setting.json).
    Assumes MLPs in several layers. A shared initialisation seed may trip it.
    Blind to: a few inherited layers among fresh ones; drift that leaves no neuron recognisable.
    """
    require_layers(pair, judge)
    _judge_matching(pair, judge, pair.once(measures.matching_by_anchors))


def alignment(pair: Pair, judge: Judge) -> None:
    """After the best rotation by shared tokens, do the layers of both models read the same directions?

    Null hypothesis: independent training; mapped layers then resemble each other no more than others. Not calibrated:
    first layers of independent models resemble each other, so that this supports and never decides.
    Statistic: median over mapped layers of the unbiased CKA of queries, keys and values in the common basis, less what
    all layers share, -1 to 1. Beside it the plain AWM score and, where the level reaches the upper bound, which change
    of basis the embeddings show.
    Documented: AWM, arXiv 2510.06738; the common basis and the level are this suite's.
    Blind to: replaced embeddings.
    """
    require_layers(pair, judge)
    require_embeddings(pair, judge)
    shared = pair.once(measures.tokens)
    found = pair.once(measures.alignment) if len(shared) else None
    if found is None:
        judge.inconclusive(
            shared.reason or f"no power: {len(shared)} tokens are shared, 64 are needed", read=pair.read()
        )
    level, bound = found.readers.level, judge.threshold.contradicts_from
    # Tokens mean the same in every model, so that some rotation takes an independent embedding near to any other.
    is_found = level is not None and bound is not None and level >= bound
    judge(
        level,
        read=pair.read(),
        z=found.readers.z,
        mismatched=found.readers.mismatched,
        per_layer=found.readers.per_layer,
        writers=found.writers.level,
        awm=found.awm,
        transform=found.transform.kind if is_found else None,
        tokens=found.tokens,
    )


def _judge_matching(pair: Pair, judge: Judge, test: MatchingTest) -> None:
    if not test.blocks and test.abstains_because is None:
        judge.not_applicable("a model has no MLP that could be matched", read=pair.read())
    judge.matching(test, read=pair.read(), note=SHARED_SEED)


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
