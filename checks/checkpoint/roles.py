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


@dataclass(frozen=True)
class Layout:
    """How the tensors of one pattern are stored, and what they are connected to."""

    experts: str | None = None  # "routed" or "shared"
    fused: tuple[str, ...] = ()  # the parts it holds, in stored order
    stacked: str | None = None  # every expert in one tensor: "axis" [experts, …] or "rows" [experts * rows, …]
    transposed: bool = False  # each matrix is stored [in, out]
    interleaved: bool = False  # the fused parts take turns row by row
    grouped: bool = False  # fused q, k, v: for every key head the rows of its queries, of the key, of the value
    rope_layout: str | None = None  # of rotated rows: "half-split" or "interleaved"; latent attention rotates a part
    residual: str | None = None  # "reader" or "writer" of the residual stream
    norm: str | None = None  # part of the same layer (or of the model) through which it reads or writes
    norm_function: str | None = None  # of a norm: "rms" or "layer"
    zero_centred: bool = False  # of a norm: stored minus one
    tied_to: str | None = None  # part with which it may share its values


@dataclass(frozen=True)
class TensorRole(Role):
    """What a tensor is. The fields of Role mean the same as there, so it stands wherever a Role does.

    `kind` is set only for gate, up and down matrices that can be read as they stand: [out, in], one MLP; `part` names
    all: q, kv_a, gate_up, router, q_bias, … The layer of a next-token-prediction block counts on after the last layer
    of the main stack, to which it does not belong: its component is "mtp".
    """

    part: str | None = None
    component: str = "text"  # text, mtp, vision, audio, projector
    layout: Layout = Layout()
    packed: str | None = None  # how its values are packed: weight_packed, qweight, mxfp4
    companion_of: str | None = None  # last step of the name of the weight that it scales, shifts or describes

    @property
    def mlp_place(self) -> tuple[str, int | None, str | None, int | None]:
        """What the matrices of one MLP share, and no other MLP of the model has: component, layer, whose, expert.

        "Whose" is "routed", "shared", or None for a dense MLP; the expert is None in a tensor that holds them all.
        """
        return self.component, self.layer, self.layout.experts, self.expert


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
