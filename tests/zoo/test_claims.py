"""The claims that score the suite: what each states, and which verdict is right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.detection import ZooClaim, zoo_claims
from tests.zoo.ancestry import load_ancestry

SEED = 7


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    """A zoo of which only the record of llama stands; the claims are written from that and the ancestry."""
    for half in ("setting", "scoring", "small"):
        record = tmp_path / half / "llama" / "zoo.json"
        record.parent.mkdir(parents=True)
        record.write_text(json.dumps({"initial_seed": SEED}), encoding="utf-8")
    return tmp_path


def claims_of(half: str, zoo: Path, innocents: int = 99) -> dict[str, ZooClaim]:
    """The claims of a half by name, each name once."""
    claims = list(zoo_claims(half, zoo, innocents))
    assert len({claim.name for claim in claims}) == len(claims)
    return {claim.name: claim for claim in claims}


@pytest.mark.parametrize("half", ["setting", "scoring"])
@pytest.mark.parametrize(
    ("claim", "model", "states_seed", "right"),
    [
        ("llama_twin", "llama_twin", False, "REFUTED"),
        ("twin_with_seed", "llama_twin", True, "SUPPORTED"),
        ("llama_second_twin", "llama_second_twin", False, "REFUTED"),
        ("second_twin_with_seed", "llama_second_twin", True, "SUPPORTED"),
        ("llama_grafted", "llama_grafted", False, "REFUTED"),
        ("graft_with_seed", "llama_grafted", True, "REFUTED"),
        ("derived_with_seed", "llama_fine_tuned", True, "REFUTED"),
        ("llama_other_data_upcycled", "llama_other_data_upcycled", False, "REFUTED"),
        ("llama_other_order", "llama_other_order", False, "SUPPORTED"),
        ("llama_continued_twice", "llama_continued_twice", False, "REFUTED"),
    ],
)
def test_what_a_claim_states_and_which_verdict_is_right(
    half: str, claim: str, model: str, states_seed: bool, right: str, zoo: Path
) -> None:
    found = claims_of(half, zoo)[claim]
    assert found.model.name == f"{half}/{model}"
    assert found.right == right
    assert found.document(zoo).get("initial") == ({"generator": "torch", "seed": SEED} if states_seed else None)


def test_a_claim_that_states_a_seed_asks_the_same_references_as_the_plain_one(zoo: Path) -> None:
    claims = claims_of("scoring", zoo, innocents=2)
    for stated, plain in (("second_twin_with_seed", "llama_second_twin"), ("graft_with_seed", "llama_grafted")):
        assert claims[stated].references == claims[plain].references
        assert "scoring/llama" in claims[plain].references


@pytest.mark.parametrize("innocents", [0, 2, 99])
def test_a_model_beside_is_kept_however_few_innocents_are_asked(innocents: int, zoo: Path) -> None:
    claim = claims_of("scoring", zoo, innocents)["llama_other_data_upcycled"]
    assert claim.references["scoring/llama_upcycled"] == "innocent"
    assert claim.references["scoring/llama_other_data"] == "derived"
    unrelated = [name for name, relation in claim.references.items() if relation == "innocent"]
    assert len(unrelated) == 1 + min(innocents, 4)


@pytest.mark.parametrize("half", ["setting", "scoring", "small"])
def test_every_candidate_has_a_claim(half: str, zoo: Path) -> None:
    plain = {claim.model.name for claim in claims_of(half, zoo).values()}
    assert plain == {candidate.name for candidate, _, _ in load_ancestry().pairs(half)}
