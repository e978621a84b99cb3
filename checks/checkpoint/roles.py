"""Tensor names → what a tensor is: its layer, its category, and for an MLP which of its matrices.

Covers the names of Llama, Qwen2 and Mixtral and whatever follows their conventions. A name that says nothing gets the
category "other" and still takes part by name and shape.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

CATEGORIES = (
    "embedding",
    "attention",
    "mlp",
    "norm",
    "output",
    "router",
    "routed expert",
    "shared expert",
    "bias",
    "other",
)

_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|blocks|block|h)\.(\d{1,6})(?=\.|$)")
_EXPERT = re.compile(r"(?:^|\.)experts\.(\d{1,6})(?=\.|$)")
_ROUTER = re.compile(r"(?:^|\.)(?:mlp|feed_forward|block_sparse_moe|ffn)\.(?:gate|router)\.|(?:^|\.)router\.")
_ROTARY_NORM = re.compile(r"(?:^|\.)(?:(?:q|k|query|key)_(?:norm|layernorm)|norm_[qk])\.")
_MLP_KINDS = {
    "gate_proj": "gate",
    "w1": "gate",
    "up_proj": "up",
    "w3": "up",
    "fc1": "up",
    "down_proj": "down",
    "w2": "down",
    "fc2": "down",
}


@dataclass(frozen=True)
class Role:
    """What a tensor is. `kind` is gate, up or down for an MLP's matrices; `expert` the index of a routed expert."""

    category: str
    layer: int | None = None
    kind: str | None = None
    expert: int | None = None
    index_has_meaning: bool = False  # q/k norms over rotary frequencies, biases: alike in any two models
    # What precedes the layer's number: a vision tower numbers its layers too. No part of what the tensor is.
    stack: str = field(default="", compare=False)


def role_of(name: str) -> Role:
    """The role of a tensor by its stored name."""
    found_layer = _LAYER.search(name)
    layer = int(found_layer.group(1)) if found_layer else None
    found_expert = _EXPERT.search(name)
    expert = int(found_expert.group(1)) if found_expert else None
    parts = name.lower().split(".")
    # Block scales and adapters stand beside the matrix under longer names: only `up_proj.weight` is the matrix.
    kind = _MLP_KINDS.get(_owner(parts)) if parts[-1] == "weight" or parts[-1] in _MLP_KINDS else None
    category = _category(name.lower(), parts, expert is not None, kind)
    index_has_meaning = category == "bias" or bool(_ROTARY_NORM.search(name))
    return Role(category, layer, kind, expert, index_has_meaning, name[: found_layer.start(1)] if found_layer else "")


def _owner(parts: list[str]) -> str:
    """The module that a tensor belongs to: `q_proj` of `self_attn.q_proj.weight`."""
    return parts[-2] if len(parts) > 1 and parts[-1] in ("weight", "bias") else parts[-1]


def _category(name: str, parts: list[str], in_expert: bool, kind: str | None) -> str:
    leaf, owner = parts[-1], _owner(parts)
    if "norm" in owner or owner in ("ln_1", "ln_2", "ln_f", "ln_q"):
        return "norm"
    if leaf.endswith("bias"):
        return "bias"
    if "embed" in name or "wte" in parts:
        return "embedding"
    if "lm_head" in parts or parts[0] == "output":
        return "output"
    if _ROUTER.search(name):
        return "router"
    if any(part.startswith("shared_expert") for part in parts):
        return "shared expert"
    if in_expert or "experts" in parts:
        return "routed expert"
    if any(part.startswith(("attn", "attention", "self_attn")) for part in parts):
        return "attention"
    if kind or any(part in ("mlp", "ffn", "feed_forward") for part in parts):
        return "mlp"
    return "other"
