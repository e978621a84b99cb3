"""Random tensors, noise, and a small Mixtral of them."""

from __future__ import annotations

import torch

Tensors = dict[str, torch.Tensor]


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def noisy(tensors: Tensors, size: float, seed: int = 99) -> Tensors:
    """Every tensor with noise of `size` times its spread."""
    return {
        name: tensor + size * tensor.std() * normal(seed + number, *tensor.shape)
        for number, (name, tensor) in enumerate(tensors.items())
    }


def mixtral(seed: int, experts: int = 3, layers: int = 2, width: int = 32, wide: int = 48) -> Tensors:
    """Random tensors with the names and shapes of a small Mixtral."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (40, width)}
    for layer in range(layers):
        start = f"model.layers.{layer}."
        shapes |= {f"{start}self_attn.{kind}_proj.weight": (width, width) for kind in "qkvo"}
        shapes[f"{start}block_sparse_moe.gate.weight"] = (experts, width)
        for expert in range(experts):
            one = f"{start}block_sparse_moe.experts.{expert}."
            shapes |= {f"{one}w1.weight": (wide, width), f"{one}w3.weight": (wide, width)}
            shapes[f"{one}w2.weight"] = (width, wide)
    return {name: 0.02 * normal(1000 * seed + number, *shape) for number, (name, shape) in enumerate(shapes.items())}
