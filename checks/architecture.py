"""Configurations: what they share, and what that is worth. Suspicion only: a full match asks the weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from checks.catalog.comparison import (
    SEVEN_KEYS_DENSE,
    SEVEN_KEYS_MOE,
    KeyComparison,
    compare_keys,
    five_keys,
    prevalence,
)
from checks.catalog.comparison import overlap as compare_all_keys
from checks.catalog.nearest import nearest
from checks.escalation import weigh_pair
from checks.evidence.decisions import Decision, decide_by_bands
from checks.evidence.record import CONTRADICTS, INCONCLUSIVE, SUPPORTS

if TYPE_CHECKING:
    from checks.catalog.architecture import Architecture
    from checks.evidence.judge import Judge
    from checks.pair.candidate import Candidate
    from checks.pair.pair import Pair


# The documents' own tables have seven rows.
FEWEST_KNOWN_KEYS = 7


def identical(pair: Pair, judge: Judge) -> None:
    """Is the configuration that of the reference, by the documents' five keys?

    Null hypothesis: none; configurations are published and free to copy. Five of five equal keys are a suspicion, which
    the weights of that reference then clear or confirm; without its weights it stays open.
    Statistic: equal keys among hidden_size, num_hidden_layers, num_attention_heads, intermediate_size, hidden_act.
    Documented: architecture-analysis.md, "고유성 판단 기준".
    Known false positives: every model that follows a published design (Yi and Llama; A.X-K1 and Kimi-K2).
    """
    ours, theirs = _architectures(pair, judge)
    rows = five_keys(ours, theirs)
    _judge_matches(pair, judge, rows, as_share=False, keys=_table(rows))


def overlap(pair: Pair, judge: Judge) -> None:
    """How much of the whole configuration do both share, and how many models share each of those values?

    Null hypothesis: none; a design of the same period shares much. All known keys equal escalates to the weights.
    Statistic: share of equal keys among those known on both sides, 0 to 1; beside each shared value the number of
    catalogue models that have it too.
    Documented: architecture-analysis.md, "Architecture 비교 요약" (its seven-row tables are in the record).
    Known false positives: every derivative configuration trained anew.
    """
    ours, theirs = _architectures(pair, judge)
    rows = compare_all_keys(ours, theirs)
    seven = compare_keys(ours, theirs, SEVEN_KEYS_MOE if ours.n_routed_experts else SEVEN_KEYS_DENSE)
    component = pair.candidate.component or "text"
    _judge_matches(
        pair,
        judge,
        rows,
        as_share=True,
        keys=_table(rows),
        seven_keys=_table(seven),
        seven_keys_equal=f"{sum(row.equal is True for row in seven)}/{len(seven)}",
        shared_by={row.key: _prevalence(row, component) for row in rows if row.equal},
    )


def declared(candidate: Candidate, judge: Judge) -> None:
    """Do the stated parameter counts, the configuration and the stored tensors tell the same model?

    Null hypothesis: they do.
    Statistic: the largest relative difference between the total that is stated, the total that the configuration gives,
    and the sum of the stored shapes; 1 where a dimension of the configuration contradicts a shape.
    Documented: architecture-analysis.md, "기본 정보"; the bounds are this suite's.
    Known false positives: published totals that leave out embeddings or an extra prediction block.
    """
    from checks.pair.declared import declared_differences

    result = declared_differences(candidate)
    if not result.differences:
        missing = f": {result.missing}" if result.missing else ""
        judge.not_applicable(f"neither stated counts nor a configuration to compare{missing}", **result.details)
    judge(max(result.differences.values()), differences=result.differences, missing=result.missing, **result.details)


def panel(candidate: Candidate, judge: Judge) -> None:
    """Are the catalogue's nearest architectures in the panel?

    Null hypothesis: none; this asks whether the comparison was fair. A panel that leaves out the nearest neighbour
    cannot find the likeliest ancestor. Never contradicts.
    Statistic: how many of the three nearest architectures, at a distance of at most half the scale, are missing.
    Documented: the comparisons of the seed documents left out GLM-4.5-Air, DeepSeek-V3 and Kimi-K2.
    """
    architecture = candidate.architecture
    if architecture is None:
        judge.not_applicable("the candidate's configuration is not known")
    limits = judge.threshold
    own = (candidate.source.catalog_key,) if candidate.source.catalog_key else ()
    neighbours = [
        neighbour
        for neighbour in nearest(
            architecture, limits.nearest or 3, exclude=own, component=candidate.component or "text"
        )
        if neighbour.distance <= (limits.distance_at_most or 1.0)
    ]
    missing = [neighbour.key for neighbour in neighbours if neighbour.key not in candidate.panel]
    decision = decide_by_bands(limits, float(len(missing)))
    if missing:
        decision = Decision(INCONCLUSIVE, f"the panel leaves out {', '.join(missing)}; add them to references")
    judge.finish(
        decision,
        len(missing),
        nearest={neighbour.key: round(neighbour.distance, 4) for neighbour in neighbours},
        missing=missing,
    )


def _architectures(pair: Pair, judge: Judge) -> tuple[Architecture, Architecture]:
    ours, theirs = pair.candidate.architecture, pair.reference.architecture
    if ours is None:
        judge.not_applicable("the candidate's configuration of this part is not known")
    if theirs is None:
        judge.not_applicable(f"the configuration of this part of {pair.reference.name} is not known")
    return ours, theirs


def _judge_matches(pair: Pair, judge: Judge, rows: list[KeyComparison], *, as_share: bool, **details: Any) -> None:
    """Judge the count (or the share) of equal keys; a full match is decided by the weights of the reference."""
    known = [row for row in rows if row.equal is not None]
    keys = {row.key for row in rows}
    details["unverified"] = {
        side: sorted(keys & set(model.unverified_keys()))
        for side, model in (("candidate", pair.candidate), ("reference", pair.reference))
    }
    equal = sum(row.equal is True for row in rows)
    if not known:
        judge.not_applicable("no key of the configuration is known on both sides", **details)
    unknown = 0 if as_share else len(rows) - len(known)
    value: float = equal / len(known) if as_share else equal
    decision = judge.decide(lambda limits: decide_by_bands(limits, value))
    if as_share and len(known) < FEWEST_KNOWN_KEYS:
        decision = Decision(INCONCLUSIVE, f"no power: only {len(known)} keys are known on both sides")
    if unknown and decide_by_bands(judge.threshold, value + unknown).outcome != decision.outcome:
        decision = Decision(INCONCLUSIVE, f"{equal} keys are equal and {unknown} are unknown, which leaves it open")
    if decision.outcome == CONTRADICTS:
        opinion = weigh_pair(pair, judge)
        decision = Decision(
            opinion.outcome, f"{_counted(equal, known)} keys are equal; {opinion.reason}", opinion.powered
        )
        details["weights"] = opinion.details
    elif decision.outcome == SUPPORTS:
        decision = Decision(SUPPORTS, f"{_counted(equal, known)} known keys are equal", decision.powered)
    judge.finish(decision, value, equal_keys=equal, known_keys=len(known), unknown_keys=unknown, **details)


def _counted(equal: int, known: list[KeyComparison]) -> str:
    return f"{equal} of {len(known)}"


def _table(rows: list[KeyComparison]) -> dict[str, dict[str, Any]]:
    return {row.key: {"candidate": row.candidate, "reference": row.reference, "equal": row.equal} for row in rows}


def _prevalence(row: KeyComparison, component: str) -> str:
    sharing, known, _ = prevalence(row.key, row.candidate, component)
    return f"{sharing} of {known}"
