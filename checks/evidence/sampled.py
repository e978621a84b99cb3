"""From an estimated cosine to what it means under a threshold: the interval decides, and what was not seen is said.

Pure: no pytest, no files. Of weights that were read in full this is `decide_by_summary`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from checks.evidence.decisions import Decision, decide_by_bands, decide_by_summary, with_strongest
from checks.evidence.record import CONTRADICTS, INCONCLUSIVE, SUPPORTS
from checks.evidence.text import format_value
from checks.evidence.thresholds import Threshold

if TYPE_CHECKING:
    from checks.pair.comparison import Comparison, CosineSummary
    from checks.statistics.sampling import CosineEstimate

# Two-dimensional tables of tokens, of which single blocks resemble each other for reasons of their own.
TABLES = frozenset({"embedding", "output"})


def decide_summary(limits: Threshold, summary: CosineSummary, strongest_block_counts: bool = True) -> Decision:
    """What does the cosine of a group of tensors mean, of all that was read of it?

    Read in full, as `decide_by_summary` says. Of a sample it contradicts if the whole interval reaches the
    contradicting bound, or all random blocks are equal; it supports if the whole interval lies below the supporting
    bound, and no tensor and no block stands out. A screening never supports. `strongest_block_counts`: False for tables
    of tokens.
    """
    if not summary.tensors and not summary.may_support:
        return Decision(INCONCLUSIVE, "none of it is read in this run; read more with a larger --budget or --read full")
    if summary.estimate is None:
        decision = decide_by_summary(limits, summary)
    else:
        decision = _decide_estimate(limits, summary, summary.estimate, strongest_block_counts)
    if decision.outcome == SUPPORTS and not summary.may_support:
        return Decision(INCONCLUSIVE, f"a screening may refute, not support ({decision.reason})", decision.powered)
    return decision


def decide_highest_category(limits: Threshold, comparison: Comparison) -> tuple[str, Decision] | None:
    """The category with the largest cosine among those that have enough elements to decide, and what it means.

    The embedding has a check of its own. None when no tensor of any other category has a counterpart.
    """
    summaries = {name: comparison.category(name) for name in comparison.categories() if name != "embedding"}
    decisions = {
        name: decide_summary(limits, one, name not in TABLES) for name, one in summaries.items() if one.counterparts
    }
    if not decisions:
        return None
    severity = {CONTRADICTS: 2, INCONCLUSIVE: 1}

    def rank(name: str) -> tuple[int, bool, float]:
        decision = decisions[name]
        worth = severity.get(decision.outcome, 0) if decision.powered else 0
        return worth, decision.powered, abs(summaries[name].cosine or 0.0)

    highest = max(decisions, key=rank)
    return highest, decisions[highest]


def _decide_estimate(
    limits: Threshold, summary: CosineSummary, estimate: CosineEstimate, strongest_block_counts: bool
) -> Decision:
    decision = with_strongest(limits, summary, _decide_interval(limits, summary, estimate))
    block = estimate.strongest_block if strongest_block_counts and not estimate.is_complete else None
    remarkable = limits.yields_below if limits.yields_below is not None else limits.supports_below
    if decision.outcome == SUPPORTS and block is not None and remarkable is not None and block >= remarkable:
        return Decision(
            INCONCLUSIVE,
            f"one block alone has {format_value(block)}, as reuse of a part would: read all with --read full "
            f"({decision.reason})",
            True,
            True,
        )
    return decision


def _decide_interval(limits: Threshold, summary: CosineSummary, estimate: CosineEstimate) -> Decision:
    """What the interval alone says."""
    if estimate.is_complete or estimate.cosine is None:
        return decide_by_bands(limits, summary.cosine, summary.null_elements, summary.coverage)
    shown = format_value(estimate.cosine)
    seen = f"{estimate.elements_read / max(1, estimate.elements):.1%} of the elements read"
    if estimate.drawn_equal:
        decision = decide_by_bands(limits, summary.cosine, summary.null_elements, summary.coverage)
        if decision.outcome == CONTRADICTS:
            return Decision(CONTRADICTS, f"all {estimate.drawn} random blocks are equal ({seen})", True)
        return Decision(
            INCONCLUSIVE, f"all random blocks are equal, other tensors are not: {decision.reason}", True, True
        )
    interval = estimate.interval
    if interval is None:
        return Decision(INCONCLUSIVE, f"{shown} without an interval: {estimate.no_interval} ({seen})")
    low, high = _sizes(interval) if limits.two_sided else interval
    range_shown = f"{shown}, by 95 % confidence {format_value(interval[0])} to {format_value(interval[1])} ({seen})"
    at_low = decide_by_bands(limits, low, summary.null_elements, summary.coverage)
    if at_low.outcome == CONTRADICTS:
        return Decision(CONTRADICTS, f"{range_shown}: {at_low.reason}", True)
    at_high = decide_by_bands(limits, high, summary.null_elements, summary.coverage)
    if at_high.outcome == SUPPORTS:
        unseen = f"reuse confined to {estimate.unseen_elements} elements would not be seen"
        return Decision(SUPPORTS, f"{range_shown}: {at_high.reason}; {unseen}", True)
    keeps_open = at_high.powered and limits.yields_below is not None and _size(limits, estimate) >= limits.yields_below
    return Decision(INCONCLUSIVE, f"{range_shown}: {at_high.reason}", at_high.powered, keeps_open)


def _size(limits: Threshold, estimate: CosineEstimate) -> float:
    cosine = estimate.cosine or 0.0
    return abs(cosine) if limits.two_sided else cosine


def _sizes(interval: tuple[float, float]) -> tuple[float, float]:
    """The smallest and the largest size of what lies in an interval."""
    low, high = interval
    smallest = 0.0 if low <= 0 <= high else min(abs(low), abs(high))
    return smallest, max(abs(low), abs(high))
