"""Equal tensors: a copy is a copy, whatever it is called."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from checks.pair import measures
from checks.pair.comparison import TELLING_ELEMENTS
from checks.pair.telling_tensors import why_undecided

if TYPE_CHECKING:
    from checks.evidence.judge import Judge
    from checks.pair.comparison import TensorComparison
    from checks.pair.pair import Pair

# "Hash Jaccard/Hamming": derived above 0.85 and below a difference of 2 % (tutorial-qa.md).
JACCARD, HAMMING = 0.85, 0.02
# Tensors that a record names.
SHOWN = 20


def sha256(pair: Pair, judge: Judge) -> None:
    """Does the candidate hold a tensor of the reference, bit for bit?

    Null hypothesis: independent training; equal bytes in a trained tensor have no chance.
    Statistic: number of the candidate's tensors whose SHA-256 and dtype equal those of any tensor of the reference,
    names and shapes ignored. Tensors that any model could have (constants, masks, rotary tables, fixed transforms) are
    recognised by their content, listed, and do not count.
    Documented: weight-analysis.md, "Weight Tensor 해시 비교".
    Read in part, it counts tensors in shards of equal published SHA-256, and is left open where there are none.
    Blind to: any change of a byte: one training step, a cast, a permutation. A count of zero proves nothing.
    """
    comparison = pair.equal_bytes()
    judge(
        len(comparison.identical),
        read=pair.read(),
        tensors=[ours if ours == theirs else f"{ours} = {theirs}" for ours, theirs in comparison.identical],
        candidate_tensors=len(comparison.candidate.tensors),
        ordinary=comparison.ordinary,
    )


def mse(pair: Pair, judge: Judge) -> None:
    """Do tensors of equal role hold nearly the same numbers?

    Null hypothesis: independent training; the mean squared difference over the mean variance is then 2, with standard
    deviation of order 1/sqrt(n).
    Statistic: 1 less half of that, over all weight matrices by size: 1 equal, 0 unrelated. The documented bound, a mean
    squared difference below 1e-5, depends on the scale of the weights: at a deviation of 0.02 it is 0.9875 here, and at
    0.003 any two models pass it. It is shown for every tensor and decides nothing. Left out are tensors whose index may
    have a meaning of its own (short axes, vectors): what initialises them makes any two models alike.
    Documented: weight-architecture-qa.md, Q3 (MSE within 1e-5: the same layer); scale of this suite.
    Blind to: permutation, rotation, rescaling, other shapes.
    """
    from checks.statistics.magnitude import magnitude

    comparison = pair.elementwise()
    telling = [one for one in comparison.compared if why_undecided(one.entry) is None]
    matrices = [one for one in telling if one.sums is not None]
    found = [(one, magnitude(one.sums)) for one in matrices if one.sums is not None]
    usable = [(one, size) for one, size in found if size.relative_mse is not None]
    if not usable:
        judge.not_applicable("no weight matrix has a counterpart of equal shape", read=pair.read())
    total = sum(size.n for _, size in usable)
    value = 1 - sum((size.relative_mse or 0.0) * size.n for _, size in usable) / total / 2
    strongest = max(usable, key=lambda one: -(one[1].relative_mse or 0.0))
    judge(
        value,
        null_elements=total,
        coverage=total / max(1, sum(entry.weights for entry in comparison.candidate.tensors.values())),
        read=pair.read(),
        tensors_below_the_documented_bound=sum(bool(size.below_documented) for _, size in usable),
        compared_tensors=len(usable),
        smallest_relative_mse={"name": strongest[0].entry.name, "relative_mse": strongest[1].relative_mse},
        l2_distance=_root_of_squares(size.distance for _, size in usable),
        relative_l2_distance={_name(one): size.relative_distance for one, size in usable[:SHOWN]},
        undecided=dict(list(comparison.undecided.items())[:SHOWN]),
    )


def sketch(pair: Pair, judge: Judge) -> None:
    """Does the candidate hold tensors whose short fingerprints agree with the reference's, under any name?

    Null hypothesis: independent training; quantised to four codes at sampled positions, the Jaccard index of (position,
    code) is then 0.14 and the Hamming distance of sign bits 0.5.
    Statistic: largest Jaccard index of any two tensors of equal size (2,500 elements or more, since the index of short
    ones scatters), names and shapes ignored, 0 to 1. Left out are tensors that any model could have, and those of the
    candidate whose index may have a meaning of its own (vectors; an axis below 32 without a known role).
    Documented: tutorial-qa.md, "Hash Jaccard/Hamming" (above 0.85 and below 2 %: derived; below 0.2 and above 20 %).
    Blind to: permutation, rotation; continued training that moves more than a few values over a quartile.
    """
    found = pair.once(measures.nameless)
    names, entries = found.candidate.names, pair.candidate.checkpoint.tensors
    sizes = [one.elements for one in found.candidate.sketches]
    large = [
        one for one in found.matches if one.similarity.jaccard is not None and sizes[one.index] >= TELLING_ELEMENTS
    ]
    reasons = {names[one.index]: why_undecided(entries[names[one.index]]) for one in large}
    matches = [one for one in large if reasons[names[one.index]] is None]
    if not matches:
        judge.not_applicable(
            f"no tensor of {TELLING_ELEMENTS} elements has a counterpart of equal size", read=pair.read()
        )
    best = max(matches, key=lambda one: one.similarity.jaccard or 0.0)
    judge(
        best.similarity.jaccard,
        read=pair.read(),
        hamming=best.similarity.hamming,
        tensors=[f"{names[best.index]} = {found.reference.names[best.other]}"],
        expected_jaccard=best.similarity.expected_jaccard,
        share_beyond_the_documented_bounds=found.sketch_share(JACCARD, HAMMING),
        sketched_tensors=len(names),
        undecided=dict([(name, why) for name, why in reasons.items() if why is not None][:SHOWN]),
        excluded=dict(list(found.candidate.excluded.items())[:SHOWN]),
    )


def _name(one: TensorComparison) -> str:
    return one.entry.name


def _root_of_squares(values: Any) -> float:
    return math.sqrt(math.fsum(value * value for value in values))
