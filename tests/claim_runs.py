"""Claims about the example models, run in this process as a user runs them, and what such a run reports."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

# Claims as text, for `example` of conftest.py: it fills in where the examples are, and which is the candidate.
INDEPENDENT = """\
claim: small
statement: A small model was trained from scratch.
model: {{name: candidate, path: {examples}/{candidate}}}
references:
  - {{name: base, path: {examples}/base}}
  - {{name: derived, path: {examples}/derived}}
nearest: 0
"""

ONE_REFERENCE = INDEPENDENT.replace("  - {{name: derived, path: {examples}/derived}}\n", "")

WITHOUT_BASE = """\
claim: small
statement: A small model was trained from scratch.
model: {{path: {examples}/derived}}
references: [{{name: gone, path: gone, config: {examples}/base/config.json}}]
nearest: 0
"""


def verdicts(directory: Path) -> dict[str, Any]:
    """The claims of a written report."""
    loaded: dict[str, Any] = json.loads((directory / "verdict.json").read_text())["claims"]
    return loaded


class ExampleClaim:
    """The claim `example` in example.yaml of pytester's directory: written, run, and its report read."""

    def __init__(self, pytester: pytest.Pytester) -> None:
        self.pytester = pytester
        self.path = pytester.path / "example.yaml"

    def write(self, model: Mapping[str, str], references: Sequence[Any], **content: Any) -> None:
        """Writes the claim about a model and its references, with whatever else a claim may hold."""
        claim = {
            "claim": "example",
            "statement": "The example model was trained from scratch.",
            "model": dict(model),
            "references": list(references),
            "nearest": 0,
            **content,
        }
        self.path.write_text(yaml.safe_dump(claim, sort_keys=False))

    def run(self, *options: str, report: str = "out") -> pytest.RunResult:
        """Runs the claim in this process and writes its report."""
        return self.pytester.runpytest(self.path.name, "--report", report, *options)

    def report(self, directory: str = "out") -> dict[str, Any]:
        """The claim in a written report."""
        found: dict[str, Any] = verdicts(self.pytester.path / directory)["example"]
        return found
