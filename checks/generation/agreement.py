"""From agreement with each reference to what it means. Pure: no models, no pytest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from checks.evidence.decisions import Decision
from checks.evidence.record import CONTRADICTS, INCONCLUSIVE, SUPPORTS

if TYPE_CHECKING:
    from checks.evidence.thresholds import Threshold
    from checks.statistics.agreement import ControlledAgreement


def decide_agreement(limits: Threshold, tested: Sequence[ControlledAgreement], what: str) -> Decision:
    """What agreements with all references mean together: the most remarkable one that also has the effect decides."""
    assert limits.contradicts_from is not None
    assert limits.supports_below is not None
    assert limits.minimum_effect is not None
    assert limits.detectable_effect_at_most is not None
    remarkable = None
    for one in sorted(tested, key=lambda one: one.p):
        corrected = one.corrected_p(len(tested))
        shown = (
            f"{one.agreement:.0%} equal {what} with {one.reference}, {one.control_agreement:.0%} with "
            f"{one.best_control} (corrected p = {corrected:.2g})"
        )
        if corrected <= 10**-limits.contradicts_from:
            if one.excess >= limits.minimum_effect and one.excess > one.spread:
                return Decision(CONTRADICTS, f"{shown}: more than unrelated models", True)
            remarkable = remarkable or f"{shown}; the controls differ by {one.spread:.0%} among themselves"
        elif corrected <= 10**-limits.supports_below:
            remarkable = remarkable or shown
    if remarkable is not None:
        return Decision(INCONCLUSIVE, f"remarkable, and not beyond what unrelated models show: {remarkable}", True)
    detectable = max(one.detectable for one in tested)
    if detectable > limits.detectable_effect_at_most:
        return Decision(
            INCONCLUSIVE,
            f"no power: an excess below {detectable:.2f} over the best control could not have been seen, and "
            f"{limits.detectable_effect_at_most:.2f} is needed",
        )
    return Decision(SUPPORTS, f"no reference's {what} agree more than those of the other references", True)
