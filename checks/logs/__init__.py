"""Training logs: four public formats read into one, within bounds."""

from checks.logs.files import read_log
from checks.logs.records import LogRecord, TrainingLog, UnreadableLog

__all__ = ["LogRecord", "TrainingLog", "UnreadableLog", "read_log"]
