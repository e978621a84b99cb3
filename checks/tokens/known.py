"""What the catalogue says of a tokenizer, for when its files cannot be had."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from checks.catalog.entry import CatalogEntry, Figure, main_component

# Facts that say something of a vocabulary; ids of single tokens and names of classes do not.
FACTS = ("kind", "entries", "special_tokens", "merges", "digest")


def known_facts(entry: CatalogEntry | None) -> dict[str, Any]:
    """Figures of a tokenizer with their sources, for the record; nothing if the catalogue has neither kind nor size.

    `embedding_rows`: of the model's token table, which may be padded beyond the vocabulary.
    """
    if entry is None:
        return {}
    found = {name: _as_evidence(entry, entry.tokenizer[name]) for name in FACTS if name in entry.tokenizer}
    if not found:
        return {}
    text = entry.components.get(main_component(entry.components))
    return found | ({"embedding_rows": {"value": text.vocab_size}} if text and text.vocab_size else {})


def described(facts: Mapping[str, Any]) -> str:
    """The facts in a few words: `byte-level BPE, 128000 entries, 256 special tokens`."""
    values = {name: fact["value"] for name, fact in facts.items()}
    said = [str(values["kind"])] if "kind" in values else []
    said += [
        f"{values[name]} {name.replace('_', ' ')}" for name in ("entries", "special_tokens", "merges") if name in values
    ]
    return ", ".join(said)


def _as_evidence(entry: CatalogEntry, figure: Figure) -> dict[str, Any]:
    said: dict[str, Any] = {"value": figure.value, "source": entry.sources[figure.source]}
    if figure.unverified:
        said["unverified"] = True
    if figure.note:
        said["note"] = figure.note
    return said
