"""What the weights of a pair say when something weaker raised a suspicion. No family of checks of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from checks.applicable import have_layers
from checks.checkpoint.errors import CheckpointUnavailable
from checks.evidence.decisions import Decision, decide_by_bands, decide_calibrated, decide_matching
from checks.evidence.record import CONTRADICTS, INCONCLUSIVE, SUPPORTS
from checks.evidence.sampled import decide_highest_category, decide_summary
from checks.pair import measures
from checks.streaming.planned_source import NotPlanned

if TYPE_CHECKING:
    from checks.evidence.judge import Judge
    from checks.evidence.thresholds import Threshold
    from checks.pair.comparison import CosineSummary
    from checks.pair.pair import Pair


@dataclass(frozen=True)
class WeightOpinion:
    """Inherited (contradicts), independent (supports) or not to be told (inconclusive), with the measurements."""

    outcome: str
    reason: str
    powered: bool = False
    details: Mapping[str, Any] = field(default_factory=dict)


def weigh_pair(pair: Pair, judge: Judge) -> WeightOpinion:
    """Do this reference's weights confirm a suspicion or clear it?

    Measures the pair itself, with the thresholds of the claim, and does not look at other cases: equal tensors, the
    centred cosines of the mean, the embedding and the highest category, the permutation test of neurons, and their
    anchored matching. Inherited if any contradicts; independent if none does and one that SUPPORTED may rest on
    supports with power; inconclusive otherwise, in a screening, and without weights.
    """
    try:
        decisions = {
            "identity.sha256": _equal_tensors(pair, judge),
            "similarity.mean": _summary(pair.comparison().mean(), "similarity.mean", judge),
            "similarity.embedding": _summary(pair.comparison().category("embedding"), "similarity.embedding", judge),
            "similarity.category": _highest_category(pair, judge),
            "independence.units": _neurons(pair, judge),
            "independence.anchored": _anchored(pair, judge),
        }
    except CheckpointUnavailable as error:
        return WeightOpinion(INCONCLUSIVE, f"no weights to ask: {error}")
    details = {check: f"{decision.outcome}: {decision.reason}" for check, decision in decisions.items()}
    contradicting = [check for check, decision in decisions.items() if decision.outcome == CONTRADICTS]
    if contradicting:
        return WeightOpinion(CONTRADICTS, f"inherited weights: {_reasons(decisions, contradicting)}", True, details)
    open_ = [check for check, decision in decisions.items() if decision.keeps_open]
    if open_:
        return WeightOpinion(INCONCLUSIVE, f"the weights leave it open: {_reasons(decisions, open_)}", False, details)
    clearing = [
        check
        for check, decision in decisions.items()
        if decision.outcome == SUPPORTS and decision.powered and judge.threshold_of(check).carries_support
    ]
    if clearing and pair.plan is not None and not pair.plan.may_support:
        return WeightOpinion(
            INCONCLUSIVE,
            f"a screening may confirm a suspicion, not clear it ({_reasons(decisions, clearing)}); "
            "choose --read sample or --read full",
            False,
            details,
        )
    if clearing:
        return WeightOpinion(SUPPORTS, f"independent weights: {_reasons(decisions, clearing)}", True, details)
    return WeightOpinion(
        INCONCLUSIVE, f"the weights do not tell: {_reasons(decisions, list(decisions))}", False, details
    )


def _reasons(decisions: Mapping[str, Decision], names: list[str]) -> str:
    return "; ".join(f"{check} ({decisions[check].reason})" for check in names)


def _equal_tensors(pair: Pair, judge: Judge) -> Decision:
    try:
        equal = len(pair.equal_bytes().identical)
    except NotPlanned as error:
        return Decision(INCONCLUSIVE, f"not told: {error}")
    return judge.decide(lambda limits: decide_by_bands(limits, equal), "identity.sha256")


def _summary(summary: CosineSummary, check: str, judge: Judge) -> Decision:
    if not summary.counterparts:
        return Decision(INCONCLUSIVE, "no tensor has a counterpart of equal name and shape")
    return judge.decide(lambda limits: decide_summary(limits, summary, check != "similarity.embedding"), check)


def _highest_category(pair: Pair, judge: Judge) -> Decision:
    def decide(limits: Threshold) -> Decision:
        found = decide_highest_category(limits, pair.comparison())
        return found[1] if found else Decision(INCONCLUSIVE, "no tensor has a counterpart of equal name and shape")

    return judge.decide(decide, "similarity.category")


def _neurons(pair: Pair, judge: Judge) -> Decision:
    tests = pair.once(measures.units)
    if tests is None:
        return Decision(INCONCLUSIVE, "no MLP has a counterpart of equal shape")
    cases = judge.context.calibrated_cases
    return judge.decide(lambda limits: decide_calibrated(limits, tests, cases), "independence.units")


def _anchored(pair: Pair, judge: Judge) -> Decision:
    if not have_layers(pair):
        return Decision(INCONCLUSIVE, "a model has no layers of its own")
    test = pair.once(measures.matching_by_anchors)
    cases = judge.context.calibrated_cases
    return judge.decide(lambda limits: decide_matching(limits, test, cases), "independence.anchored")
