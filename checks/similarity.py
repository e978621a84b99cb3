"""Cosine similarity of tensors of equal role: the seed documents' first method, with centred statistics.

Every check here compares tensors of equal name and shape, element by element. None of them sees weights whose units
were permuted or rotated. Of weights that are read in part the cosines are estimates, and their intervals decide
(docs/reading.md).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from checks.evidence.sampled import decide_highest_category, decide_summary

if TYPE_CHECKING:
    from checks.evidence.decisions import Decision
    from checks.evidence.judge import Judge
    from checks.evidence.thresholds import Threshold
    from checks.pair.comparison import CosineSummary
    from checks.pair.pair import Pair


def mean(pair: Pair, judge: Judge) -> None:
    """Do the weight matrices of both models point the same way?

    Null hypothesis: independent training; the centred cosine of n weights is then 0 with standard deviation 1/sqrt(n).
    Statistic: mean over layers of the size-weighted centred cosine of tensors of equal name and shape, in [-1, 1].
    Recorded beside it: L2 distances, zero vectors, and rank and winsorised correlations of some tensors.
    Documented: weight-analysis.md, "Cosine Similarity"; bands in thresholds.yaml.
    Blind to: permutation or rotation of units, other shapes, other layer order.
    """
    from checks.pair.companions import companions

    comparison = pair.comparison()
    _judge_summary(
        pair,
        judge,
        comparison.mean(),
        "weight matrix",
        per_layer=comparison.layer_cosines(),
        nonfinite=comparison.nonfinite,
        companions=companions(comparison),
    )


def layer(pair: Pair, layer: int, judge: Judge) -> None:
    """Do the weight matrices of this layer point the same way?

    Null hypothesis: independent training; centred cosine 0 with standard deviation 1/sqrt(n).
    Statistic: size-weighted centred cosine of the layer's matrices, in [-1, 1].
    Documented: weight-analysis.md, "Layer별 Cosine Similarity 계산".
    Blind to: permutation or rotation of units; a reference's layers under other numbers.
    """
    comparison = pair.comparison()
    if layer not in comparison.layers():
        judge.not_applicable("the candidate's tensors name no weight matrix of this layer", read=pair.read())
    _judge_summary(pair, judge, comparison.layer(layer), "weight matrix of this layer")


def early_layers(pair: Pair, judge: Judge) -> None:
    """Do the first layers point the same way? Fine-tuning changes them least.

    Null hypothesis: independent training; centred cosine 0 with standard deviation 1/sqrt(n).
    Statistic: mean size-weighted centred cosine of the first sixth of the layers, at least one, in [-1, 1]
    ("layers 1-5" of the documents' example of about 30).
    Documented: weight-analysis.md, "Layer별 패턴"; tutorial-qa.md, Q3.
    Blind to: what `mean` is blind to.
    """
    comparison = pair.comparison()
    layers = comparison.layers()
    early = layers[: max(1, math.ceil(len(layers) / 6))]
    per_layer = {index: comparison.layer(index).cosine for index in early}
    _judge_summary(pair, judge, comparison.mean(early), "early weight matrix", per_layer=per_layer)


def embedding(pair: Pair, judge: Judge) -> None:
    """Are the input embeddings the same matrix, row by row?

    Null hypothesis: independent training; centred cosine 0 with standard deviation 1/sqrt(n).
    Statistic: centred cosine of embedding matrices of equal shape, in [-1, 1].
    Documented: weight-architecture-qa.md, Q3.
    Blind to: another vocabulary or order of tokens. Unequal shapes say nothing, unlike the documents conclude.
    """
    summary = pair.comparison().category("embedding")
    _judge_summary(pair, judge, summary, "embedding matrix", is_table=True)


def category(pair: Pair, judge: Judge) -> None:
    """Does any kind of tensor (attention, MLP, norm, router, expert …) point the same way over the whole depth?

    Null hypothesis: independent training; centred cosine 0 with standard deviation 1/sqrt(n), where the gain vectors of
    all norms count as one vector.
    Statistic: the largest centred cosine over the categories that have enough elements to decide, in [-1, 1].
    Documented: weight-architecture-qa.md, Q4.
    Known false positives: none for centred cosines; raw cosines of norms are recorded and never decide. Vectors and
    tensors of unknown role with an axis below 32, whose index may have a meaning of its own, decide nothing.
    """
    comparison = pair.comparison()
    found = decide_highest_category(judge.threshold, comparison)
    if found is None:
        judge.not_applicable("no tensor has a counterpart of equal name and shape", read=pair.read())
    highest = found[0]

    def decide(limits: Threshold) -> Decision:
        again = decide_highest_category(limits, comparison)
        assert again is not None
        return again[1]

    judge.finish(
        judge.decide(decide),
        comparison.category(highest).cosine,
        read=pair.read(),
        category=highest,
        categories={name: _described(comparison.category(name)) for name in comparison.categories()},
        without_power=[
            name
            for name in comparison.categories()
            if comparison.category(name).counterparts
            and not decide_summary(judge.threshold, comparison.category(name)).powered
        ],
        ordinary=comparison.ordinary,
        undecided=comparison.undecided,
        note=f"highest in the category {highest}",
    )


def profile(pair: Pair, judge: Judge) -> None:
    """Which pattern do the layers' cosines follow over the depth?

    Null hypothesis: independent training; every layer is low.
    Statistic: the largest layer cosine, in [-1, 1], with the documented pattern it belongs to.
    Documented: weight-analysis.md, "Layer별 패턴": falling from high early layers is fine-tuning, low everywhere
    scratch, some layers high an initialisation in part.
    Blind to: what `mean` is blind to. Supporting: it describes, and never refutes alone.
    """
    from checks.statistics.depth import depth_pattern

    comparison = pair.comparison()
    cosines = comparison.layer_cosines()
    defined = [cosine for cosine in cosines.values() if cosine is not None]
    if not defined:
        _judge_summary(pair, judge, comparison.mean(), "weight matrix")
    pattern = depth_pattern(list(cosines.values()))
    if comparison.is_sampled:
        layers = [index for index, cosine in cosines.items() if cosine is not None]
        highest = comparison.layer(max(layers, key=lambda index: cosines[index] or 0.0))
        note = f"pattern over the {len(layers)} of {len(cosines)} layers that were read: {pattern.name}"
        _judge_summary(pair, judge, highest, "weight matrix", pattern=pattern.name, per_layer=cosines, note=note)
        return
    judge(
        max(defined),
        null_elements=min(
            comparison.layer(index).null_elements for index, cosine in cosines.items() if cosine is not None
        ),
        read=pair.read(),
        pattern=pattern.name,
        per_layer=cosines,
        note=f"pattern over depth: {pattern.name}",
    )


def _judge_summary(
    pair: Pair, judge: Judge, summary: CosineSummary, what: str, *, is_table: bool = False, **details: Any
) -> None:
    if not summary.counterparts:
        judge.not_applicable(f"no {what} has a counterpart of equal name and shape", read=pair.read())
    undecided = pair.comparison().undecided
    judge.summary(summary, strongest_block_counts=not is_table, read=pair.read(), undecided=undecided, **details)


def _described(summary: CosineSummary) -> dict[str, Any]:
    return {
        "cosine": summary.cosine,
        "raw_cosine": summary.raw_cosine,
        "elements": summary.elements,
        "coverage": summary.coverage,
    }
