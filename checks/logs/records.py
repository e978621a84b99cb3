"""One form for every log: what was known at each logged step."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

MOST_RECORDS = 5_000_000

# Names under which public training code logs these, after `normalised`.
# Weights & Biases' own step comes last: it counts calls of its log where training code hands it no step.
TRACKER_STEP = "the tracker's own step"
STEP = (
    "train_global_step",
    "trainer_global_step",
    "step",
    "global_step",
    "iteration",
    "iter",
    "update",
    TRACKER_STEP,
)
LOSS = (
    "loss",
    "train_loss",
    "training_loss",
    "loss_train",
    "lm_loss",
    "train_lm_loss",
    "language_model_loss",
    "ce_loss",
    "train_ce_loss",
    "loss_metrics_global_avg_loss",
)
TOKENS = (
    "tokens",
    "num_tokens",
    "n_tokens",
    "tokens_seen",
    "n_tokens_seen",
    "consumed_tokens",
    "total_tokens",
    "train_tokens",
    "num_input_tokens_seen",
    "train_num_input_tokens_seen",
)
LEARNING_RATE = ("learning_rate", "lr", "train_learning_rate", "train_lr", "optim_learning_rate", "optim_lr")

# The Hugging Face trainer closes its log with averages over the whole run.
SUMMARY_KEYS = ("train_runtime", "total_flos_per_second", "train_samples_per_second")


class UnreadableLog(ValueError):
    """The file is not a training log of the format that its name says."""


@dataclass(frozen=True, slots=True)
class LogRecord:
    """What a log says about one step; None for what it does not say. Values that are not finite are kept."""

    step: int
    loss: float | None = None
    tokens: float | None = None
    learning_rate: float | None = None


@dataclass(frozen=True)
class TrainingLog:
    """A log in the order in which it was written, or the other way round where it was written newest first.

    columns: which names of the file were read. sha256: of the file's bytes. unread: bytes at the end that are no whole
    record, as a run leaves that is still writing or was killed. counts_calls: its steps are those that Weights & Biases
    counts by itself, which are updates only where training code says so.
    """

    format: str
    records: tuple[LogRecord, ...]
    columns: Mapping[str, str]
    sha256: str = ""
    unread: int = 0
    counts_calls: bool = False

    def of(self, name: str) -> list[tuple[int, float]]:
        """Step and value of every record that has `name` ("loss", "tokens", "learning_rate")."""
        return [(record.step, value) for record in self.records if (value := getattr(record, name)) is not None]


def normalised(name: str) -> str:
    """A column's name without what exports put around it: "my-run - train/loss" → "train_loss"."""
    last = name.rsplit(" - ", 1)[-1].lower()
    return re.sub(r"[^a-z0-9]+", "_", last).strip("_")


def columns_of(names: Iterable[str]) -> dict[str, str]:
    """Which column is the step, the loss, the tokens, the learning rate: the first known name that there is.

    Raises UnreadableLog where two columns have that name, as in an export of two runs.
    """
    names = [name for name in names if not name.endswith(("__MIN", "__MAX"))]
    by_name: dict[str, list[str]] = {}
    for name in names:
        by_name.setdefault(TRACKER_STEP if is_tracker_step(name, names) else normalised(name), []).append(name)
    found = {}
    for meaning, known in (("step", STEP), ("loss", LOSS), ("tokens", TOKENS), ("learning_rate", LEARNING_RATE)):
        called = next((one for one in known if one in by_name), None)
        if called is None:
            continue
        columns = by_name[called]
        if len(columns) > 1 and called != TRACKER_STEP:
            shown = ", ".join(repr(column[:80]) for column in columns[:4])
            raise UnreadableLog(f"{len(columns)} of its columns are a {meaning} ({shown}); leave one run's in the file")
        found[meaning] = columns[0]
    return found


def is_tracker_step(name: str, names: Iterable[str]) -> bool:
    """Is this column the step that Weights & Biases counts by itself: `_step`, or `Step` in an export of a chart?"""
    return name.rsplit(" - ", 1)[-1] == "_step" or (name == "Step" and any(" - " in one for one in names))


def records_of(rows: Iterable[Mapping[str, Any]]) -> tuple[tuple[LogRecord, ...], dict[str, str]]:
    """Records of rows of a log, and the columns they were read from. Rows of one step that follow each other are one.

    A log whose steps fall throughout was written newest first, and is turned round. Raises UnreadableLog when there is
    no column of steps or none of losses, or two.
    """
    rows = [row for row in rows if not any(key in row for key in SUMMARY_KEYS)]
    columns = columns_of(dict.fromkeys(key for row in rows for key in row))
    for needed in ("step", "loss"):
        if needed not in columns:
            known = STEP if needed == "step" else LOSS
            raise UnreadableLog(
                f"it has no column of {needed} among {len(rows)} rows; expected one of {', '.join(known)}"
            )
    records: list[LogRecord] = []
    for row in rows:
        step = _number(row.get(columns["step"]))
        if step is None or step != step or abs(step) > 2**53:
            continue
        values = {name: _number(row.get(columns[name])) for name in columns if name != "step"}
        if all(value is None for value in values.values()):
            continue
        records.append(_merged(records, int(step), values))
    if not any(record.loss is not None for record in records):
        raise UnreadableLog("it has no loss at any step")
    if records[-1].step < records[0].step and all(later.step <= one.step for one, later in pairwise(records)):
        records.reverse()
    return tuple(records), columns


def _merged(records: list[LogRecord], step: int, values: dict[str, float | None]) -> LogRecord:
    """The record of these values; it takes the last one's place when it is of the same step and says nothing twice."""
    last = records[-1] if records else None
    if last is not None and last.step == step:
        known = {name: getattr(last, name) for name in values}
        if all(known[name] is None or value is None for name, value in values.items()):
            records.pop()
            values = {name: value if value is not None else known[name] for name, value in values.items()}
    return LogRecord(step, **values)


def _number(value: Any) -> float | None:
    """A number, also from text ("1e-4", "NaN"); None for anything else."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, str) and len(value) > 100:
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None
