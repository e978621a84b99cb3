"""Which keys do two architectures share, and how many models of the catalogue share them too?"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from checks.catalog.architecture import (
    FIELD_TYPES,
    Architecture,
    applies,
    attention_kind,
    expert_layout,
    is_mixture,
    moe_layout,
)
from checks.catalog.entry import comparable

#: architecture-analysis.md: five of five equal is "same architecture"; 3-4 similar; 1-2 independent design; 0 other.
FIVE_KEYS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act")
#: The rows of the seed's table for Solar-Open-100B.
SEVEN_KEYS_MOE = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "experts",
    "vocab_size",
    "rope_theta",
)
#: The rows of the seed's table for HyperCLOVAX-SEED-Think-32B.
SEVEN_KEYS_DENSE = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "rope_theta",
)
#: Shown in place of a value that this kind of model cannot have: experts of a dense model, KV heads under MLA.
DOES_NOT_APPLY = "does not apply"

_DERIVED: dict[str, Callable[[Architecture], str | None]] = {
    "attention_kind": attention_kind,
    "experts": expert_layout,
    "moe_layout": moe_layout,
}
#: Every normalised key, and the derived ones in place of the stated attention.
OVERLAP_KEYS = tuple(key for key in FIELD_TYPES if key != "attention") + tuple(_DERIVED)


@dataclass(frozen=True, slots=True)
class KeyComparison:
    """One row of a comparison. equal is None when a side is unknown, or when the key applies to neither."""

    key: str
    candidate: object
    reference: object
    equal: bool | None


def value_of(architecture: Architecture, key: str) -> object:
    """The value under a normalised or derived key: None when unknown, DOES_NOT_APPLY when it cannot have one.

    Raises ValueError for a key that is neither a field of Architecture nor attention_kind, experts or moe_layout.
    """
    if key not in FIELD_TYPES and key not in _DERIVED:
        raise ValueError(f"unknown key {key!r}; known: {', '.join(OVERLAP_KEYS)}")
    possible = is_mixture(architecture) if key in ("experts", "moe_layout") else applies(architecture, key)
    if possible is False:
        return DOES_NOT_APPLY
    return _DERIVED[key](architecture) if key in _DERIVED else getattr(architecture, key)


def compare_keys(candidate: Architecture, reference: Architecture, keys: Sequence[str]) -> list[KeyComparison]:
    """Which of these keys are equal? One KeyComparison per key, in the order given."""
    return [_compare(key, value_of(candidate, key), value_of(reference, key)) for key in keys]


def _compare(key: str, candidate: object, reference: object) -> KeyComparison:
    unknown = candidate is None or reference is None
    neither = candidate == DOES_NOT_APPLY and reference == DOES_NOT_APPLY
    return KeyComparison(key, candidate, reference, None if unknown or neither else candidate == reference)


def five_keys(candidate: Architecture, reference: Architecture) -> list[KeyComparison]:
    """The five-key rule of architecture-analysis.md.

    Known false positive: A.X-K1 and Kimi-K2 share all five. Equal keys raise a question that only weights answer.
    """
    return compare_keys(candidate, reference, FIVE_KEYS)


def overlap(candidate: Architecture, reference: Architecture) -> list[KeyComparison]:
    """All normalised keys, with the attention kind and the expert layout; keys that neither side knows are left out."""
    rows = compare_keys(candidate, reference, OVERLAP_KEYS)
    return [row for row in rows if {row.candidate, row.reference} - {None, DOES_NOT_APPLY}]


def prevalence(
    key: str, value: object, component: str = "model", exclude: Collection[str] = ()
) -> tuple[int, int, tuple[str, ...]]:
    """How many models of the catalogue have this value under this key, of how many whose value is known?

    Returns (sharing, known, sharing_keys). Models to which the key does not apply are not among the known.
    component: "model" and "text" are one kind; "vision" compares with vision towers. exclude: catalogue keys left
    out, such as the candidate's own.
    """
    sharing: list[str] = []
    known = 0
    for entry_key, _, architecture in comparable(component):
        found = value_of(architecture, key)
        if entry_key in exclude or found is None or found == DOES_NOT_APPLY:
            continue
        known += 1
        if found == value:
            sharing.append(entry_key)
    return len(sharing), known, tuple(sharing)
