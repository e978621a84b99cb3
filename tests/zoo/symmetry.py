"""Changes of the weights that keep the function of the network: what a thief would do to hide a copy.

Every function takes the weights of Llama-, Qwen2- or Mixtral-shaped models and a seed, and returns new weights that
compute the same logits up to rounding (Zhu et al. 2025, arXiv 2502.12292, section 3; rotation: Ashkboos et al. 2024,
arXiv 2401.15024).
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.zoo.weights import ATTENTION_READERS, EMBEDDING, FINAL_NORM, HEAD, MLP_READERS, WRITERS, Weights


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def permute_neurons(weights: Weights, seed: int) -> Weights:
    """Renumber the hidden units of every MLP, those of an expert among themselves."""
    changed, generator = weights.copy(), _generator(seed)
    for mlp in weights.mlps():
        order = torch.randperm(weights.tensors[mlp.gate].shape[0], generator=generator)
        changed.tensors[mlp.gate] = weights.tensors[mlp.gate][order]
        changed.tensors[mlp.up] = weights.tensors[mlp.up][order]
        changed.tensors[mlp.down] = weights.tensors[mlp.down][:, order]
    return changed


def negate_neurons(weights: Weights, seed: int) -> Weights:
    """Negate what half of the neurons read through `up` and what they write: the two signs cancel."""
    changed, generator = weights.copy(), _generator(seed)
    for mlp in weights.mlps():
        signs = _signs(weights.tensors[mlp.up].shape[0], generator)
        changed.tensors[mlp.up] = weights.tensors[mlp.up] * signs[:, None]
        changed.tensors[mlp.down] = weights.tensors[mlp.down] * signs
    return changed


def rescale_neurons(weights: Weights, seed: int, spread: float = 0.5) -> Weights:
    """Multiply `up` of every neuron by a positive factor and divide `down` by it."""
    changed, generator = weights.copy(), _generator(seed)
    for mlp in weights.mlps():
        factors = torch.exp(spread * torch.randn(weights.tensors[mlp.up].shape[0], generator=generator))
        changed.tensors[mlp.up] = weights.tensors[mlp.up] * factors[:, None]
        changed.tensors[mlp.down] = weights.tensors[mlp.down] / factors
    return changed


def rescale_norms(weights: Weights, seed: int, spread: float = 0.3) -> Weights:
    """Multiply every norm's gain by positive factors and divide the columns of its readers by them."""
    changed, generator = weights.copy(), _generator(seed)
    for norm, readers in weights.norms():
        factors = torch.exp(spread * torch.randn(weights.width, generator=generator))
        changed.tensors[norm] = weights.tensors[norm] * factors
        for name in readers:
            changed.tensors[name] = weights.tensors[name] / factors
    return changed


def rescale_values(weights: Weights, seed: int, spread: float = 0.5) -> Weights:
    """Multiply the values of every key/value head by a factor and divide the output projection's columns by it."""
    changed, generator = weights.copy(), _generator(seed)
    groups, per_group, size = _heads(weights)
    for layer in range(weights.layers):
        start = f"model.layers.{layer}.self_attn."
        factors = torch.exp(spread * torch.randn(groups, generator=generator))
        rows = factors.repeat_interleave(size)
        columns = factors.repeat_interleave(per_group * size)
        changed.tensors[f"{start}v_proj.weight"] = weights.tensors[f"{start}v_proj.weight"] * rows[:, None]
        if f"{start}v_proj.bias" in weights.tensors:
            changed.tensors[f"{start}v_proj.bias"] = weights.tensors[f"{start}v_proj.bias"] * rows
        changed.tensors[f"{start}o_proj.weight"] = weights.tensors[f"{start}o_proj.weight"] / columns
    return changed


def permute_heads(weights: Weights, seed: int) -> Weights:
    """Renumber the key/value groups of every layer, and the query heads within each group."""
    changed, generator = weights.copy(), _generator(seed)
    groups, per_group, size = _heads(weights)
    for layer in range(weights.layers):
        start = f"model.layers.{layer}.self_attn."
        group_order = torch.randperm(groups, generator=generator)
        head_order = torch.cat(
            [group * per_group + torch.randperm(per_group, generator=generator) for group in group_order.tolist()]
        )
        rows = {"q_proj": _units(head_order, size), "k_proj": _units(group_order, size)}
        rows["v_proj"] = rows["k_proj"]
        for part, order in rows.items():
            for name in (f"{start}{part}.weight", f"{start}{part}.bias"):
                if name in weights.tensors:
                    changed.tensors[name] = weights.tensors[name][order]
        output = f"{start}o_proj.weight"
        changed.tensors[output] = weights.tensors[output][:, rows["q_proj"]]
    return changed


def permute_experts(weights: Weights, seed: int) -> Weights:
    """Renumber the experts of every layer together with their rows of the router."""
    changed, generator = weights.copy(), _generator(seed)
    experts = weights.config["num_local_experts"]
    for layer in range(weights.layers):
        start = f"model.layers.{layer}.block_sparse_moe."
        order = torch.randperm(experts, generator=generator)
        changed.tensors[f"{start}gate.weight"] = weights.tensors[f"{start}gate.weight"][order]
        for new, old in enumerate(order.tolist()):
            for part in ("w1", "w2", "w3"):
                source = weights.tensors[f"{start}experts.{old}.{part}.weight"]
                changed.tensors[f"{start}experts.{new}.{part}.weight"] = source
    return changed


def permute_residual(weights: Weights, seed: int) -> Weights:
    """Renumber the channels of the residual stream."""
    order = torch.randperm(weights.width, generator=_generator(seed))
    return change_basis(weights, torch.eye(weights.width)[:, order])


def flip_residual_signs(weights: Weights, seed: int) -> Weights:
    """Negate half of the channels of the residual stream."""
    return change_basis(weights, torch.diag(_signs(weights.width, _generator(seed))))


def rotate_residual(weights: Weights, seed: int) -> Weights:
    """Fold the norms into their readers and rotate the residual stream by a random orthogonal matrix."""
    rotation, upper = torch.linalg.qr(torch.randn(weights.width, weights.width, generator=_generator(seed)).double())
    rotation = (rotation * torch.sign(torch.diagonal(upper))).float()  # uniform among the orthogonal matrices
    return change_basis(fold_norms(weights), rotation)


def fold_norms(weights: Weights) -> Weights:
    """Multiply every norm's gain into its readers and leave ones; a tied head becomes one of its own."""
    untied = weights.copy(tie_word_embeddings=False)
    untied.tensors.setdefault(HEAD, weights.tensors[EMBEDDING])
    changed = untied.copy()
    for norm, readers in untied.norms():
        for name in readers:
            changed.tensors[name] = untied.tensors[name] * untied.tensors[norm]
        changed.tensors[norm] = torch.ones_like(untied.tensors[norm])
    return changed


def change_basis(weights: Weights, basis: Tensor) -> Weights:
    """Write the residual stream x as x·R in every tensor that reads or writes it.

    R [d, d] is orthogonal. Unless it is a permutation, with or without signs, the norms must have been folded.
    """

    def change(name: str, tensor: Tensor) -> Tensor:
        if name in (EMBEDDING, HEAD) or name.endswith((*ATTENTION_READERS, *MLP_READERS)):
            return tensor @ basis
        if name.endswith(WRITERS):
            return basis.T @ tensor
        if name == FINAL_NORM or name.endswith("layernorm.weight"):
            return tensor if bool((tensor == 1).all()) else tensor @ basis.square()
        return tensor

    return weights.map(change)


def _heads(weights: Weights) -> tuple[int, int, int]:
    """Key/value groups, query heads in each, and the size of a head."""
    heads, groups = weights.config["num_attention_heads"], weights.config["num_key_value_heads"]
    size = weights.config.get("head_dim") or weights.width // heads
    return groups, heads // groups, size


def _units(order: Tensor, size: int) -> Tensor:
    """An order of heads as an order of their rows."""
    return (order[:, None] * size + torch.arange(size)).flatten()


def _signs(count: int, generator: torch.Generator) -> Tensor:
    """One sign each, half of them negative."""
    signs = torch.ones(count)
    signs[torch.randperm(count, generator=generator)[: count // 2]] = -1
    return signs
