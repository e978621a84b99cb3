"""Positive proof of scratch: training that began at weights which a public generator and a short seed give."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from checks.pair import measures

if TYPE_CHECKING:
    from checks.evidence.judge import Judge
    from checks.pair.pair import Pair


def origin(pair: Pair, judge: Judge) -> None:
    """Did training begin at the stated initial weights, and does the candidate share no more with the reference?

    Null hypothesis: candidate and reference learned apart, from these initial weights or the reference from others.
    Statistic: mean row cosine of same-numbered hidden units of both models, each unit without its projection on the
    same unit of the initial weights, size of it, 0 to 1. Needs the permutation test of initial weights and candidate to
    show that one came from the other, and an embedding that shares little beyond them.
    Documented: tutorial-qa.md, Q1 (training evidence); weights made again bit for bit are this suite's condition.
    Known false negatives: equal starts and equal data make updates alike, more so early in the training.
    Blind to: initial weights that were only published, which can be the reference with noise: they never pass.
    """
    if pair.initial is None:
        judge.not_applicable("the claim states no initial weights")
    found = pair.once(measures.origin)
    details: dict[str, Any] = {
        "read": pair.read(),
        "initial_weights": found.reason,
        "mlps": found.mlps,
        "start": None if found.start is None else {"z": found.start.z, "effect": found.start.effect},
        "reference_start": None
        if found.reference_start is None
        else {"z": found.reference_start.z, "effect": found.reference_start.effect},
        "beyond": {name: test.effect for name, test in found.beyond.items()},
        "steps": found.steps,
    }
    if not found.regenerated:
        judge.inconclusive(found.reason, found.beyond_by_size, **details)
    if found.start is None or found.beyond_by_size is None:
        judge.inconclusive("no MLP has the same shape in initial weights, candidate and reference", None, **details)
    critical = judge.critical_z("independence.units", found.mlps)
    if found.start.z < critical:
        judge.inconclusive(
            f"no trace of the initial weights in the candidate: z = {found.start.z:.1f}, critical {critical:.2f}",
            found.beyond_by_size,
            **details,
        )
    limit = judge.threshold.embedding_below
    assert limit is not None
    if found.embedding_beyond >= limit:
        judge.inconclusive(
            f"the embedding shares {found.embedding_beyond:.2f} beyond the initial weights, bound {limit}",
            found.beyond_by_size,
            **details,
        )
    judge(found.beyond_by_size, **details)
