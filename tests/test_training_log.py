"""Training-log checks on logs of the example trainings: from scratch, continued, fine-tuned, joined."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checks.catalog.architecture import Architecture
from checks.checkpoint.errors import CheckpointUnavailable
from checks.claim.model import ModelSource
from checks.claim.training import Training
from checks.evidence.record import CONTRADICTS, INCONCLUSIVE, NOT_APPLICABLE, SUPPORTS, Evidence
from checks.pair.candidate import Candidate

Judged = Callable[..., Evidence]
Rows = list[dict[str, Any]]
VOCABULARY = 1024


@pytest.fixture
def rows(examples: Path) -> dict[str, Rows]:
    """The logs of the example trainings, as rows."""
    return {
        name: [json.loads(line) for line in (examples / name / "training_log.jsonl").read_text().splitlines()]
        for name in ("base", "independent", "derived", "continued")
    }


@pytest.fixture
def candidate_with(tmp_path: Path) -> Callable[..., Candidate]:
    """A candidate whose claim names a log of these rows."""

    def make(
        rows: Rows | None,
        vocabulary: int | None = VOCABULARY,
        tokens: float | None = None,
        component: str | None = None,
    ) -> Candidate:
        path = tmp_path / "log.jsonl"
        if rows is not None:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        architectures = {"text": Architecture(vocab_size=vocabulary)} if vocabulary else {}
        source = ModelSource(name="model", architectures=architectures)
        made = Candidate(source, component, ("",), Training(), frozenset())
        training = Training(log=None if rows is None else str(path), tokens=tokens)
        made.training = training  # type: ignore[attr-defined,unused-ignore]
        return made

    return make


def after(first: Rows, second: Rows) -> Rows:
    """`second` numbered as if it went on from `first`."""
    last = first[-1]
    return first + [
        {**row, "step": row["step"] + last["step"], "tokens": row["tokens"] + last["tokens"]} for row in second
    ]


Make = Callable[..., Candidate]
Logs = dict[str, Rows]


@pytest.mark.parametrize("name", ["base", "independent"])
def test_from_scratch(name: str, rows: Logs, candidate_with: Make, judged: Judged) -> None:
    subject = candidate_with(rows[name], tokens=2457600)
    begin = judged("training_log.initial_loss", subject)
    assert begin.outcome == SUPPORTS
    assert begin.value == pytest.approx(1 - rows[name][0]["loss"] / math.log(VOCABULARY))
    assert abs(begin.value or 1) < 0.01
    assert judged("training_log.continuity", subject).outcome == SUPPORTS
    assert judged("training_log.tokens", subject).outcome == SUPPORTS


def test_fine_tuned_from_another_model(rows: Logs, candidate_with: Make, judged: Judged) -> None:
    evidence = judged("training_log.initial_loss", candidate_with(rows["derived"]))
    assert evidence.outcome == CONTRADICTS
    assert evidence.value == pytest.approx(0.397, abs=0.001)
    assert "another training learnt" in (evidence.band or "")


def test_a_continued_run_that_counts_on(rows: Logs, candidate_with: Make, judged: Judged) -> None:
    """Its own part of the log alone: open, since what came before is missing and the loss may have fallen by then."""
    subject = candidate_with(rows["continued"])
    assert judged("training_log.initial_loss", subject).outcome == INCONCLUSIVE
    evidence = judged("training_log.continuity", subject)
    assert evidence.outcome == INCONCLUSIVE
    assert "begins at step 1201" in evidence.reason


def test_a_continued_run_that_counts_from_one(rows: Logs, candidate_with: Make, judged: Judged) -> None:
    """Numbered as a run of its own, it begins where no random weights are."""
    first = rows["continued"][0]
    renumbered = [
        {**row, "step": row["step"] - 1200, "tokens": row["tokens"] - 1200 * first["tokens"] // first["step"]}
        for row in rows["continued"]
    ]
    evidence = judged("training_log.initial_loss", candidate_with(renumbered))
    assert evidence.outcome == CONTRADICTS
    assert evidence.value == pytest.approx(1 - first["loss"] / math.log(VOCABULARY))
    assert (evidence.value or 0) > 0.6


def test_a_continued_run_with_what_came_before_is_one_run(rows: Logs, candidate_with: Make, judged: Judged) -> None:
    """The optimizer began anew at step 1201 and nothing else did: no break, and the beginning is that of the first."""
    subject = candidate_with(rows["base"] + rows["continued"])
    assert judged("training_log.initial_loss", subject).outcome == SUPPORTS
    evidence = judged("training_log.continuity", subject)
    assert evidence.outcome == SUPPORTS, evidence.reason


@pytest.mark.parametrize(("first", "second"), [("base", "derived"), ("derived", "base"), ("independent", "derived")])
@pytest.mark.parametrize("cut", [30, 60, 120])
def test_joined_from_two_runs(
    first: str, second: str, cut: int, rows: Logs, candidate_with: Make, judged: Judged
) -> None:
    joined = after(rows[first][:cut], rows[second])
    evidence = judged("training_log.continuity", candidate_with(joined))
    if cut == 30 and second == "derived":
        # At step 290 the base's loss is by chance near that of the other run's start: the learning rate alone breaks.
        assert evidence.outcome in (CONTRADICTS, INCONCLUSIVE)
    else:
        assert evidence.outcome == CONTRADICTS, evidence.reason
        assert "joined" in evidence.reason


def test_joined_without_new_numbers(rows: Logs, candidate_with: Make, judged: Judged) -> None:
    evidence = judged("training_log.continuity", candidate_with(rows["base"] + rows["derived"]))
    assert evidence.outcome == CONTRADICTS
    assert "go from 1200 back to 1" in evidence.reason


def test_a_restart_is_named_and_supports(rows: Logs, candidate_with: Make, judged: Judged) -> None:
    evidence = judged("training_log.continuity", candidate_with(rows["base"][:60] + rows["base"][55:]))
    assert evidence.outcome == SUPPORTS
    assert "restarted 1 times" in evidence.reason
    assert evidence.details["restarts"] == 1


def test_a_gap_leaves_it_open(rows: Logs, candidate_with: Make, judged: Judged) -> None:
    evidence = judged("training_log.continuity", candidate_with(rows["base"][:60] + rows["base"][80:]))
    assert (evidence.outcome, evidence.value) == (INCONCLUSIVE, 0)
    assert "no record between steps 590 and 800" in evidence.reason


def test_a_short_log_has_no_power(rows: Logs, candidate_with: Make, judged: Judged) -> None:
    evidence = judged("training_log.continuity", candidate_with(rows["base"][:10]))
    assert evidence.outcome == INCONCLUSIVE
    assert "no power" in evidence.reason


@pytest.mark.parametrize(
    ("step", "share", "outcome"),
    [
        (1, 1.02, SUPPORTS),
        (10, 0.97, SUPPORTS),  # an average over the first ten steps
        (500, 0.95, SUPPORTS),  # a long warm-up
        (1, 0.85, INCONCLUSIVE),
        (1, 0.7, CONTRADICTS),
        (10, 0.7, INCONCLUSIVE),  # token frequencies can be learnt in ten steps
        (10, 0.4, CONTRADICTS),
        (500, 0.4, INCONCLUSIVE),
        (1, 1.4, SUPPORTS),
        (1, 8.0, INCONCLUSIVE),  # a sum over micro-batches
    ],
)
def test_where_the_first_loss_decides(
    step: int, share: float, outcome: str, candidate_with: Make, judged: Judged
) -> None:
    subject = candidate_with([{"step": step, "loss": share * math.log(VOCABULARY)}])
    assert judged("training_log.initial_loss", subject).outcome == outcome


def test_losses_that_are_not_finite_are_passed_over(candidate_with: Make, judged: Judged) -> None:
    log = [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": math.log(VOCABULARY)}]
    assert judged("training_log.initial_loss", candidate_with(log)).outcome == SUPPORTS
    assert judged("training_log.initial_loss", candidate_with(log[:1])).outcome == INCONCLUSIVE


def test_an_unknown_vocabulary_is_not_applicable(rows: Logs, candidate_with: Make, judged: Judged) -> None:
    evidence = judged("training_log.initial_loss", candidate_with(rows["base"], vocabulary=None))
    assert evidence.outcome == NOT_APPLICABLE


@pytest.mark.parametrize(
    ("claimed", "outcome"),
    [(2457600, SUPPORTS), (2.5e6, SUPPORTS), (3e6, INCONCLUSIVE), (6e6, CONTRADICTS), (1e6, CONTRADICTS)],
)
def test_tokens_against_the_claim(
    claimed: float, outcome: str, rows: Logs, candidate_with: Make, judged: Judged
) -> None:
    evidence = judged("training_log.tokens", candidate_with(rows["base"], tokens=claimed))
    assert evidence.outcome == outcome
    assert evidence.details["logged"] == 2457600


def test_a_step_that_counts_calls_accuses_nobody(candidate_with: Make, judged: Judged) -> None:
    """A Hugging Face run in Weights & Biases: the second call came after 500 updates."""
    log = [{"_step": call, "train/loss": 0.4 * math.log(VOCABULARY)} for call in range(3)]
    evidence = judged("training_log.initial_loss", candidate_with(log))
    assert evidence.outcome == INCONCLUSIVE
    assert "may count calls" in evidence.reason
    with_step = [{**row, "train/global_step": 500 * (row["_step"] + 1)} for row in log]
    evidence = judged("training_log.initial_loss", candidate_with(with_step))
    assert (evidence.outcome, evidence.details["first_step"]) == (INCONCLUSIVE, 500)
    begins = [{"_step": 0, "train/loss": math.log(VOCABULARY)}]
    assert judged("training_log.initial_loss", candidate_with(begins)).outcome == SUPPORTS


def test_a_log_that_was_written_newest_first(rows: Logs, candidate_with: Make, judged: Judged) -> None:
    subject = candidate_with(rows["base"][::-1], tokens=2457600)
    for check in ("initial_loss", "continuity", "tokens"):
        assert judged(f"training_log.{check}", subject).outcome == SUPPORTS


@pytest.mark.parametrize(
    ("counts", "says"),
    [
        ([2048] * 30, "single steps"),
        ([3e9 + 2048 * step for step in range(30)], "begins at"),
        ([2048e-9 * step for step in range(30)], "another unit"),
        ([2048], "one record"),
    ],
)
def test_a_column_that_does_not_count_all_tokens_accuses_nobody(
    counts: list[float], says: str, candidate_with: Make, judged: Judged
) -> None:
    log = [{"step": step + 1, "loss": 3.0, "tokens": count} for step, count in enumerate(counts)]
    evidence = judged("training_log.tokens", candidate_with(log, tokens=1e12))
    assert evidence.outcome == INCONCLUSIVE
    assert says in evidence.reason


def test_a_restart_does_not_hide_that_the_log_is_too_short(rows: Logs, candidate_with: Make, judged: Judged) -> None:
    log = rows["base"][:60] + rows["base"][55:]
    assert judged("training_log.tokens", candidate_with(log, tokens=1e12)).outcome == CONTRADICTS


def test_tokens_that_nobody_counts_are_not_applicable(rows: Logs, candidate_with: Make, judged: Judged) -> None:
    without = [{"step": row["step"], "loss": row["loss"]} for row in rows["base"]]
    assert judged("training_log.tokens", candidate_with(without, tokens=1e6)).outcome == NOT_APPLICABLE
    assert judged("training_log.tokens", candidate_with(rows["base"])).outcome == NOT_APPLICABLE


@pytest.mark.parametrize("check", ["initial_loss", "continuity", "tokens"])
def test_no_log_is_not_applicable(check: str, rows: Logs, candidate_with: Make, judged: Judged) -> None:
    assert judged(f"training_log.{check}", candidate_with(None)).outcome == NOT_APPLICABLE
    vision = candidate_with(rows["base"], component="vision")
    assert judged(f"training_log.{check}", vision).outcome == NOT_APPLICABLE


@pytest.mark.parametrize("check", ["initial_loss", "continuity", "tokens"])
def test_a_log_that_cannot_be_read_is_unavailable(check: str, candidate_with: Make, judged: Judged) -> None:
    subject = candidate_with([])
    with pytest.raises(CheckpointUnavailable, match=r"log\.jsonl"):
        judged(f"training_log.{check}", subject)
