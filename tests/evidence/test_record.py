"""Evidence as JSON."""

from __future__ import annotations

import json
import math

from hypothesis import given
from hypothesis import strategies as st

from checks.evidence.record import OUTCOMES, Evidence, evidence_from_json

values = st.none() | st.integers(-(2**53), 2**53) | st.floats()
details = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from(OUTCOMES), values, st.dictionaries(st.text(max_size=5), details, max_size=3))
def test_any_evidence_survives_json(outcome: str, value: float | None, more: dict[str, object]) -> None:
    text = Evidence("similarity.mean", outcome, "because", value, details=more).as_json()
    json.dumps(json.loads(text), allow_nan=False)
    again = evidence_from_json(text)
    assert again.outcome == outcome
    if value is None or not math.isfinite(value):
        assert again.value is None
    else:
        assert again.value == value
    assert again.as_json() == text


def test_layer_numbers_and_tuples_become_plain_json() -> None:
    text = Evidence("a.b", "supports", "", details={"per_layer": {0: 0.5, 1: math.nan}, "names": ("x", "y")}).as_json()
    assert json.loads(text)["details"] == {"per_layer": {"0": 0.5, "1": None}, "names": ["x", "y"]}


def test_the_headline_leaves_out_what_is_unknown() -> None:
    evidence = Evidence("a.b", "supports", "low", 0.5, threshold={"supports_below": 0.6})
    assert dict(evidence.headline()) == {
        "outcome": "supports",
        "value": 0.5,
        "reason": "low",
        "threshold.supports_below": 0.6,
    }
