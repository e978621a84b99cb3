"""Logs in four formats, read alike, and files that nobody vouches for."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checks.checkpoint.errors import CheckpointUnavailable
from checks.logs import LogRecord, TrainingLog, UnreadableLog, read_log
from checks.logs.files import parse_log
from checks.logs.records import columns_of, normalised

ROWS = [
    {"step": 1, "loss": 6.9, "tokens": 2048, "learning_rate": 5e-5},
    {"step": 10, "loss": 6.5, "tokens": 20480, "learning_rate": 5e-4},
    {"step": 20, "loss": 6.0, "tokens": 40960, "learning_rate": 1e-3},
]
RECORDS = tuple(LogRecord(int(row.pop("step")), **row) for row in map(dict, ROWS))


def field(number: int, kind: int, value: bytes) -> bytes:
    size = b"" if kind in (0, 1, 5) else bytes([len(value)])
    return bytes([number << 3 | kind]) + size + value


def event(step: int, tag: str, value: float, tensor: bool = False) -> bytes:
    """A TensorBoard record of one scalar, as PyTorch (simple_value) or TensorFlow 2 (tensor) writes it."""
    number = struct.pack("<f", value)
    scalar = field(2, 5, number)
    if tensor:
        scalar = field(8, 2, field(1, 0, b"\x01") + field(4, 2, number))
    summary = field(1, 2, field(1, 2, tag.encode()) + scalar)
    message = field(1, 1, struct.pack("<d", 0.0)) + field(2, 0, bytes([step])) + field(5, 2, summary)
    return struct.pack("<Q", len(message)) + b"\0\0\0\0" + message + b"\0\0\0\0"


def tensorboard(tensor: bool = False) -> bytes:
    names = {"loss": "train/loss", "tokens": "train/num_input_tokens_seen", "learning_rate": "train/learning_rate"}
    return b"".join(event(int(row["step"]), names[name], float(row[name]), tensor) for row in ROWS for name in names)


def trainer_state() -> bytes:
    history: list[dict[str, Any]] = [
        {
            **{("num_input_tokens_seen" if name == "tokens" else name): value for name, value in row.items()},
            "epoch": 0.1,
        }
        for row in ROWS
    ]
    history.insert(1, {"step": 5, "eval_loss": 6.7})
    history.append({"step": 20, "train_loss": 6.4, "train_runtime": 3.0, "total_flos": 1e9})
    return json.dumps({"global_step": 20, "log_history": history}).encode()


def wandb_csv() -> bytes:
    names = ["train/loss", "train/loss__MIN", "train/loss__MAX", "train/tokens", "lr"]
    head = ",".join(['"Step"', *(f'"run-a - {name}"' for name in names)])
    lines = [f"{row['step']},{row['loss']},0,99,{row['tokens']},{row['learning_rate']}" for row in ROWS]
    return "\n".join([head, *lines, "30,,,,,", ""]).encode()


def json_lines(**names: str) -> bytes:
    return b"".join(
        json.dumps({names.get(key, key): value for key, value in row.items()}).encode() + b"\n" for row in ROWS
    )


FORMATS = {
    "log.jsonl": json_lines(),
    "wandb.jsonl": json_lines(step="_step", loss="train/loss", learning_rate="train/lr", tokens="train/tokens"),
    "list.json": json.dumps(ROWS).encode(),
    "lines.json": json_lines(),
    "trainer_state.json": trainer_state(),
    "wandb.csv": wandb_csv(),
    "plain.txt": wandb_csv(),
    "megatron.jsonl": json_lines(
        step="iteration", loss="lm loss", tokens="consumed-tokens", learning_rate="learning-rate"
    ),
    "torchtitan.jsonl": json_lines(
        loss="loss_metrics/global_avg_loss", tokens="n_tokens_seen", learning_rate="optim/lr"
    ),
}


def rounded(log: TrainingLog) -> list[tuple[Any, ...]]:
    return [
        tuple(
            None if value is None else pytest.approx(value, rel=1e-6)
            for value in (record.step, record.loss, record.tokens, record.learning_rate)
        )
        for record in log.records
    ]


def plain(records: tuple[LogRecord, ...]) -> list[tuple[Any, ...]]:
    return [(record.step, record.loss, record.tokens, record.learning_rate) for record in records]


@pytest.mark.parametrize("name", FORMATS)
def test_one_log_in_every_format_is_the_same(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(FORMATS[name])
    log = read_log(tmp_path / name)
    assert log.records == RECORDS
    assert set(log.columns) == {"step", "loss", "tokens", "learning_rate"}
    assert len(log.sha256) == 64


@pytest.mark.parametrize("tensor", [False, True])
def test_tensorboard_events_are_the_same_log(tensor: bool, tmp_path: Path) -> None:
    (tmp_path / "events.out.tfevents.1.host").write_bytes(tensorboard(tensor))
    for path in (tmp_path, tmp_path / "events.out.tfevents.1.host"):
        log = read_log(path)
        assert log.format == "TensorBoard"
        assert rounded(log) == plain(RECORDS)
        assert log.unread == 0


def test_a_run_that_was_killed_leaves_part_of_a_record(tmp_path: Path) -> None:
    (tmp_path / "events.out.tfevents.1.host").write_bytes(tensorboard() + event(30, "train/loss", 5.0)[:-9])
    log = read_log(tmp_path)
    assert len(log.records) == 3
    assert log.unread == len(event(30, "train/loss", 5.0)) - 9


def test_event_files_follow_each_other_by_name(tmp_path: Path) -> None:
    (tmp_path / "events.out.tfevents.2.host").write_bytes(event(7, "loss", 1.0))
    (tmp_path / "events.out.tfevents.1.host").write_bytes(event(3, "loss", 2.0))
    assert [record.step for record in read_log(tmp_path).records] == [3, 7]


def test_values_that_are_not_finite_are_kept(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text(
        '{"step": 1, "loss": NaN}\n{"step": 2, "loss": "inf"}\n{"step": 3, "loss": 2}\n'
    )
    losses = [loss for _, loss in read_log(tmp_path / "log.jsonl").of("loss")]
    assert losses[0] != losses[0]
    assert losses[1:] == [float("inf"), 2]


def test_order_is_that_of_the_file_and_repeated_steps_stay(tmp_path: Path) -> None:
    rows = [{"step": 5, "loss": 3.0}, {"step": 6, "loss": 2.9}, {"step": 5, "loss": 3.1}, {"step": 5, "loss": 3.2}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [(record.step, record.loss) for record in read_log(tmp_path / "log.jsonl").records] == [
        (5, 3.0),
        (6, 2.9),
        (5, 3.1),
        (5, 3.2),
    ]


def test_rows_of_one_step_that_complete_each_other_are_one(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text('{"_step": 5, "loss": 3.0}\n{"_step": 5, "lr": 0.1}\n')
    assert read_log(tmp_path / "log.jsonl").records == (LogRecord(5, 3.0, None, 0.1),)


def test_evaluation_losses_are_no_training_losses() -> None:
    assert "loss" not in columns_of(["step", "eval/loss", "eval_loss", "val_loss"])
    assert normalised("my run - train/loss") == "train_loss"


def test_the_examples_are_read(examples: Path) -> None:
    log = read_log(examples / "base" / "training_log.jsonl")
    assert len(log.records) == 121
    assert log.records[0] == LogRecord(1, 6.975004, 2048, 5e-05)


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("log.jsonl", b"{", "line 1 is not JSON"),
        ("log.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("log.jsonl", b"", "no column of step"),
        ("log.jsonl", b'{"step": 1}\n', "no column of loss"),
        ("log.jsonl", b'{"loss": 1}\n', "no column of step"),
        ("log.jsonl", b'{"step": 1, "loss": null}\n', "no loss at any step"),
        ("log.jsonl", b'{"step": 1e300, "loss": 2}\n{"step": NaN, "loss": 2}\n', "no loss at any step"),
        ("log.jsonl", b'{"step": 1, "loss": [1]}\n', "no loss at any step"),
        ("trainer_state.json", b'{"log_history": [1, "a"]}', "no column of step"),
        ("log.json", b"[" * 100_000, "not JSON"),
        ("log.csv", b'step,loss\n1,"2', "not CSV"),
        ("log.csv", b"\xff\xfe", "not text"),
        ("events.out.tfevents.1", b"", "no whole record"),
        ("events.out.tfevents.1", b"\xff" * 100, "no whole record"),
        (
            "events.out.tfevents.1",
            struct.pack("<Q", 2) + b"\0\0\0\0" + b"\x0a\xff" + b"\0\0\0\0",
            "not a TensorBoard event",
        ),
    ],
)
def test_hostile_files_are_unavailable(name: str, data: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CheckpointUnavailable, match=says) as error:
        read_log(tmp_path / name)
    assert name in str(error.value)


def test_missing_files_and_directories_without_logs_are_unavailable(tmp_path: Path) -> None:
    with pytest.raises(CheckpointUnavailable, match="cannot be read"):
        read_log(tmp_path / "none.jsonl")
    with pytest.raises(CheckpointUnavailable, match="0 TensorBoard event files"):
        read_log(tmp_path)


def test_files_beyond_the_bound_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("checks.logs.files.LARGEST_LOG", 5)
    (tmp_path / "log.jsonl").write_bytes(json_lines())
    with pytest.raises(CheckpointUnavailable, match="more than 5 bytes"):
        read_log(tmp_path / "log.jsonl")


@given(st.sampled_from(["a.jsonl", "a.json", "a.csv", "trainer_state.json", "tfevents.1"]), st.binary(max_size=200))
def test_any_bytes_are_a_log_or_an_error(name: str, data: bytes) -> None:
    parse: Callable[[], TrainingLog] = lambda: parse_log({name: data})  # noqa: E731
    try:
        log = parse()
    except UnreadableLog:
        return
    assert log.records


def hugging_face_in_wandb(every: int = 10) -> list[dict[str, Any]]:
    """What Weights & Biases keeps of a run of the Hugging Face trainer, which hands it no step."""
    return [
        {"_step": call, "train/global_step": (call + 1) * every, "train/loss": 5.0 - 0.1 * call} for call in range(5)
    ]


def test_the_trainers_own_step_comes_before_the_trackers(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in hugging_face_in_wandb()))
    log = read_log(tmp_path / "log.jsonl")
    assert [record.step for record in log.records] == [10, 20, 30, 40, 50]
    assert not log.counts_calls


@pytest.mark.parametrize(
    ("names", "step", "counts_calls"),
    [
        (["_step", "iteration", "loss"], "iteration", False),
        (["_step", "step", "loss"], "step", False),
        (["_step", "loss"], "_step", True),
        (["Step", "run - train/loss", "run - train/loss__MIN"], "Step", True),
        (["Step", "run - _step", "run - train/global_step", "run - loss"], "run - train/global_step", False),
        (["Step", "loss"], "Step", False),  # a spreadsheet of somebody's own
        (["trainer/global_step", "step", "loss"], "trainer/global_step", False),
    ],
)
def test_which_step_is_read(names: list[str], step: str, counts_calls: bool) -> None:
    log = parse_log({"log.json": json.dumps([dict.fromkeys(names, 3)]).encode()})
    assert (log.columns["step"], log.counts_calls) == (step, counts_calls)


@pytest.mark.parametrize(
    "names", [["Step", "run1 - train/loss", "run2 - train/loss"], ["step", "run1 - lr", "run2 - lr", "loss"]]
)
def test_columns_of_two_runs_are_not_told_apart(names: list[str]) -> None:
    with pytest.raises(UnreadableLog, match=r"2 of its columns are a .*'run1 - "):
        columns_of(names)


def test_other_columns_may_have_one_name() -> None:
    assert columns_of(["step", "loss", "eval/bleu", "eval_bleu"]) == {"step": "step", "loss": "loss"}


def test_a_log_that_was_written_newest_first_is_turned_round(tmp_path: Path) -> None:
    (tmp_path / "log.json").write_text(json.dumps(ROWS[::-1]))
    assert read_log(tmp_path / "log.json").records == RECORDS


@pytest.mark.parametrize("make", [lambda path: os.mkfifo(path), lambda path: path.symlink_to("/dev/zero")])
def test_only_regular_files_are_read(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "log.jsonl")
    with pytest.raises(CheckpointUnavailable, match="no regular file"):
        read_log(tmp_path / "log.jsonl")


def test_a_file_is_read_up_to_the_bound_whatever_its_size_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("checks.logs.files.LARGEST_LOG", 100)
    asked: list[int] = []

    def read(path: Path, largest: int) -> bytes:
        asked.append(largest)
        return b"x" * largest

    monkeypatch.setattr("checks.logs.files._bytes", read)
    with pytest.raises(CheckpointUnavailable, match="at most"):
        read_log(tmp_path / "log.jsonl")
    assert asked == [101]
