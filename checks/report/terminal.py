"""The verdicts at the end of a run, for a person to read at a glance."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from checks.claim.model import Reference
from checks.claim.verdict import OPEN_OUTCOMES, CaseResult, Verdict
from checks.evidence.decisions import BETWEEN
from checks.evidence.record import (
    CONTRADICTS,
    DISCLOSED,
    ERROR,
    INCONCLUSIVE,
    NOT_APPLICABLE,
    SUPPORTS,
    UNAVAILABLE,
    Evidence,
)
from checks.evidence.text import format_value, printable
from checks.evidence.thresholds import families, threshold

_SEVERITY = (CONTRADICTS, ERROR, DISCLOSED, INCONCLUSIVE, SUPPORTS, UNAVAILABLE, NOT_APPLICABLE)
_COLOURS = {
    "REFUTED": "red",
    "SUPPORTED": "green",
    "DISCLOSED": "yellow",
    "INCONCLUSIVE": "yellow",
    "PARTIAL": "yellow",
}
_MOST_REASONS = 8


def write_verdicts(terminal: Any, verdicts: list[Verdict], shown: Callable[[Path], str]) -> None:
    """Write every verdict: the verdict, the panel, the worst evidence per family, and what was not measured and why."""
    terminal.section("claims")
    for verdict in verdicts:
        claim = verdict.claim
        terminal.write_line("")
        terminal.write_line(f"{shown(claim.path)}: {printable(claim.statement)}")
        terminal.write("  ")
        terminal.write(verdict.verdict, bold=True, **{_COLOURS[verdict.verdict]: True})
        terminal.write_line(f"{' ' if verdict.text.startswith('except ') else ': '}{verdict.text}")
        for one in verdict.components:
            label = f"panel of {one.component.label}" if len(verdict.components) > 1 else "panel"
            names = [_reference(reference, shown) for reference in one.component.panel]
            state = f" [{one.verdict}]" if len(verdict.components) > 1 else ""
            terminal.write_line(f"  {label}{state}: {', '.join(names)}")
        terminal.write_line("  worst evidence per family:")
        for line in family_lines(verdict):
            terminal.write_line(f"    {printable(line)}")
        reasons = list(unmeasured_lines(verdict))
        if reasons:
            terminal.write_line("  not measured:")
        for line in reasons[:_MOST_REASONS]:
            terminal.write_line(f"    {printable(line)}")
        if len(reasons) > _MOST_REASONS:
            terminal.write_line(f"    and {len(reasons) - _MOST_REASONS} more reasons, in verdict.json (--report DIR)")
        for check, override in claim.overrides.items():
            changed = ", ".join(f"{name} {format_value(value)}" for name, value in override.values.items())
            terminal.write_line(f"  threshold of this claim: {check}: {changed} ({override.reason})")
        for limit in verdict.limits:
            terminal.write_line(f"  limit: {limit}")


def _reference(reference: Reference, shown: Callable[[Path], str]) -> str:
    """A reference's name, where it was read from if not from its hub repository, and why it is there."""
    where = f" ({shown(Path(reference.source.path))})" if reference.source.path else ""
    return f"{reference.source.name}{where}{' (nearest)' if reference.nearest else ''}"


def family_lines(verdict: Verdict) -> Iterator[str]:
    """One line per family: its worst case, with value, threshold and reference."""
    for family, facts in families().items():
        cases = [one for one in verdict.results if one.evidence and one.case.check.startswith(f"{family}.")]
        if not cases:
            continue
        worst = min(cases, key=_rank)
        assert worst.evidence is not None
        rating = facts.get("rating")
        rated = f" [rated: reliability {rating['reliability']}, detection {rating['detection']}]" if rating else ""
        yield f"{family:<14} {_described(worst, worst.evidence)}{rated}"


def unmeasured_lines(verdict: Verdict) -> Iterator[str]:
    """What was not measured and why: cases grouped by outcome and reason, what matters most first."""
    groups: dict[tuple[str, str], list[str]] = {}
    for one in verdict.results:
        if one.evidence is None:
            groups.setdefault(("no report", "deselected, or the run ended early"), []).append(one.case.id)
        elif one.outcome in OPEN_OUTCOMES:
            groups.setdefault((str(one.outcome), _without_value(one.evidence)), []).append(one.case.id)
    order = ("no report", ERROR, UNAVAILABLE, INCONCLUSIVE, NOT_APPLICABLE)
    for (outcome, reason), ids in sorted(groups.items(), key=lambda group: (order.index(group[0][0]), -len(group[1]))):
        more = f" and {len(ids) - 1} more" if len(ids) > 1 else ""
        yield f"{outcome}: {ids[0]}{more}: {reason}"


def _without_value(evidence: Evidence) -> str:
    """The reason, less a value that would make a group of every case."""
    return f"{evidence.check} between its bounds" if evidence.reason.endswith(BETWEEN) else evidence.reason


def _rank(one: CaseResult) -> tuple[int, float]:
    """Worst outcome first, then the value nearest to (or furthest past) the contradicting bound."""
    assert one.evidence is not None
    value, bound = one.evidence.value, _bound(one, one.evidence)
    return _SEVERITY.index(one.evidence.outcome), -abs(value) / (bound or 1.0) if value is not None else 0.0


def _bound(one: CaseResult, evidence: Evidence) -> float | None:
    """From where on the value contradicts."""
    limits = threshold(one.case.check)
    bound = evidence.details.get("critical_z") or evidence.threshold.get("contradicts_from", limits.contradicts_from)
    return None if bound is None else float(bound)


def _described(one: CaseResult, evidence: Evidence) -> str:
    bound = _bound(one, evidence)
    if evidence.value is None:
        return f"{evidence.outcome:<14} {one.case.id}"
    value = f"{format_value(evidence.value)} (contradicts from {format_value(bound)})"
    return f"{evidence.outcome:<14} {one.case.id} = {value}"
