"""MLPs that a pass holds until they are complete: how much memory they take, and which are read again."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from checks.checkpoint.checkpoint import Checkpoint
from checks.pair import held_mlps
from checks.pair.comparison import compare
from checks.streaming import stream
from tests.pair.counting import opened

Tensors = dict[str, torch.Tensor]
Llama = Callable[..., Tensors]
Save = Callable[..., Path]


class Held:
    """Memory that counts how much of it is alive."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def allocate(self, size: int) -> Any:
        memory = np.empty(size, np.uint8)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(memory, self._let_go, size)
        return memory

    def _let_go(self, size: int) -> None:
        self.now -= size


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Held:
    """Counts the buffers and the whole tensors of passes; one MLP of `mlps` may be ahead."""
    counter = Held()
    monkeypatch.setattr(stream, "ordinary_memory", counter.allocate)
    monkeypatch.setattr(stream, "MEMORY", 400_000)
    monkeypatch.setattr(stream, "KEPT_MEMORY", MLP)
    return counter


MLP = 2 * 3 * 4 * 64 * 176  # bytes of an MLP of both sides
HEADS = 2 * 4 * 256 * 64  # the beginnings of the largest tensors


def test_memory_is_bounded_by_what_is_incomplete(held: Held, llama_tensors: Llama, save_checkpoint: Save) -> None:
    layers = 12
    ours, theirs = (
        Checkpoint(save_checkpoint(f"{seed}", llama_tensors(seed, num_hidden_layers=layers))) for seed in (1, 2)
    )
    comparison = compare(ours, theirs, with_neurons=True)
    assert len(comparison.neurons or ()) == layers
    # The buffers, what the pass is ahead by, and the MLP that waits for its last matrix.
    assert MLP / 3 < held.most <= 400_000 + MLP + MLP + HEADS
    del comparison
    assert held.now == 0


def test_without_tests_of_neurons_nothing_is_held(held: Held, llama_tensors: Llama, save_checkpoint: Save) -> None:
    ours, theirs = (Checkpoint(save_checkpoint(f"{seed}", llama_tensors(seed))) for seed in (1, 2))
    assert compare(ours, theirs).neurons is None
    assert held.most <= 400_000


@pytest.mark.parametrize("room_for", [1, 2, 3])
def test_scattered_matrices_beyond_the_limit_are_read_again(
    room_for: int, llama_tensors: Llama, save_checkpoint: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each matrix of every MLP stands in a shard of its own."""
    monkeypatch.setattr(held_mlps, "HELD_MEMORY", room_for * MLP)
    mlps = {seed: {n: t for n, t in llama_tensors(seed).items() if ".mlp." in n} for seed in (1, 2)}
    (ours, our_source), (theirs, their_source) = (opened(save_checkpoint(f"{s}", mlps[s], shards=3)) for s in (1, 2))
    comparison = compare(ours, theirs, with_neurons=True)
    for checkpoint, source in ((ours, our_source), (theirs, their_source)):
        times = {layer: source.times(checkpoint, f"model.layers.{layer}.mlp.up_proj.weight") for layer in range(3)}
        assert times == {layer: 1 if layer < room_for else 2 for layer in range(3)}
    monkeypatch.undo()
    assert comparison.neurons == compare(ours, theirs, with_neurons=True).neurons
