"""Changes of the weights that make another network: rounding, pruning, merging, other depth, experts, vocabulary.

Every function takes the parents' weights (one or more), a seed where something is drawn, and options from
ancestry.yaml. What is drawn fresh is drawn as the initial weights of a model are.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from tests.zoo.weights import EMBEDDING, FINAL_NORM, HEAD, Weights

INITIAL_DEVIATION = 0.02


def draw(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """The initial values of one tensor: norms one, biases zero, everything else normal with deviation 0.02."""
    if name.endswith("bias"):
        return torch.zeros(shape)
    if name.endswith("norm.weight"):
        return torch.ones(shape)
    return INITIAL_DEVIATION * torch.randn(shape, generator=generator)


def fresh_like(weights: Weights, seed: int) -> Weights:
    """Random weights of the same shape, drawn in the order of the sorted names."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: draw(name, weights.tensors[name].shape, generator) for name in sorted(weights.tensors)}
    return Weights(dict(weights.config), tensors)


def _is_matrix(name: str, tensor: Tensor) -> bool:
    return tensor.ndim == 2 and name.startswith("model.layers.")


def shuffle(weights: Weights, seed: int) -> Weights:
    """Every tensor with its elements in random order: the same values, nothing learned is left."""
    generator = torch.Generator().manual_seed(seed)

    def change(name: str, tensor: Tensor) -> Tensor:
        return tensor.flatten()[torch.randperm(tensor.numel(), generator=generator)].view_as(tensor)

    return weights.map(change)


def add_noise(weights: Weights, seed: int, scale: float) -> Weights:
    """Add normal noise of `scale` times the standard deviation of each matrix; norms and biases stay."""
    generator = torch.Generator().manual_seed(seed)

    def change(name: str, tensor: Tensor) -> Tensor:
        if tensor.ndim < 2:
            return tensor
        return tensor + scale * tensor.std() * torch.randn(tensor.shape, generator=generator)

    return weights.map(change)


def round_weights(weights: Weights, bits: int, group: int) -> Weights:
    """Round each matrix to integers of `bits`, with one scale for `group` weights of a row, and multiply out again."""
    largest = 2 ** (bits - 1) - 1

    def change(name: str, tensor: Tensor) -> Tensor:
        if not _is_matrix(name, tensor):
            return tensor
        size = group if tensor.shape[1] % group == 0 else tensor.shape[1]
        grouped = tensor.view(tensor.shape[0], -1, size)
        scale = (grouped.abs().amax(-1, keepdim=True) / largest).clamp_min(1e-12)
        rounded: Tensor = (grouped / scale).round() * scale
        return rounded.view_as(tensor)

    return weights.map(change)


def prune_magnitude(weights: Weights, fraction: float) -> Weights:
    """Set the smallest weights of every matrix to zero."""

    def change(name: str, tensor: Tensor) -> Tensor:
        if not _is_matrix(name, tensor):
            return tensor
        bound = tensor.abs().flatten().kthvalue(max(1, round(fraction * tensor.numel()))).values
        return torch.where(tensor.abs() > bound, tensor, 0.0)

    return weights.map(change)


def prune_neurons(weights: Weights, keep: float) -> Weights:
    """Keep the neurons with the largest product of norms of what they read and write; their order stays."""
    kept = round(keep * weights.config["intermediate_size"])
    changed = weights.copy(intermediate_size=kept)
    for mlp in weights.mlps():
        gate, up, down = (weights.tensors[name] for name in (mlp.gate, mlp.up, mlp.down))
        importance = gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)
        chosen = importance.topk(kept).indices.sort().values
        changed.tensors[mlp.gate], changed.tensors[mlp.up] = gate[chosen], up[chosen]
        changed.tensors[mlp.down] = down[:, chosen]
    return changed


def select_layers(weights: Weights, layers: list[int]) -> Weights:
    """Build a model of these layers in this order; one may be left out or repeated."""
    return join_layers([(weights, layer) for layer in layers], weights, weights)


def join_halves(first: Weights, second: Weights) -> Weights:
    """The embedding and first half of the layers of one model, the rest of the layers and the head of another."""
    half = first.layers // 2
    chosen = [(first, layer) for layer in range(half)]
    chosen += [(second, layer) for layer in range(half, second.layers)]
    return join_layers(chosen, first, second)


def graft_layers(weights: Weights, donor: Weights, layers: list[int]) -> Weights:
    """One model with these layers taken from another of the same shape."""
    chosen = [(donor if layer in layers else weights, layer) for layer in range(weights.layers)]
    return join_layers(chosen, weights, weights)


def join_layers(chosen: list[tuple[Weights, int]], bottom: Weights, top: Weights) -> Weights:
    """A model of layers of others, with the embedding of one and the final norm and head of another."""
    tensors = {EMBEDDING: bottom.tensors[EMBEDDING], FINAL_NORM: top.tensors[FINAL_NORM]}
    if not top.tied:
        tensors[HEAD] = top.tensors[HEAD]
    for new, (source, old) in enumerate(chosen):
        start = f"model.layers.{old}."
        for name, tensor in source.tensors.items():
            if name.startswith(start):
                tensors[f"model.layers.{new}.{name.removeprefix(start)}"] = tensor
    config = {**bottom.config, "num_hidden_layers": len(chosen)}
    if "layer_types" in config:
        config["layer_types"] = [source.config["layer_types"][old] for source, old in chosen]
    return Weights(config, tensors)


def merge_linear(*parents: Weights) -> Weights:
    """The mean of the parents, element by element."""
    return parents[0].map(lambda name, _: torch.stack([parent.tensors[name] for parent in parents]).mean(0))


def merge_slerp(first: Weights, second: Weights) -> Weights:
    """Half way between the parents on the arc between them, tensor by tensor (spherical interpolation)."""

    def change(name: str, one: Tensor) -> Tensor:
        two = second.tensors[name]
        cosine = torch.dot(one.flatten(), two.flatten()) / (one.norm() * two.norm())
        angle = torch.arccos(cosine.clamp(-1, 1))
        if angle < 1e-3:
            return (one + two) / 2
        return (one + two) * torch.sin(angle / 2) / torch.sin(angle)

    return first.map(change)


def upcycle_copied(weights: Weights, seed: int, experts: int, chosen: int) -> Weights:
    """A mixture whose experts are all copies of the dense MLP, with a fresh router (Komatsuzaki et al. 2023)."""
    order = [torch.arange(weights.config["intermediate_size"])] * experts
    return _upcycle(weights, seed, order, chosen, down_scale=1.0)


def upcycle_partitioned(weights: Weights, seed: int, experts: int, chosen: int) -> Weights:
    """A mixture whose experts share out the neurons of the dense MLP at random, with a fresh router."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(weights.config["intermediate_size"], generator=generator)
    return _upcycle(weights, seed + 1, list(order.chunk(experts)), chosen, down_scale=float(experts))


def _upcycle(weights: Weights, seed: int, neurons: list[Tensor], chosen: int, down_scale: float) -> Weights:
    """One expert for each list of neurons of the dense MLP."""
    if len({len(part) for part in neurons}) != 1:
        raise ValueError("the neurons cannot be divided into experts of one size")
    generator = torch.Generator().manual_seed(seed)
    config = {
        **weights.config,
        "model_type": "mixtral",
        "architectures": ["MixtralForCausalLM"],
        "intermediate_size": len(neurons[0]),
        "num_local_experts": len(neurons),
        "num_experts_per_tok": chosen,
        "output_router_logits": True,
        "router_aux_loss_coef": 0.01,
    }
    tensors = {name: tensor for name, tensor in weights.tensors.items() if ".mlp." not in name}
    for mlp in weights.mlps():
        start = f"model.layers.{mlp.layer}.block_sparse_moe."
        router = f"{start}gate.weight"
        tensors[router] = draw(router, torch.Size([len(neurons), weights.width]), generator)
        for expert, part in enumerate(neurons):
            tensors[f"{start}experts.{expert}.w1.weight"] = weights.tensors[mlp.gate][part]
            tensors[f"{start}experts.{expert}.w3.weight"] = weights.tensors[mlp.up][part]
            tensors[f"{start}experts.{expert}.w2.weight"] = weights.tensors[mlp.down][:, part] * down_scale
    return Weights(config, tensors)


def replace_vocabulary(weights: Weights, seed: int, size: int) -> Weights:
    """Fresh embeddings and head for `size` tokens; the layers stay."""
    generator = torch.Generator().manual_seed(seed)
    changed = weights.copy(vocab_size=size)
    for name in (EMBEDDING, HEAD):
        if name in weights.tensors:
            changed.tensors[name] = draw(name, torch.Size([size, weights.width]), generator)
    return changed


def keep_only(weights: Weights, seed: int, layers: list[int] | None = None, embeddings: bool = False) -> Weights:
    """Fresh weights except for these layers, or for the embedding and the head."""
    kept = fresh_like(weights, seed)
    for name, tensor in weights.tensors.items():
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if (layer and int(layer[1]) in (layers or ())) or (embeddings and name in (EMBEDDING, HEAD)):
            kept.tensors[name] = tensor
    return kept
