"""Which models of the catalogue have the nearest architecture?"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from checks.catalog.architecture import Architecture, applies
from checks.catalog.entry import comparable, load

SHAPE, STRUCTURE, SCALAR = 1.0, 0.5, 0.1

#: Weight of each key. SHAPE: a width or count that decides which tensors exist and how large they are in every layer;
#: copied weights keep it. STRUCTURE: choices around those tensors, and the vocabulary, whose table is often replaced.
#: SCALAR: anyone may change it for free after copying weights. Keys not listed (names, eps, dtype) weigh nothing.
WEIGHTS: dict[str, float] = {
    "hidden_size": SHAPE,
    "num_hidden_layers": SHAPE,
    "num_attention_heads": SHAPE,
    "num_key_value_heads": SHAPE,
    "head_dim": SHAPE,
    "intermediate_size": SHAPE,
    "q_lora_rank": SHAPE,
    "kv_lora_rank": SHAPE,
    "qk_nope_head_dim": SHAPE,
    "qk_rope_head_dim": SHAPE,
    "v_head_dim": SHAPE,
    "moe_intermediate_size": SHAPE,
    "n_routed_experts": SHAPE,
    "vocab_size": STRUCTURE,
    "n_shared_experts": STRUCTURE,
    "num_experts_per_tok": STRUCTURE,
    "first_k_dense_replace": STRUCTURE,
    "moe_layer_frequency": STRUCTURE,
    "hidden_act": STRUCTURE,
    "norm": STRUCTURE,
    "norms_per_layer": STRUCTURE,
    "qk_norm": STRUCTURE,
    "attention_bias": STRUCTURE,
    "mlp_bias": STRUCTURE,
    "tie_word_embeddings": STRUCTURE,
    "layer_pattern": STRUCTURE,
    "patch_size": STRUCTURE,
    "temporal_patch_size": STRUCTURE,
    "spatial_merge_size": STRUCTURE,
    "full_attention_layers": STRUCTURE,
    "out_hidden_size": STRUCTURE,
    "rope_theta": SCALAR,
    "rope_scaling": SCALAR,
    "max_position_embeddings": SCALAR,
    "sliding_window": SCALAR,
    "partial_rotary_factor": SCALAR,
    "routed_scaling_factor": SCALAR,
    "scoring_func": SCALAR,
}
#: Counts that may be zero: compared one higher, so that the logarithm exists.
MAY_BE_ZERO = frozenset({"n_shared_experts", "first_k_dense_replace"})


@dataclass(frozen=True, slots=True)
class Neighbour:
    """A component of a catalogue model and its distance, in [0, 1]."""

    key: str
    component: str
    distance: float


def distance(first: Architecture, second: Architecture) -> float:
    """How far apart are two architectures? In [0, 1], symmetric, 0 for identical rows.

    Gower's distance (Biometrics 27, 1971): the weighted mean over keys of a part distance in [0, 1].
    Number: min(1, |log2(a / b)|), so a factor of two or more is as far as it gets. Anything else: 0 if equal, else 1.
    A key unknown on a side is left out. A key that one side cannot have (experts of a dense model, latent ranks
    without latent attention) counts as different, and one that neither can have is left out.
    Rows with nothing in common to compare have distance 1: nothing shows that they are near.
    Weights: see WEIGHTS. Unsuited as evidence: equal shapes say nothing about the weights in them.
    """
    if first == second:
        return 0.0
    weighed = total = 0.0
    for key, weight in WEIGHTS.items():
        part = _part(first, second, key)
        if part is not None:
            weighed += weight * part
            total += weight
    return min(1.0, weighed / total) if total else 1.0


def _part(first: Architecture, second: Architecture, key: str) -> float | None:
    one_applies, other_applies = applies(first, key), applies(second, key)
    one, other = getattr(first, key), getattr(second, key)
    if one_applies is False or other_applies is False:
        if one_applies is other_applies:
            return None
        return None if (other if one_applies is False else one) is None else 1.0
    if one is None or other is None:
        return None
    if isinstance(one, bool) or not isinstance(one, int | float):
        return 0.0 if one == other else 1.0
    if key in MAY_BE_ZERO:
        one, other = one + 1, other + 1
    if one <= 0 or other <= 0:
        return 0.0 if one == other else 1.0
    return min(1.0, abs(math.log2(one) - math.log2(other)))


def _bases(key: str) -> tuple[str, ...]:
    """The entries that a model was derived from."""
    return load(key).derived_from


def nearest(
    architecture: Architecture, n: int, exclude: Collection[str] = (), component: str = "model"
) -> list[Neighbour]:
    """The n nearest components of the catalogue, nearest first; ties in the order of the keys.

    component: "model" and "text" are one kind, "vision" is another. exclude: catalogue keys left out, such as the
    candidate's own. Entries that do not know their hidden_size and number of layers are left out: a row of two
    known keys would be near to everything. A model that was derived from another entry and has its architecture is
    represented by that entry (DeepSeek-R1 by DeepSeek-V3), so that one architecture does not take two places.
    """
    rows = {
        key: (name, other)
        for key, name, other in comparable(component)
        if other.hidden_size is not None and other.num_hidden_layers is not None
    }
    found = [
        Neighbour(key, name, distance(architecture, other))
        for key, (name, other) in rows.items()
        if key not in exclude and not any(base in rows and distance(rows[base][1], other) == 0 for base in _bases(key))
    ]
    return sorted(found, key=lambda neighbour: (neighbour.distance, neighbour.key, neighbour.component))[: max(0, n)]
