"""A pair measures each thing once, and each byte of its checkpoints is read once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from checks.checkpoint.checkpoint import Checkpoint
from checks.checkpoint.local import LocalSource
from checks.pair.comparison import compare
from checks.pair.pair import Pair
from checks.statistics.units import combine
from tests.pair.random_tensors import Tensors

Llama = Callable[..., Tensors]
Save = Callable[..., Path]


class CountingSource:
    """The bytes of a directory, and how often each was read."""

    def __init__(self, directory: Path) -> None:
        self._source = LocalSource(directory)
        self.counts = {path.name: np.zeros(path.stat().st_size, int) for path in directory.glob("*.safetensors")}

    def read_into(self, shard: str, start: int, buffer: memoryview) -> None:
        self.counts[shard][start : start + len(buffer)] += 1
        self._source.read_into(shard, start, buffer)


def counted(directory: Path) -> tuple[Checkpoint, CountingSource]:
    checkpoint, source = Checkpoint(directory), CountingSource(directory)
    checkpoint.source = source
    return checkpoint, source


def times_read(checkpoint: Checkpoint, source: CountingSource) -> set[int]:
    """How often the bytes of the tensors were read: {1} if each was read once."""
    infos = [entry.stored for entry in checkpoint.tensors.values()]
    return {int(count) for info in infos for count in np.unique(source.counts[info.shard][info.start : info.stop])}


def test_every_byte_is_read_once_for_all_statistics(llama_tensors: Llama, save_checkpoint: Save) -> None:
    ours, our_source = counted(save_checkpoint("ours", llama_tensors(1)))
    theirs, their_source = counted(save_checkpoint("theirs", llama_tensors(2, num_hidden_layers=5), shards=2))
    comparison = compare(ours, theirs, with_neurons=True)
    assert comparison.mean().coverage == 1
    assert comparison.neurons is not None
    assert len(comparison.neurons) == 3
    ours.digest()
    theirs.digest()
    assert times_read(ours, our_source) == times_read(theirs, their_source) == {1}


def test_a_copy_is_read_once_too(llama_tensors: Llama, save_checkpoint: Save) -> None:
    directory = save_checkpoint("ours", llama_tensors(1))
    (ours, our_source), (theirs, their_source) = counted(directory), counted(directory)
    assert len(compare(ours, theirs, with_neurons=True).identical) == 30
    assert times_read(ours, our_source) == times_read(theirs, their_source) == {1}


def test_tensors_equal_to_others_are_read_once_more_at_most(llama_tensors: Llama, save_checkpoint: Save) -> None:
    tensors = llama_tensors(1)
    ours, our_source = counted(
        save_checkpoint("ours", {f"x{number}": one for number, one in enumerate(tensors.values())})
    )
    theirs, their_source = counted(save_checkpoint("theirs", tensors))
    assert len(compare(ours, theirs).identical) == 30
    assert max(times_read(ours, our_source)) == 2
    assert times_read(theirs, their_source) == {1}


def test_pair_computes_each_pass_once(
    llama_tensors: Llama, save_checkpoint: Save, open_pair: Callable[..., Pair]
) -> None:
    pair = open_pair(save_checkpoint("ours", llama_tensors(1)), save_checkpoint("theirs", llama_tensors(2)))
    assert pair.elementwise() is pair.elementwise()
    assert pair.neurons() is pair.neurons()
    read = pair.read()
    assert read["candidate"] == {
        "name": "ours",
        "prefix": "",
        "tensors": 30,
        "elements": 171_456,
        "roles": read["reference"]["roles"],
        "outside_components": 0.0,
        "sha256": Checkpoint(pair.candidate.checkpoint.directory).digest(),
    }
    assert read["reference"]["sha256"] != read["candidate"]["sha256"]


def test_units_of_a_pair_are_the_joint_test(
    llama_tensors: Llama, save_checkpoint: Save, open_pair: Callable[..., Pair]
) -> None:
    pair = open_pair(save_checkpoint("ours", llama_tensors(1)), save_checkpoint("theirs", llama_tensors(2)))
    tests = pair.units()
    assert tests is not None
    assert tests.joint[0] == combine(group.test for group in pair.neurons())
    assert tests.joint[1] == combine(group.gate for group in pair.neurons() if group.gate)
    assert tests.tests == 2 + 2 * len(pair.neurons())
    assert tests.coverage == 1
    assert abs(tests.strongest_joint.z) < 5
    narrow = save_checkpoint("narrow", llama_tensors(1, intermediate_size=8))
    assert open_pair(save_checkpoint("ours", llama_tensors(1)), narrow).units() is None
