"""Does the candidate repeat itself? Depth up-scaling and upcycling leave copies, which need no reference to be seen."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from checks.evidence.judge import Judge
    from checks.pair.candidate import Candidate
    from checks.pair.self_structure import SearchedGroup

SHOWN = 20


def layers(candidate: Candidate, judge: Judge) -> None:
    """Do layers of the candidate resemble each other neuron by neuron?

    Null hypothesis: every layer was initialised by itself; any renumbering of its neurons was as likely.
    Statistic: layers whose MLP has a copy in another layer: permutation z of same-numbered hidden units, screened by
    sampled elements, the search counted. Copies in neighbouring layers are shown as runs: depth up-scaling repeats
    many layers in their order, and a run says which.
    Documented: SOLAR-10.7B (arXiv 2312.15166: layers 0-23 and 8-31 of a 32-layer model); Zhu et al., arXiv 2502.12292.
    A copy is no accusation: it asks where the layers came from, and leaves the case open.
    Blind to: copies that were permuted afterwards.
    """
    from checks.pair.self_structure import search_layers

    _judge(candidate, judge, "layers", search_layers)


def experts(candidate: Candidate, judge: Judge) -> None:
    """Do routed experts of a layer resemble each other neuron by neuron?

    Null hypothesis: every expert was initialised by itself. Statistic: experts with a near copy in the same layer.
    Documented: sparse upcycling (arXiv 2212.05055); Zhu et al., arXiv 2502.12292, for the test.
    A copy asks which dense model the experts came from, and leaves the case open.
    Blind to: copies that were permuted afterwards; a dense MLP that was divided among the experts.
    """
    from checks.pair.self_structure import search_experts

    _judge(candidate, judge, "experts", search_experts)


def _judge(candidate: Candidate, judge: Judge, what: str, search: Any) -> None:
    from checks.checkpoint.canonical import CanonicalModel
    from checks.statistics.self_structure import repeated_runs

    if not candidate.is_read_in_full:
        judge.inconclusive("read only in part: copies inside a model are sought with --read full")
    groups: Sequence[SearchedGroup] = search(CanonicalModel(candidate.checkpoint, candidate.device()))
    if not groups:
        judge.not_applicable(f"the candidate has no {what} that could be compared with each other")
    limits = judge.threshold
    assert limits.minimum_effect is not None
    assert limits.alpha is not None
    log_alpha = math.log(limits.alpha / max(1, judge.context.calibrated_cases))
    copies: list[dict[str, Any]] = []
    members: set[tuple[str, int]] = set()
    layers: set[tuple[int, int]] = set()
    for group in groups:
        for one in group.found.duplicates(log_alpha, limits.minimum_effect):
            first, second = (group.places[number] for number in (one.first, one.second))
            members |= {(group.name, one.first), (group.name, one.second)}
            layers.add((first.layer, second.layer))
            copies.append({"group": group.name, "first": first.key, "second": second.key, "effect": one.test.effect})
    searched = sum(group.found.searched for group in groups)
    runs = repeated_runs(pair for pair in layers if pair[0] != pair[1])
    judge(
        len(members),
        copies=copies[:SHOWN],
        runs=[
            {"layers": [run.first, run.first + run.length - 1], "repeated_from": run.second, "length": run.length}
            for run in runs[:SHOWN]
        ],
        searched=searched,
        groups=len(groups),
    )
