"""The seed documents' way of comparing two checkpoints: load both whole, one cosine per tensor, one hash per tensor.

    python benchmarks/seed_way.py BASE TARGET

From weight-analysis.md, "분석 코드", sections 1 and 2. Changed so that it can be measured: the two model names are
arguments, and it prints one JSON line instead of one line per tensor.
"""

from __future__ import annotations

import hashlib
import json
import sys

import torch
import torch.nn.functional as F  # noqa: N812 - as the document has it
from transformers import AutoModel


def load_model_weights(model_name: str) -> dict[str, torch.Tensor]:
    """All parameters of a model, by name."""
    model = AutoModel.from_pretrained(model_name, torch_dtype=torch.float16)
    return {name: param.data for name, param in model.named_parameters()}


def cosine_sim(w1: torch.Tensor, w2: torch.Tensor) -> float:
    """Cosine of two tensors, in fp32."""
    w1_flat = w1.flatten().float()
    w2_flat = w2.flatten().float()
    return F.cosine_similarity(w1_flat.unsqueeze(0), w2_flat.unsqueeze(0)).item()


def weight_hash(tensor: torch.Tensor) -> str:
    """The first half of a tensor's SHA-256."""
    arr = tensor.cpu().numpy().tobytes()
    return hashlib.sha256(arr).hexdigest()[:16]


def main(base: str, target: str) -> None:
    """Compare and print."""
    base_weights = load_model_weights(base)
    target_weights = load_model_weights(target)
    similarities = {}
    identical_layers = []
    for name in base_weights:
        if name in target_weights and base_weights[name].shape == target_weights[name].shape:
            similarities[name] = cosine_sim(base_weights[name], target_weights[name])
    for name in base_weights:
        if name in target_weights and base_weights[name].shape == target_weights[name].shape:
            base_hash = weight_hash(base_weights[name])
            target_hash = weight_hash(target_weights[name])
            if base_hash == target_hash:
                identical_layers.append(name)
    print(json.dumps({"cosine": similarities, "identical": identical_layers}))


if __name__ == "__main__":
    main(*sys.argv[1:])
