"""How the weights of both models are distributed, whatever stands where. Triage: nothing here decides alone."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from checks.applicable import require_layers
from checks.pair import measures

if TYPE_CHECKING:
    from checks.evidence.judge import Judge
    from checks.pair.pair import Pair


def pca(pair: Pair, judge: Judge) -> None:
    """Do rows of both models fall into the same clouds under a joint projection?

    Null hypothesis: none that is exact; the overlap after random permutations of the channels is recorded beside it.
    Statistic: overlap of both clouds over the joint principal components of embedding rows and of rows that read the
    residual stream, the larger of both, 0 to 1.
    Documented: weight-architecture-qa.md, Q3 (clusters that overlap by 80 %).
    Known false positives: models of one recipe whose clouds are round overlap without any relation.
    Blind to: rotated residual streams; other widths.
    """
    require_layers(pair, judge)
    found = {name: one for name, one in pair.once(measures.clouds).items() if one.overlap is not None}
    if not found:
        judge.not_applicable("the residual streams differ in width, or there is nothing to project", read=pair.read())
    names = ("overlap", "distance", "null_overlap", "null_highest_overlap", "null_distance", "components", "seed")
    judge(
        max(one.overlap or 0.0 for one in found.values()),
        read=pair.read(),
        clouds={name: {key: getattr(one, key) for key in names} for name, one in found.items()},
    )


def wasserstein(pair: Pair, judge: Judge) -> None:
    """Do both models have the same distribution along their joint principal components?

    Null hypothesis: none: models of one recipe have nearly equal distributions without any relation; the distance after
    random permutations of the channels is recorded beside it.
    Statistic: first Wasserstein distance of both projections over their pooled standard deviation (the document gives
    bounds and no scale), mean over the components, the smaller of embedding and readers; judged is 1 less that
    distance, so that 1 is equal. Beside it the same distance of the bare elements.
    Documented: tutorial-qa.md, "PCA Wasserstein Dist" (0.05 and 0.5); the scale is this suite's.
    Blind to: rotated residual streams; other widths.
    """
    require_layers(pair, judge)
    clouds = {name: one for name, one in pair.once(measures.clouds).items() if one.distance is not None}
    elements = {name: asdict(one) for name, one in pair.once(measures.elements).items()}
    if not clouds:
        judge.not_applicable(
            "the residual streams differ in width, or there is nothing to project", read=pair.read(), elements=elements
        )
    distance = min(one.distance for one in clouds.values() if one.distance is not None)
    null = {name: {"mean": one.null_distance, "lowest": one.null_lowest_distance} for name, one in clouds.items()}
    judge(1 - distance, read=pair.read(), distance=distance, null=null, elements=elements)


def spectrum(pair: Pair, judge: Judge) -> None:
    """Do the attention matrices of both models have the same singular values, layer by layer?

    Null hypothesis: none that is exact; layers of one model are the measure of how far apart unrelated spectra lie.
    Statistic: median distance of a layer's spectra of W_q W_k and W_v W_o to the nearest of the reference, over the
    same distance between layers of one model; judged is 1 less that ratio, so that 1 is equal and 0 is unrelated.
    Documented: GhostSpec, arXiv 2511.06390; scale and bounds of this suite.
    Known false positives: models of one recipe (GhostSpec itself reports 0.78 for an independent pair).
    Blind to: nothing in the basis or the numbering; triage where embeddings were replaced and the basis changed.
    """
    require_layers(pair, judge)
    found = pair.once(measures.spectra)
    if found.ratio is None:
        judge.inconclusive(f"no power: {found.reason}", read=pair.read())
    details = {name: value for name, value in asdict(found).items() if name != "reason"}
    judge(1 - found.ratio, read=pair.read(), **details)
