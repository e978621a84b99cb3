"""The figures that benchmarks/matching_null.py states: which pairs they are of, and what a later run adds to."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.matching_null import INNOCENT, merged, summarised


def row(
    name: str, relation: str, agreement: float, matching: str = "text", found: bool | None = False
) -> dict[str, Any]:
    figures = {"agreement": agreement, "largest_block": agreement, "largest_mismatched": 0.0, "joint_z": 1.0}
    measured = {**figures, "largest_z": 2.0, "z": [agreement, -agreement], "found": found, "reason": None}
    return {"candidate": name, "reference": "base", "relation": relation, matching: measured}


def test_bounds_are_of_innocent_pairs_alone() -> None:
    rows = [row("a", INNOCENT, 0.02), row("b", INNOCENT, 0.01), row("c", "derived", 1.0, found=True)]
    rows.append(row("twin", "shared initialisation", 0.05))
    rows.append({"candidate": "d", "reference": "base", "relation": INNOCENT, "text": {"reason": "no tokenizer"}})
    found = summarised(rows)
    assert found["pairs"] == 3
    text = found["largest"]["text"]
    assert (text["agreement"], text["matched_pairs"], text["blocks"], text["found"]) == (0.02, 2, 4, 0)
    assert text["mean_z"] == 0
    assert text["sd_z"] == pytest.approx(0.018, abs=1e-3)
    assert found["related"] == {"text": {"pairs": 2, "found": 1}}


def test_a_later_run_adds_matchings_and_replaces_those_it_repeats() -> None:
    old = {key: value for key, value in row("a", INNOCENT, 0.02, "tokens").items() if key != "relation"}
    rows = merged([old], [row("a", INNOCENT, 0.03), row("b", "derived", 0.9)])
    assert [one["candidate"] for one in rows] == ["a", "b"]
    assert rows[0]["relation"] == INNOCENT
    assert (rows[0]["tokens"]["agreement"], rows[0]["text"]["agreement"]) == (0.02, 0.03)
    assert merged(rows, [row("a", INNOCENT, 0.04)])[0]["text"]["agreement"] == 0.04
