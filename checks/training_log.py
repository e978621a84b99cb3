"""Training logs: did the run begin at random weights, and is the log that of one run as long as claimed?

A log is the claimant's own file and can be made up, so that it supports and never decides alone.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checks.applicable import require_text_decoder
from checks.evidence.decisions import Decision, decide_by_bands
from checks.evidence.record import CONTRADICTS, INCONCLUSIVE, SUPPORTS

if TYPE_CHECKING:
    from checks.evidence.judge import Judge
    from checks.logs import TrainingLog
    from checks.pair.candidate import Candidate

FEWEST_RECORDS = 20

# After so many updates weights are still nearly random, whatever the schedule.
FIRST_STEP = 2
# Within so many updates a model may have learnt how frequent tokens are, and no context: about two thirds of ln V.
EARLY_STEP = 10
BELOW_TOKEN_FREQUENCIES = 0.5

# Above so many times ln V a loss is no mean in nats a token: sums over micro-batches or losses of several heads.
LARGEST_LOSS = 1.5


def initial_loss(candidate: Candidate, judge: Judge) -> None:
    """Does the log begin at the loss of random weights?

    Null hypothesis: random weights; every token is equally likely and the loss is ln V, within a few per cent.
    Statistic: how far the first logged loss lies below ln V, as a share of ln V: 0 for random weights, 0.4 to 0.8 for a
    model that continues. Decides in the first two steps; up to step ten only a loss below what token frequencies alone
    can reach contradicts (warm-up and averages over a few steps do not matter there); a later first record only
    supports.
    Documented: tutorial-qa.md, Q1 (training logs: reliability very high); bounds of this suite.
    Known false positives: losses in other units than nats a token. A step that the tracker counted by itself never
    contradicts.
    Blind to: a log that was made up; a base whose embedding or head was made anew, which begins near ln V too.
    """
    log = _log(candidate, judge)
    vocabulary = candidate.architecture.vocab_size if candidate.architecture else None
    if vocabulary is None:
        judge.not_applicable("the size of the vocabulary is not known", read=_read(log))
    from checks.statistics.log import shortfall

    losses = [(step, loss) for step, loss in log.of("loss") if math.isfinite(loss)]
    if not losses:
        judge.inconclusive("no logged loss is finite", read=_read(log))
    step, first = losses[0]
    value = shortfall(first, vocabulary)
    described = f"the first logged loss, {first:.3f} at step {step}, against ln V = {math.log(vocabulary):.3f}"
    decision = judge.decide(lambda limits: decide_by_bands(limits, value))
    if 1 - value > LARGEST_LOSS:
        decision = Decision(INCONCLUSIVE, f"{described}: no mean in nats a token")
    elif decision.outcome == CONTRADICTS and log.counts_calls:
        decision = Decision(
            INCONCLUSIVE,
            f"no power: {described}, but the only step is Weights & Biases' own, which may count calls of its log; "
            "export the training code's own step as well",
        )
    elif decision.outcome == CONTRADICTS and step > FIRST_STEP:
        late = step > EARLY_STEP or value < BELOW_TOKEN_FREQUENCIES
        decision = Decision(INCONCLUSIVE, f"no power: {described}; it may have fallen by then") if late else decision
    if decision.outcome in (SUPPORTS, CONTRADICTS):
        decision = Decision(decision.outcome, f"{described}: {decision.reason}", decision.powered)
    judge.finish(
        decision,
        value,
        read=_read(log),
        first_step=step,
        first_losses=[{"step": one, "loss": loss} for one, loss in losses[:10]],
        random_loss=math.log(vocabulary),
        vocabulary=vocabulary,
    )


def continuity(candidate: Candidate, judge: Judge) -> None:
    """Is the log that of one uninterrupted run?

    Null hypothesis: one run; steps and tokens grow evenly, the learning rate follows a schedule, the loss has no jump.
    Statistic: places at which the loss jumps and steps, tokens or learning rate break as well, as where two runs were
    joined. A restart that repeats the losses logged before is named and no break; a gap, or one sign alone, leaves it
    open.
    Documented: tutorial-qa.md, Q1 (training logs); bounds of this suite.
    Known false positives: a new data mixture together with a new schedule.
    Blind to: runs joined at the same loss and the same point of the same schedule; jumps of less than a tenth.
    """
    from checks.statistics.log import discontinuities

    log = _log(candidate, judge)
    series = {name: log.of(name) for name in ("loss", "tokens", "learning_rate")}
    if len(series["loss"]) < FEWEST_RECORDS:
        judge.inconclusive(
            f"no power: {len(series['loss'])} logged losses; {FEWEST_RECORDS} are needed", read=_read(log)
        )
    places = discontinuities(series["loss"], series["tokens"], series["learning_rate"])
    breaks = [
        place for place in places if "loss" in place.signs and len(place.signs) > 1 and place.signs != ("gap", "loss")
    ]
    restarts = [place for place in places if "step" in place.signs and set(place.signs) <= {"step", "tokens"}]
    open_places = [place for place in places if place not in breaks and place not in restarts]
    decision = judge.decide(lambda limits: decide_by_bands(limits, len(breaks)))
    if decision.outcome == CONTRADICTS:
        decision = Decision(CONTRADICTS, f"two runs joined? {_told(breaks)}", True)
    elif open_places:
        decision = Decision(INCONCLUSIVE, f"not one even run: {_told(open_places)}")
    else:
        named = f", restarted {len(restarts)} times: {_told(restarts)}" if restarts else ""
        decision = Decision(SUPPORTS, f"{len(log.records)} records of one run{named}", True)
    judge.finish(
        decision,
        len(breaks),
        read=_read(log),
        places=[
            {"before": place.before, "after": place.after, "signs": place.signs, "details": place.details}
            for place in places[:100]
        ],
        places_in_all=len(places),
        restarts=len(restarts),
        not_finite=sum(not math.isfinite(loss) for _, loss in series["loss"]),
        records={name: len(values) for name, values in series.items()},
    )


def tokens(candidate: Candidate, judge: Judge) -> None:
    """Is the log as long as the claim says?

    Null hypothesis: it is.
    Statistic: |logged - claimed| / claimed tokens at the end of the log. It contradicts only where the column counts
    all tokens from the beginning of the run on; tokens of each step and a log of a later phase leave it open.
    Documented: tutorial-qa.md, Q1 (training logs); bounds of this suite.
    Known false positives: a log of the first phase alone; tokens counted with or without padding.
    Blind to: a log that was made up.
    """
    from checks.statistics.log import not_all_tokens

    log = _log(candidate, judge)
    claimed = candidate.training.tokens
    logged = [(step, count) for step, count in log.of("tokens") if math.isfinite(count)]
    if claimed is None or not logged:
        which = "the claim states no tokens" if claimed is None else "the log counts no tokens"
        judge.not_applicable(which, read=_read(log))
    step, count = max(logged, key=lambda one: one[1])
    value = abs(count - claimed) / claimed
    decision = judge.decide(lambda limits: decide_by_bands(limits, value))
    text = f"{count:.4g} tokens at step {step}, and {claimed:.4g} claimed"
    unlike = not_all_tokens(logged)
    if decision.outcome == CONTRADICTS and unlike:
        decision = Decision(INCONCLUSIVE, f"no power: {unlike}")
    judge.finish(
        Decision(decision.outcome, f"{text}: {decision.reason}", decision.powered),
        value,
        read=_read(log),
        logged=count,
        claimed=claimed,
        step=step,
        counts_all_tokens=unlike is None,
    )


def _log(candidate: Candidate, judge: Judge) -> TrainingLog:
    """The claim's log. Not applicable without one; raises CheckpointUnavailable when it cannot be read."""
    from checks.logs import read_log

    require_text_decoder(candidate, judge, "the training log")
    log = candidate.training.log
    if log is None:
        judge.not_applicable("the claim names no training log")
    return read_log(Path(log))


def _read(log: TrainingLog) -> dict[str, Any]:
    """What was read, for the record."""
    return {
        "training_log": {
            "format": log.format,
            "records": len(log.records),
            "columns": log.columns,
            "sha256": log.sha256,
            "unread_bytes": log.unread,
        }
    }


def _told(places: Any) -> str:
    told = [", ".join(place.details) for place in places[:3]]
    return "; ".join(told) + (f"; and {len(places) - 3} more" if len(places) > 3 else "")
