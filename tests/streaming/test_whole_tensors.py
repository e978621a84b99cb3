"""Layers that are read whole, one after the other."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.index import TensorInfo
from checks.checkpoint.local import LocalSource
from checks.streaming import whole_tensors
from checks.streaming.reader import PAGE, DirectSource
from checks.streaming.whole_tensors import layer_blocks
from tests.streaming.memory import (
    Memory,
    bytes_of,
)

pytestmark = pytest.mark.usefixtures("no_thread_is_left")


@pytest.mark.parametrize("kind", ["memory", "local", "direct"])
def test_layer_blocks(ours: Memory, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole_tensors, "REQUEST", 2 * PAGE)
    path = ours.save(tmp_path / "ours")
    ours.before_read = lambda number: time.sleep(0.001)
    source = {"memory": ours, "local": LocalSource(path), "direct": DirectSource(path, direct=True)}[kind]
    wanted = [["up", "down"], [], ["norm", "odd", "scalar", "empty", "codes"], ["embedding", "only ours"]]
    found = list(layer_blocks(ours.index, source, wanted))
    assert [list(block) for block in found] == wanted
    for block in found:
        for name, tensor in block.items():
            assert tensor.dtype == ours.tensors[name].dtype
            assert tensor.shape == ours.tensors[name].shape
            assert bytes_of(tensor) == bytes_of(ours.tensors[name])
            assert tensor.data_ptr() % tensor.dtype.itemsize == 0
    if kind == "memory":
        assert ours.was_read_once(set(ours.tensors))
        assert ours.most_at_once > 1


def test_layer_blocks_are_read_when_they_are_asked_for(ours: Memory) -> None:
    found = layer_blocks(ours.index, ours, [["up"], ["down"]])
    next(found)
    assert ours.was_read_once({"up"})
    found.close()


def test_layer_blocks_refuse_what_they_cannot_give(ours: Memory) -> None:
    with pytest.raises(ValueError, match="'up': comes twice"):
        list(layer_blocks(ours.index, ours, [["up"], ["up"]]))
    with pytest.raises(ValueError, match="'absent': no such tensor"):
        list(layer_blocks(ours.index, ours, [["absent"]]))
    tensors = {"packed": TensorInfo("packed", "F4", (2, 8), "0.safetensors", 0, 8)}
    with pytest.raises(ValueError, match="torch has no dtype F4"):
        list(layer_blocks(replace(ours.index, tensors=tensors), ours, [["packed"]]))


def test_layer_blocks_name_what_could_not_be_read(ours: Memory) -> None:
    def fail(number: int) -> None:
        raise OSError(5, "Input/output error")

    ours.before_read = fail
    with pytest.raises(CheckpointUnavailable, match=r"0\.safetensors, tensor 'up'"):
        list(layer_blocks(ours.index, ours, [["up"]]))
