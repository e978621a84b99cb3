"""What the catalogue says of tokenizers."""

from __future__ import annotations

import pytest

from checks.catalog import entry as catalog
from checks.tokens.known import described, known_facts


def test_facts_come_with_their_sources() -> None:
    facts = known_facts(catalog.load("solar_open_100b"))
    assert set(facts) == {"kind", "entries", "merges", "digest", "embedding_rows"}
    assert facts["entries"]["value"] == facts["embedding_rows"]["value"] == 196608
    assert "tokenizer" in facts["merges"]["source"]
    assert described(facts) == "byte-level BPE, 196608 entries, 192256 merges"


def test_what_is_unverified_says_so() -> None:
    facts = known_facts(catalog.load("exaone_3_5_32b"))
    assert facts["kind"]["unverified"]
    assert described(facts) == "BPE"


@pytest.mark.parametrize("key", ["deepseek_v3", "solar_10_7b"])
def test_ids_of_single_tokens_are_no_fact_of_a_vocabulary(key: str) -> None:
    assert known_facts(catalog.load(key)) == {}


def test_a_model_outside_the_catalogue() -> None:
    assert known_facts(None) == {}


def test_every_entry_can_be_described() -> None:
    for entry in catalog.load_all().values():
        assert bool(known_facts(entry)) == bool(described(known_facts(entry)))
