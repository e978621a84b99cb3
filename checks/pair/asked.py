"""What one pass over a pair has to take, by the checks that will ask: one reading of the weights serves them all."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from checks.checkpoint.errors import CheckpointUnavailable
from checks.evidence.thresholds import threshold

if TYPE_CHECKING:
    from checks.pair.layer_sweep import Visitor
    from checks.pair.pair import Pair

# Checks that look for tensors under other names.
NAMELESS_CHECKS = frozenset({"identity.sketch", "independence.tensors"})


def ask_for_neurons(checks: Collection[str]) -> bool:
    """May any of these checks ask for the neurons of a pair? Suspicions do, which ask the weights."""
    return "independence.units" in checks or any(threshold(check).strength == "suspicion" for check in checks)


def ask_for_fingerprints(checks: Collection[str]) -> bool:
    """Does any of these checks look for tensors under other names?"""
    return not NAMELESS_CHECKS.isdisjoint(checks)


def layer_visitors_for(checks: Collection[str]) -> Callable[[Pair], Sequence[Visitor]]:
    """Gives those who take what these checks want of every layer of a pair, and the store does not have.

    What a suspicion may come to ask is not among it: most raise none.
    """
    from checks.pair.layer_visits import WANTED_BY, layer_visitors

    wanted = {measure for check in checks for measure in WANTED_BY.get(check, ())}

    def is_unknown(pair: Pair, measure: Callable[[Pair], Any]) -> bool:
        try:
            return not pair.is_known(measure)
        except CheckpointUnavailable:
            return False  # what it depends on cannot be had, as a tokenizer that is damaged

    return lambda pair: layer_visitors(pair, [measure for measure in wanted if is_unknown(pair, measure)])
