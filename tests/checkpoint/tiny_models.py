"""Tiny models of every supported model type, as transformers builds them, and where their parts stand in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers

from checks.checkpoint.template import TensorRole, assign_roles

FIXTURES = Path(__file__).parent / "templates"
#: By model type: how a tiny configuration differs from SMALL, and what its layers then hold beside routed experts.
FAMILIES: dict[str, Any] = json.loads((FIXTURES / "families.json").read_text())
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
WRAPPERS = ("exaone4_5", "gemma3", "hyperclovax_vision_v2", "llama4", "qwen2_5_vl")
TEXT = sorted(FAMILIES.keys() - set(WRAPPERS))
#: Families whose MLPs have no gate.
GATELESS = ("bloom", "gpt2", "gpt_neox", "opt", "phi", "starcoder2")


def build(model_type: str, **changes: Any) -> Any:
    """A tiny model with weights from a fixed seed."""
    family = FAMILIES[model_type]
    given = dict(family["config"])
    own = {} if "text_config" in given or family.get("whole") else SMALL
    given |= {"text_config": SMALL | given["text_config"]} if "text_config" in given else {}
    config = transformers.AutoConfig.for_model(model_type, **{**own, **given, **changes})
    torch.manual_seed(len(model_type))
    named = getattr(transformers, family["class"])
    return named.from_config(config) if family["class"].startswith("Auto") else named(config)


def sizes(config: Mapping[str, Any]) -> SimpleNamespace:
    """The sizes of a configuration under one name each."""
    ffn, attention = config.get("ffn_config", {}), config.get("attn_config", {})
    hidden = config.get("hidden_size") or config.get("d_model") or config["n_embd"]
    heads = next(config[key] for key in ("num_attention_heads", "num_heads", "n_heads", "n_head") if key in config)
    experts = [config.get(key) for key in ("n_routed_experts", "num_experts", "num_local_experts")]
    widths = [config.get(key) for key in ("intermediate_size", "n_inner", "ffn_dim")]
    width = next(filter(None, widths), 4 * hidden)
    # OPT's table begins with two rows that no position has.
    positions = (
        config["max_position_embeddings"] + 2 if config.get("model_type") == "opt" else config.get("n_positions")
    )
    moe = config.get("moe_intermediate_size") or ffn.get("ffn_hidden_size") or width
    return SimpleNamespace(
        hidden=hidden,
        heads=heads,
        kv=config.get("num_key_value_heads") or attention.get("kv_n_heads") or heads,
        head=config.get("head_dim") or hidden // heads,
        dense=config.get("intermediate_size_mlp") or width or moe,
        moe=moe,
        shared=config.get("shared_expert_intermediate_size")
        or moe * (config.get("n_shared_experts") or config.get("num_shared_experts") or 1),
        experts=next(filter(None, [*experts, ffn.get("moe_num_experts")]), 0),
        rope=config.get("qk_rope_head_dim", 0),
        nope=config.get("qk_nope_head_dim", 0),
        value=config.get("v_head_dim", 0),
        q_rank=config.get("q_lora_rank"),
        kv_rank=config.get("kv_lora_rank", 0),
        vocabulary=config.get("vocab_size"),
        positions=positions,
        model_type=config.get("model_type"),
    )


def edited(model_type: str) -> tuple[Any, dict[str, torch.Tensor], dict[str, TensorRole], SimpleNamespace]:
    """A tiny model with an untied head, its tensors and their roles."""
    model = build(model_type, **({} if model_type == "dbrx" else {"tie_word_embeddings": False})).eval()
    tensors = {name: value for name, value in model.state_dict().items() if value.is_floating_point()}
    for name, value in tensors.items():
        if value.dim() > 1:
            value.normal_(0, 0.25)  # far from the tiny initial weights, at which attention and gates hardly matter
        if name.endswith("bias"):
            value.zero_()
    config = json.loads(model.config.to_json_string(use_diff=False))
    assigned = assign_roles({name: tuple(value.shape) for name, value in tensors.items()}, config)
    assert not assigned.unassigned
    return model, tensors, dict(assigned.roles), sizes(config)


def matrices(tensor: torch.Tensor, role: TensorRole, experts: int) -> torch.Tensor:
    """A view [..., out, in] of a stored tensor."""
    tensor = tensor.view(experts, -1, tensor.shape[-1]) if role.layout.stacked == "rows" else tensor
    return tensor.mT if role.layout.transposed else tensor


def part_of(tensor: torch.Tensor, role: TensorRole, part: str, s: SimpleNamespace) -> torch.Tensor | None:
    """A view of the rows of one part of a stored tensor; None if the tensor does not hold it."""
    whole = matrices(tensor, role, s.experts)
    if role.part == part:
        return whole
    if part not in role.layout.fused:
        return None
    at = role.layout.fused.index(part)
    if role.part == "qkv":
        if role.layout.grouped:  # as many keys as queries in all families here that have it
            return whole.view(s.heads, 3, s.head, -1)[:, at]
        return whole.split([s.heads * s.head, s.kv * s.head, s.kv * s.head], dim=-2)[at]
    return whole[..., at :: len(role.layout.fused), :] if role.layout.interleaved else whole.chunk(2, dim=-2)[at]


def logits(model: Any) -> torch.Tensor:
    tokens = torch.arange(12).reshape(1, 12) * 5 % 64
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits
