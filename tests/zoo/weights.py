"""The weights of one zoo model: configuration and tensors under their Hugging Face names, in memory and on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
FINAL_NORM = "model.norm.weight"
ATTENTION_READERS = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")
MLP_READERS = ("gate_proj.weight", "up_proj.weight", "w1.weight", "w3.weight", "block_sparse_moe.gate.weight")
WRITERS = ("o_proj.weight", "down_proj.weight", "w2.weight")


@dataclass(frozen=True)
class Mlp:
    """Names of one gated MLP's tensors: of a layer, or of one expert."""

    layer: int
    gate: str
    up: str
    down: str


@dataclass(frozen=True)
class Weights:
    """A configuration and float32 tensors. Changes make a new one and leave this one as it is."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def layers(self) -> int:
        """Number of layers."""
        return int(self.config["num_hidden_layers"])

    @property
    def width(self) -> int:
        """Width of the residual stream."""
        return int(self.config["hidden_size"])

    @property
    def tied(self) -> bool:
        """Does the embedding serve as the output head?"""
        return HEAD not in self.tensors

    def copy(self, **config: Any) -> Weights:
        """A copy whose tensors may be replaced, with these keys of the configuration changed."""
        return Weights({**self.config, **config}, dict(self.tensors))

    def mlps(self) -> Iterator[Mlp]:
        """All gated MLPs, experts one by one."""
        for layer in range(self.layers):
            if f"model.layers.{layer}.mlp.gate_proj.weight" in self.tensors:
                start = f"model.layers.{layer}.mlp."
                yield Mlp(layer, f"{start}gate_proj.weight", f"{start}up_proj.weight", f"{start}down_proj.weight")
            for expert in range(self.config.get("num_local_experts", 0)):
                start = f"model.layers.{layer}.block_sparse_moe.experts.{expert}."
                yield Mlp(layer, f"{start}w1.weight", f"{start}w3.weight", f"{start}w2.weight")

    def norms(self) -> Iterator[tuple[str, list[str]]]:
        """Every norm of the residual stream with the matrices that read it, the final norm only if it has a head."""
        for layer in range(self.layers):
            start = f"model.layers.{layer}."
            names = [name for name in self.tensors if name.startswith(start)]
            yield f"{start}input_layernorm.weight", [name for name in names if name.endswith(ATTENTION_READERS)]
            yield f"{start}post_attention_layernorm.weight", [name for name in names if name.endswith(MLP_READERS)]
        if not self.tied:
            yield FINAL_NORM, [HEAD]

    def map(self, change: Callable[[str, Tensor], Tensor]) -> Weights:
        """Every tensor changed by a function of its name and values."""
        return Weights(dict(self.config), {name: change(name, tensor) for name, tensor in self.tensors.items()})


def read_weights(directory: Path) -> Weights:
    """Open a stored model; tensors become float32."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    tensors = load_file(directory / "model.safetensors")
    return Weights(config, {name: tensor.float() for name, tensor in tensors.items()})


def write_weights(weights: Weights, directory: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Store a model so that any reader of Hugging Face checkpoints can open it."""
    config = {**weights.config, "dtype": str(dtype).removeprefix("torch.")}
    (directory / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    stored = {name: tensor.to(dtype).contiguous().clone() for name, tensor in weights.tensors.items()}
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
