from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checks.checkpoint.checkpoint import Checkpoint
from checks.checkpoint.held_tensors import HeldTensors


@given(sizes=st.lists(st.integers(0, 9), max_size=12), limit=st.integers(0, 20), lasting=st.sets(st.integers(0, 11)))
def test_never_holds_more_than_the_limit(sizes: list[int], limit: int, lasting: set[int]) -> None:
    held = HeldTensors(limit)
    for number, size in enumerate(sizes):
        held.put(str(number), bytearray([number] * size), lasting=number in lasting)
        kept = {name: one for name in map(str, range(number + 1)) if (one := held.get(name)) is not None}
        assert sum(map(len, kept.values())) <= limit
        assert all(bytes(one) == bytes([int(name)] * sizes[int(name)]) for name, one in kept.items())
        if number not in lasting and size <= limit - sum(len(kept[str(one)]) for one in lasting if str(one) in kept):
            assert str(number) in kept  # the newest, whatever else has to go
        assert held.has_room(limit - sum(map(len, kept.values())))
        assert not held.has_room(limit - sum(map(len, kept.values())) + 1)


def test_what_was_asked_for_last_stays() -> None:
    held = HeldTensors(4)
    for name in "abcd":
        held.put(name, bytearray(1))
    assert held.get("a") is not None
    held.put("e", bytearray(1))
    assert [name for name in "abcde" if held.get(name) is not None] == ["a", "c", "d", "e"]


def test_lasting_ones_stay_up_to_half_of_the_room() -> None:
    held = HeldTensors(8)
    held.put("embedding", bytearray(4), lasting=True)
    held.put("head", bytearray(4), lasting=True)  # there is no room for more that last
    held.put("layer", bytearray(4))
    assert [name for name in ("embedding", "head", "layer") if held.get(name) is not None] == ["embedding", "layer"]
    held.drop(["embedding", "layer", "unknown"])
    assert held.get("embedding") is not None
    assert held.get("layer") is None
    assert held.has_room(4)
    held.clear()
    assert held.get("embedding") is None
    assert held.has_room(8)


def test_nothing_is_held_without_room() -> None:
    held = HeldTensors()
    held.put("a", bytearray(1), lasting=True)
    assert held.get("a") is None


def test_what_is_held_cannot_be_written_to() -> None:
    held = HeldTensors(1)
    held.put("a", bytearray(1))
    view = held.get("a")
    assert view is not None
    with pytest.raises(TypeError):
        view[0] = 1


def test_a_checkpoint_reads_what_is_held_from_memory(examples: Path) -> None:
    checkpoint, plain = Checkpoint(examples / "base"), Checkpoint(examples / "base")
    name = max(plain.tensors, key=lambda one: plain.tensors[one].elements)
    checkpoint.held.limit = 1 << 20
    first = checkpoint.read(name)
    assert torch.equal(first, plain.read(name))
    first.zero_()  # whoever reads may write to it
    del checkpoint.source

    class Unreadable:
        def read_into(self, shard: str, start: int, buffer: memoryview) -> None:
            raise AssertionError("it was read again")

    checkpoint.source = Unreadable()
    second = checkpoint.read(name)
    assert torch.equal(second, plain.read(name))
    second.zero_()
    assert torch.equal(checkpoint.read(name, slice(3, 7)), plain.read(name, slice(3, 7)))
    with pytest.raises(AssertionError, match="read again"):
        checkpoint.read(next(one for one in plain.tensors if one != name))
