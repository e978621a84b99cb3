"""Which format a log has, and its rows."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from checks.checkpoint.errors import CheckpointUnavailable
from checks.logs.records import MOST_RECORDS, TrainingLog, UnreadableLog, is_tracker_step, records_of
from checks.logs.tensorboard import rows_of_events

LARGEST_LOG = 512_000_000  # bytes
MOST_FILES = 1000
EVENTS = "tfevents"


def read_log(path: Path) -> TrainingLog:
    """The training log in a file, or the TensorBoard event files of a directory in the order of their names.

    Formats: trainer_state.json of the Hugging Face trainer, TensorBoard events, CSV, JSON lines, a JSON list of rows.
    Raises CheckpointUnavailable, naming the file, when there is none or it cannot be read.
    """
    try:
        contents: dict[str, bytes] = {}
        left = LARGEST_LOG
        for file in _files(path):
            contents[file.name] = data = _bytes(file, left + 1)
            left -= len(data)
            if left < 0:
                raise CheckpointUnavailable(f"{path}: a log of more than {LARGEST_LOG} bytes; at most so many are read")
    except OSError as error:
        raise CheckpointUnavailable(
            f"{path}: the training log cannot be read ({error.strerror or error}); correct the claim's training.log"
        ) from error
    try:
        return parse_log(contents)
    except UnreadableLog as error:
        raise CheckpointUnavailable(f"{path}: {error}") from error


def parse_log(contents: Mapping[str, bytes]) -> TrainingLog:
    """The log in these files, by name: one file, or several of TensorBoard events. Raises UnreadableLog."""
    digest = hashlib.sha256(b"".join(contents.values())).hexdigest()
    if len(contents) > 1 or any(EVENTS in name for name in contents):
        rows, unread = _events(contents)
        records, columns = records_of(rows)
        return TrainingLog("TensorBoard", records, columns, digest, unread)
    ((name, data),) = contents.items()
    kind, found = _rows(name, data)
    records, columns = records_of(found)
    counts_calls = is_tracker_step(columns["step"], (name for row in found for name in row))
    return TrainingLog(kind, records, columns, digest, counts_calls=counts_calls)


def _bytes(path: Path, largest: int) -> bytes:
    """At most so many bytes of a regular file: a device has no end, and a pipe may never begin. Raises OSError."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise CheckpointUnavailable(f"{path}: it is no regular file; correct the claim's training.log")
    with path.open("rb") as file:
        return file.read(largest)


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = sorted(one for one in path.iterdir() if EVENTS in one.name and one.is_file())
    if not found or len(found) > MOST_FILES:
        raise CheckpointUnavailable(
            f"{path}: a directory with {len(found)} TensorBoard event files; name the log's file, or a directory with "
            f"one to {MOST_FILES} of them"
        )
    return found


def _events(contents: Mapping[str, bytes]) -> tuple[list[dict[str, Any]], int]:
    rows: list[dict[str, Any]] = []
    unread = 0
    for data in contents.values():
        more, rest = rows_of_events(data)
        rows += more
        unread += rest
    return rows, unread


def _rows(name: str, data: bytes) -> tuple[str, list[dict[str, Any]]]:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UnreadableLog(f"it is not text ({error}); TensorBoard files have {EVENTS!r} in their name") from error
    if name.endswith((".csv", ".tsv")):
        return "CSV", _csv(text, "\t" if name.endswith(".tsv") else ",")
    if name.endswith((".jsonl", ".ndjson")):
        return "JSON lines", _json_lines(text)
    if text.lstrip()[:1] in ("{", "["):
        try:
            return _json(json.loads(text))
        except (ValueError, RecursionError):
            return "JSON lines", _json_lines(text)
    return "CSV", _csv(text, ",")


def _json(document: Any) -> tuple[str, list[dict[str, Any]]]:
    if isinstance(document, dict) and isinstance(document.get("log_history"), list):
        return "Hugging Face trainer state", _objects(document["log_history"])
    if isinstance(document, list):
        return "JSON", _objects(document)
    if isinstance(document, dict):
        return "JSON lines", [document]
    raise UnreadableLog("its JSON has neither a log_history nor rows")


def _json_lines(text: str) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        if number > MOST_RECORDS:
            raise UnreadableLog(f"it has more than {MOST_RECORDS} lines")
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise UnreadableLog(f"line {number} is not JSON ({error})") from error
    return _objects(rows)


def _csv(text: str, separator: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    try:
        for row in csv.DictReader(io.StringIO(text), delimiter=separator, strict=True):
            rows.append({key: value for key, value in row.items() if isinstance(key, str) and value not in ("", None)})
            if len(rows) > MOST_RECORDS:
                raise UnreadableLog(f"it has more than {MOST_RECORDS} rows")
    except csv.Error as error:
        raise UnreadableLog(f"it is not CSV ({error})") from error
    return rows


def _objects(rows: Iterable[Any]) -> list[dict[str, Any]]:
    return [row for row in rows if isinstance(row, dict)]
