from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from checks.checkpoint.checkpoint import Checkpoint
from checks.pair.hashes import hash_missing
from checks.pair.ledger import Item, Ledger
from tests.pair.counting import opened

KEY = ("candidate", "", "sha256", "1")


def ledger_of(names: list[str]) -> Ledger[str]:
    layers: dict[str, list[Item]] = {"all": [(name,) for name in names]}
    return Ledger(None, KEY, layers, str, lambda _, stored: str(stored))


def test_what_is_missing_is_hashed_and_nothing_else_read(
    llama_tensors: Callable[..., dict[str, torch.Tensor]], save_checkpoint: Callable[..., Path]
) -> None:
    tensors = llama_tensors() | {"model.norm.weight": torch.empty(0), "scale": torch.tensor(2.0, dtype=torch.float16)}
    path = save_checkpoint("model", tensors, shards=2)
    checkpoint, source = opened(path)
    names = ["lm_head.weight", "model.norm.weight", "scale", "model.layers.1.mlp.up_proj.weight"]
    hashes = ledger_of(names)
    hashes.add(("scale",), "known")
    hash_missing(checkpoint, hashes, needless={"model.layers.1.mlp.up_proj.weight"})
    whole = Checkpoint(path)
    assert hashes.values == {("scale",): "known", **{(name,): whole.sha256(name) for name in names[:2]}}
    assert source.read == whole.tensors["lm_head.weight"].elements * 4
    hash_missing(checkpoint, hashes)
    assert not hashes.missing
    assert hashes.values[names[3],] == whole.sha256(names[3])
    read = source.read
    hash_missing(checkpoint, hashes)
    assert source.read == read
