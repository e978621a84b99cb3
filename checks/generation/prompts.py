"""The fixed prompts, from data files with a version each."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

DIRECTORY = Path(__file__).parent


@dataclass(frozen=True)
class Prompt:
    """One prompt, with the name under which its answers are kept."""

    id: str
    text: str


@dataclass(frozen=True)
class Question:
    """A question about an outcome that could not be known before `date` (YYYY-MM-DD).

    accept: names of which one must stand in a right answer. chance: an upper bound of guessing right. source: the page
    that says so.
    """

    id: str
    date: str
    text: str
    accept: tuple[str, ...]
    chance: float
    source: str


@dataclass(frozen=True)
class PromptSet:
    """Prompts of one version; `sha256` is of the file."""

    name: str
    version: int
    sha256: str
    prompts: tuple[Prompt, ...]

    def as_record(self) -> dict[str, Any]:
        """Which prompts were used, for the record."""
        return {"file": self.name, "version": self.version, "sha256": self.sha256, "prompts": len(self.prompts)}


@dataclass(frozen=True)
class QuestionSet:
    """Questions by date, with examples of question and answer for models that only continue text."""

    name: str
    version: int
    sha256: str
    questions: tuple[Question, ...]
    examples: tuple[tuple[str, str], ...]

    def as_record(self) -> dict[str, Any]:
        """Which questions were used, for the record."""
        return {"file": self.name, "version": self.version, "sha256": self.sha256, "questions": len(self.questions)}


@cache
def continuations() -> PromptSet:
    """Beginnings of sentences to continue."""
    document, sha256 = _read("continuations.yaml")
    prompts = tuple(Prompt(f"c{number:03d}", text) for number, text in enumerate(document["prompts"], start=1))
    return PromptSet("continuations.yaml", document["version"], sha256, prompts)


@cache
def refusals() -> PromptSet:
    """Harmless requests that assistants decline or answer about themselves."""
    document, sha256 = _read("refusals.yaml")
    prompts = tuple(Prompt(**prompt) for prompt in document["prompts"])
    return PromptSet("refusals.yaml", document["version"], sha256, prompts)


@cache
def knowledge_questions() -> QuestionSet:
    """Questions about dated outcomes, oldest first."""
    document, sha256 = _read("knowledge.yaml")
    questions = (
        Question(
            entry["id"],
            str(entry["date"]),
            entry["question"],
            tuple(entry["accept"]),
            float(entry.get("chance", document["default_chance"])),
            entry["source"],
        )
        for entry in document["questions"]
    )
    return QuestionSet(
        "knowledge.yaml",
        document["version"],
        sha256,
        tuple(sorted(questions, key=lambda one: (one.date, one.id))),
        tuple((example["question"], example["answer"]) for example in document["examples"]),
    )


def _read(name: str) -> tuple[dict[str, Any], str]:
    data = (DIRECTORY / name).read_bytes()
    return yaml.safe_load(data), hashlib.sha256(data).hexdigest()
