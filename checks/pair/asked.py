"""What one pass over a pair has to take, by the checks that will ask: one reading of the weights serves them all."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING

from checks.evidence.thresholds import threshold

if TYPE_CHECKING:
    from checks.pair.layer_sweep import Visitor
    from checks.pair.pair import Pair

# Checks that look for tensors under other names.
NAMELESS_CHECKS = frozenset({"identity.sketch", "independence.tensors"})


def ask_for_neurons(checks: Collection[str]) -> bool:
    """May any of these checks ask for the neurons of a pair?"""
    return "independence.units" in checks or raise_suspicions(checks)


def ask_for_fingerprints(checks: Collection[str]) -> bool:
    """Does any of these checks look for tensors under other names?"""
    return not NAMELESS_CHECKS.isdisjoint(checks)


def raise_suspicions(checks: Collection[str]) -> bool:
    """May any of these checks raise a suspicion, which the weights are asked to confirm or to clear?"""
    return any(threshold(check).strength == "suspicion" for check in checks)


def layer_visitors_for(checks: Collection[str]) -> Callable[[Pair], Sequence[Visitor]]:
    """Gives those who take what these checks want of every layer of a pair, and the store does not have."""

    def visitors(pair: Pair) -> Sequence[Visitor]:
        from checks.pair.layer_visits import WANTED_BY, WANTED_BY_SUSPICIONS, layer_visitors

        wanted = {measure for check in checks for measure in WANTED_BY.get(check, ())}
        wanted |= {*WANTED_BY_SUSPICIONS} if raise_suspicions(checks) else set()
        return layer_visitors(pair, [measure for measure in wanted if not pair.is_known(measure)])

    return visitors
