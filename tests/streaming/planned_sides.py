"""Checkpoints of which there is only the index, and plans of what is read of them."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from hypothesis import strategies as st

from checks.checkpoint.index import CheckpointIndex, Shard, TensorInfo
from checks.checkpoint.roles import Role, role_of
from checks.streaming.read_plan import (
    ReadPlan,
    ReadRequest,
)
from checks.streaming.sampling import Side, plan_reads

SIZES = {"BF16": 2, "F32": 4}
HEADER = 5000
Shapes = Mapping[str, tuple[int, ...]]


def shapes_of(layers: int, width: int, hidden: int, experts: int = 0, vocabulary: int = 900) -> Shapes:
    """A Llama- or Mixtral-shaped model."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, width)}
    for layer in range(layers):
        place = f"model.layers.{layer}"
        shapes |= {f"{place}.input_layernorm.weight": (width,), f"{place}.self_attn.q_proj.weight": (width, width)}
        shapes |= {f"{place}.self_attn.k_proj.weight": (width // 4, width)}
        owners = [f"{place}.mlp.experts.{expert}" for expert in range(experts)] or [f"{place}.mlp"]
        if experts:
            shapes[f"{place}.mlp.gate.weight"] = (experts, width)
        for owner in owners:
            shapes |= {f"{owner}.up_proj.weight": (hidden, width), f"{owner}.down_proj.weight": (width, hidden)}
    return {**shapes, "model.norm.weight": (width,), "lm_head.weight": (vocabulary, width)}


def side_of(
    shapes: Shapes, dtype: str = "BF16", shard_bytes: int = 1 << 22, roles: Mapping[str, Role] | None = None
) -> Side:
    """A checkpoint of these tensors, of which there is only the index."""
    tensors: dict[str, TensorInfo] = {}
    shards: dict[str, Shard] = {}
    name, end = "", shard_bytes
    for tensor, shape in shapes.items():
        if end >= shard_bytes:
            name, end = f"{len(shards)}.safetensors", HEADER
        start, end = end, end + prod(shape) * SIZES[dtype]
        tensors[tensor] = TensorInfo(tensor, dtype, shape, name, start, end)
        shards[name] = Shard(name, end)
    return Side(
        CheckpointIndex("nowhere", shards, tensors),
        {tensor: (roles or {}).get(tensor, role_of(tensor)) for tensor in tensors},
    )


def common(a: Side, b: Side) -> list[tuple[str, str]]:
    """Pairs of equal name and size."""
    theirs = b.index.tensors
    return [
        (name, name)
        for name, tensor in a.index.tensors.items()
        if name in theirs and theirs[name].elements == tensor.elements
    ]


def plan_of(a: Side, b: Side, mode: str, budget: int | None = None, seed: int = 0) -> ReadPlan:
    return plan_reads(a, b, common(a, b), ReadRequest(mode, budget, seed))


models = st.builds(
    shapes_of,
    layers=st.integers(0, 10),
    width=st.sampled_from([16, 64, 256, 400]),
    hidden=st.sampled_from([64, 300, 700]),
    experts=st.sampled_from([0, 0, 3, 8]),
    vocabulary=st.sampled_from([900, 3001]),
)
sides = st.builds(side_of, models, st.sampled_from(["BF16", "F32"]), st.sampled_from([1 << 18, 1 << 22]))
