"""GGUF files of tiny models, as llama.cpp's converter makes them. Needs the gguf library."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from checks.checkpoint.gguf_file import MODEL_TYPES

ARCHITECTURES = {model_type: name for name, model_type in MODEL_TYPES.items()} | {"mixtral": "llama"}


def paired(values: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rotated rows as llama.cpp wants them: the two of a frequency side by side."""
    return values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def add_tokenizer(
    writer: Any, model: str, tokens: list[str], merges: list[str] | None = None, types: list[int] | None = None
) -> None:
    """The tokenizer among a file's key-value pairs."""
    writer.add_tokenizer_model(model)
    writer.add_token_list(tokens)
    if types is not None:
        writer.add_token_types(types)
    if merges is not None:
        writer.add_token_merges(merges)


def write_gguf(
    path: Path, model: Any, model_type: str, kind: Any = None, tokenizer: Mapping[str, Any] | None = None
) -> dict[str, torch.Tensor]:
    """A GGUF file of a model; returns the original tensors, a stack of experts taken apart.

    `kind`: how matrices are quantised. `tokenizer`: arguments of `add_tokenizer`; without it a list of 64 tokens.
    """
    config, architecture = model.config, ARCHITECTURES[model_type]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", 48))
    writer.add_head_count(config.num_attention_heads)
    key_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    writer.add_head_count_kv(key_heads)
    writer.add_layer_norm_rms_eps(getattr(config, "rms_norm_eps", 1e-5))
    writer.add_layer_norm_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_context_length(64)
    writer.add_vocab_size(config.vocab_size)
    writer.add_key_length(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    writer.add_rope_dimension_count(getattr(config, "head_dim", None) or 8)
    add_tokenizer(writer, **(tokenizer or {"model": "gpt2", "tokens": [f"t{token}" for token in range(64)]}))
    if experts := getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(getattr(config, "moe_intermediate_size", 48))
    names = gguf.get_tensor_name_map(next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture), 4)
    originals: dict[str, torch.Tensor] = {}
    stacks: dict[str, np.ndarray[Any, Any]] = {}
    leaves = ("w1", "w3", "w2") if model_type == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        front, middle, part = name.partition(".experts.")
        if middle:
            front = front.replace(".mlp", ".block_sparse_moe") if model_type == "mixtral" else front
            whole = value.chunk(2, 1) if part == "gate_up_proj" else (value,)
            for leaf, matrices in zip(leaves if len(whole) == 2 else leaves[2:], whole, strict=False):
                stacks[f"{front}.experts.{leaf}.weight"] = matrices.numpy()
                originals |= {f"{front}.experts.{at}.{leaf}.weight": one for at, one in enumerate(matrices)}
            continue
        name = name.replace(".mlp.gate.", ".block_sparse_moe.gate.") if model_type == "mixtral" else name
        originals[name] = value
        stacks[name] = value.numpy()
    for name, values in stacks.items():
        if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            values = paired(values, config.num_attention_heads if ".q_proj." in name else key_heads)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            values = values + 1
        if architecture == "gpt2" and any(f".{one}.weight" in name for one in ("c_attn", "c_proj", "c_fc")):
            values = values.T
        stem, _, leaf = name.rpartition(".")
        stored = f"{names.get_name(stem)}.{leaf}"
        values = values[0] if stored.endswith("ffn_gate_inp_shexp.weight") else np.ascontiguousarray(values)
        if kind is not None and values.ndim > 1 and values.shape[-1] % 32 == 0:
            writer.add_tensor(stored, gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(stored, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return originals
