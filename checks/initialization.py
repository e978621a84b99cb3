"""Positive proof of scratch: training that began at weights which a public generator and a short seed give."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from checks.pair import measures

if TYPE_CHECKING:
    from checks.evidence.judge import Judge
    from checks.pair.pair import Pair

# Parts that a record names one by one.
SHOWN_PARTS = 5


def origin(pair: Pair, judge: Judge) -> None:
    """Did candidate and reference both begin at the stated initial weights, and share no part of what they learned?

    Null hypothesis: both began at these weights and learned apart. Only then does the start explain a resemblance.
    Statistic: mean row cosine of same-numbered hidden units of both models, each unit without its projection on the
    same unit of the initial weights; size of it in that MLP, or other matrix of a layer, where it is largest, 0 to 1.
    Needs the permutation test to show that every part of the candidate came from the same part of the initial weights,
    and the reference's MLPs from theirs, and that neither embedding nor head shares much beyond them.
    Not applicable to a reference that began elsewhere: a start in common explains nothing then.
    Documented: tutorial-qa.md, Q1 (training evidence); weights made again bit for bit are this suite's condition.
    Known false negatives: equal starts and equal data make updates alike, more so early in the training; matrices that
    begin at zero, or forgot their start, show no trace of it.
    Blind to: initial weights that were only published, which can be the reference with noise: they never pass; a merge
    with less of the reference, or a copy of fewer units, than the bound lets through; routers of few experts.
    """
    if pair.initial is None:
        judge.not_applicable("the claim states no initial weights")
    found = pair.once(measures.origin)
    largest = {name: found.largest_beyond(name) for name in ("mlp", "matrix", "embedding")}
    strongest, vocabulary = found.largest_beyond("mlp", "matrix"), largest["embedding"]
    value = None if strongest is None or strongest.beyond is None else abs(strongest.beyond)
    weakest = found.weakest_start
    details: dict[str, Any] = {
        "read": pair.read(),
        "initial_weights": found.reason,
        "mlps": found.mlps,
        "parts": len(found.blocks),
        "start": None if found.start is None else {"z": found.start.z, "effect": found.start.effect},
        "weakest_start": None if weakest is None else {"name": weakest.name, "z": weakest.start},
        "reference_start": None
        if found.reference_start is None
        else {"z": found.reference_start.z, "effect": found.reference_start.effect},
        "beyond": {
            group: {"name": one.name, "effect": one.beyond} for group, one in largest.items() if one is not None
        },
        "steps": found.steps,
    }
    if not found.regenerated:
        judge.inconclusive(found.reason, value, **details)
    if found.start is None or weakest is None:
        judge.inconclusive("no MLP of the candidate can be compared with the initial weights", None, **details)
    critical = judge.critical_z("independence.units", len(found.blocks))
    if weakest.start is None or weakest.start < critical:
        z = "no z" if weakest.start is None else f"z = {weakest.start:.1f}"
        judge.inconclusive(
            f"no trace of the initial weights in the candidate's {weakest.name}: {z}, critical {critical:.2f}; "
            f"all MLPs together z = {found.start.z:.1f}",
            value,
            **details,
        )
    if found.reference_start is None or found.reference_start.z < critical:
        z = "no MLP has their shape" if found.reference_start is None else f"z = {found.reference_start.z:.1f}"
        judge.not_applicable(
            f"the reference began elsewhere ({z}, critical {critical:.2f}): a start in common explains nothing",
            **details,
        )
    if found.unmeasured or value is None:
        more = f" and {len(found.unmeasured) - SHOWN_PARTS} more" if len(found.unmeasured) > SHOWN_PARTS else ""
        judge.inconclusive(
            f"the reference has no counterpart of {', '.join(found.unmeasured[:SHOWN_PARTS])}{more}: "
            "what they share beyond the initial weights is not known",
            value,
            **details,
        )
    limit = judge.threshold.embedding_below
    assert limit is not None
    if vocabulary is not None and vocabulary.beyond is not None and abs(vocabulary.beyond) >= limit:
        judge.inconclusive(
            f"the {vocabulary.name} shares {abs(vocabulary.beyond):.2f} beyond the initial weights, bound {limit}",
            value,
            **details,
        )
    judge(value, **details)
