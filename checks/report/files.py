"""verdict.json and evidence.jsonl: the record of a run, with no times and no workers: same evidence, same bytes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from checks.claim.model import ModelSource
from checks.claim.verdict import CaseResult, Verdict
from checks.evidence.thresholds import families, threshold

VERDICT_FILE = "verdict.json"
EVIDENCE_FILE = "evidence.jsonl"


def write_report(
    directory: Path,
    verdicts: Sequence[Verdict],
    shown: Callable[[Path], str],
    where: Callable[[ModelSource], str] = lambda source: source.where,
) -> None:
    """Write both files into `directory`, which is made if need be. Raises OSError when it cannot be written.

    `shown`: how a path is named. `where`: where the weights of a model are.
    """
    directory.mkdir(parents=True, exist_ok=True)
    document = {
        "claims": {verdict.claim.name: _verdict_document(verdict, shown, where) for verdict in verdicts},
        "ratings": {family: facts["rating"] for family, facts in families().items() if "rating" in facts},
    }
    text = json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    (directory / VERDICT_FILE).write_text(text + "\n", encoding="utf-8")
    lines = [
        json.dumps({"claim": verdict.claim.name, **_case_document(one)}, sort_keys=True, ensure_ascii=False)
        for verdict in verdicts
        for one in verdict.results
    ]
    (directory / EVIDENCE_FILE).write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def _verdict_document(
    verdict: Verdict, shown: Callable[[Path], str], where: Callable[[ModelSource], str]
) -> dict[str, Any]:
    claim = verdict.claim
    return {
        "file": shown(claim.path),
        "statement": claim.statement,
        "claimant": claim.claimant,
        "source": claim.source,
        "model": {"name": claim.model.name, "where": where(claim.model)},
        "verdict": verdict.verdict,
        "text": verdict.text,
        "limits": list(verdict.limits),
        "counts": verdict.counts,
        "overrides": {
            check: {**override.values, "reason": override.reason} for check, override in claim.overrides.items()
        },
        "components": {
            one.component.label: {
                "verdict": one.verdict,
                "reasons": list(one.reasons),
                "disclosed": sorted(one.component.disclosed),
                "prefixes": list(one.component.prefixes),
                "panel": [
                    {
                        "name": reference.source.name,
                        "where": where(reference.source),
                        "prefixes": list(reference.prefixes),
                        "nearest": reference.nearest,
                    }
                    for reference in one.component.panel
                ],
            }
            for one in verdict.components
        },
        "panel": list(
            dict.fromkeys(reference.source.name for one in verdict.components for reference in one.component.panel)
        ),
        "cases": {one.case.id: _case_document(one) for one in verdict.results},
    }


def _case_document(one: CaseResult) -> dict[str, Any]:
    case = one.case
    return {
        "case": case.id,
        "check": case.check,
        "component": case.component,
        "reference": case.reference,
        "layer": case.layer,
        "strength": threshold(case.check).strength,
        "outcome": one.outcome or "no report",
        "evidence": json.loads(one.evidence.as_json()) if one.evidence else None,
    }
