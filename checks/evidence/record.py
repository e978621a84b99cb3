"""What a case measured, as plain data that survives a worker, a JUnit file and a year."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Outcomes of a case, as the contract names them (docs/outcomes.md).
SUPPORTS = "supports"
CONTRADICTS = "contradicts"
DISCLOSED = "disclosed"
INCONCLUSIVE = "inconclusive"
NOT_APPLICABLE = "not applicable"
UNAVAILABLE = "unavailable"
ERROR = "error"
OUTCOMES = (SUPPORTS, CONTRADICTS, DISCLOSED, INCONCLUSIVE, NOT_APPLICABLE, UNAVAILABLE, ERROR)


@dataclass(frozen=True)
class Evidence:
    """The evidence of one case.

    `powered`: a contrary finding was possible. `keeps_open`: inconclusive in a way that no other check's pass excuses.
    """

    check: str
    outcome: str
    reason: str
    value: float | int | None = None
    band: str | None = None
    threshold: Mapping[str, Any] = field(default_factory=dict)
    documented: str | None = None
    powered: bool = False
    keeps_open: bool = False
    details: Mapping[str, Any] = field(default_factory=dict)
    read: Mapping[str, Any] = field(default_factory=dict)

    def headline(self) -> list[tuple[str, object]]:
        """The few facts that a JUnit report shows beside the whole record."""
        facts = {"outcome": self.outcome, "value": self.value, "band": self.band, "documented": self.documented}
        limits = {f"threshold.{name}": limit for name, limit in self.threshold.items()}
        return [(name, fact) for name, fact in {**facts, "reason": self.reason, **limits}.items() if fact is not None]

    def as_json(self) -> str:
        """One line of JSON: sorted keys, and null for a number that is not finite."""
        return json.dumps(_plain(vars(self)), sort_keys=True, ensure_ascii=False, allow_nan=False)


def evidence_from_json(text: str) -> Evidence:
    """The evidence that `as_json` wrote."""
    return Evidence(**json.loads(text))


def _plain(value: Any) -> Any:
    """`value` with mappings, tuples and numbers as JSON has them."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(one) for one in (sorted(value) if isinstance(value, set | frozenset) else value)]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value
