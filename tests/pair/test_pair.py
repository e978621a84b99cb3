"""A pair measures each thing once, and each byte of its checkpoints is read once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from checks.checkpoint.checkpoint import Checkpoint
from checks.checkpoint.local import LocalSource
from checks.evidence.record import CONTRADICTS
from checks.pair import measures
from checks.pair.comparison import compare
from checks.pair.pair import Pair
from checks.pair.reading import Reading
from checks.statistics.units import combine
from checks.streaming.planned_source import NotPlanned
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


def fused_experts(dense: Tensors, seed: int) -> Tensors:
    """Layer 0 stays dense; the MLPs of the others become four experts, all in two tensors."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: tensor for name, tensor in dense.items() if ".mlp." not in name or ".layers.0." in name}
    for layer in (1, 2):
        start = f"model.layers.{layer}.mlp."
        tensors[f"{start}gate.weight"] = torch.randn(4, 64, generator=generator)
        tensors[f"{start}experts.gate_up_proj"] = torch.randn(4, 384, 64, generator=generator)
        tensors[f"{start}experts.down_proj"] = torch.randn(4, 64, 192, generator=generator)
    return tensors


MIXTURE = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 192,
    "mlp_only_layers": [0],
}
DENSE, EXPERTS = 3 * 176 * 64, 8 * 3 * 192 * 64


def test_coverage_counts_experts_that_no_test_in_place_can_read(
    llama_tensors: Llama, llama_config: Callable[..., Any], save_checkpoint: Save, open_pair: Callable[..., Pair]
) -> None:
    paths = [
        save_checkpoint(name, fused_experts(llama_tensors(seed), seed), llama_config(**MIXTURE))
        for seed, name in ((1, "ours"), (2, "theirs"))
    ]
    pair = open_pair(*paths)
    tests = pair.units()
    assert tests is not None
    assert len(pair.neurons()) == 1
    assert tests.elements == DENSE + EXPERTS
    assert tests.coverage == pytest.approx(DENSE / (DENSE + EXPERTS))
    together = pair.once(measures.units)
    assert together is not None
    mapped = pair.once(measures.mapped_units)
    more = sum(group.elements for group in mapped.groups if group.category == "routed expert")
    assert more
    assert together.coverage == pytest.approx((DENSE + more) / (DENSE + EXPERTS))
    with_part = Pair(pair.candidate, pair.reference, reading=Reading("sample"))
    read = with_part.units()
    assert read is not None
    assert with_part.plan is not None
    experts = sum(map(len, with_part.plan.candidate.experts.values()))
    assert read.elements == DENSE + experts * 3 * 192 * 64
    assert read.coverage == pytest.approx(DENSE / read.elements)


def test_a_sample_of_fused_experts_takes_each_element_once(
    llama_tensors: Llama, llama_config: Callable[..., Any], save_checkpoint: Save, open_pair: Callable[..., Pair]
) -> None:
    """Whole experts and random blocks of one tensor overlap, and both begin with the first expert."""
    original = fused_experts(llama_tensors(1), 1)
    generator = torch.Generator().manual_seed(5)
    changed = {
        name: tensor + tensor.std() * torch.randn(tensor.shape, generator=generator)
        for name, tensor in original.items()
    }
    paths = [
        save_checkpoint(name, one, llama_config(**MIXTURE)) for name, one in (("ours", changed), ("theirs", original))
    ]
    opened = open_pair(*paths)
    pair = Pair(opened.candidate, opened.reference, reading=Reading("sample"))
    comparison = pair.comparison()
    assert pair.plan is not None
    stacked = [one for one in comparison.compared if one.entry.name.endswith("experts.gate_up_proj")]
    overlapping = 0
    for one in stacked:
        read = pair.plan.compared[one.entry.stored_name].read
        assert read.design is not None
        overlapping += bool(read.runs)
        places = {element for start, stop in (*read.runs, *read.design.ranges()) for element in range(start, stop)}
        assert one.drawn is not None
        assert one.drawn.n == len(places)
        assert one.robust is not None
        assert one.robust.spearman == pytest.approx(0.69, abs=0.04)
    assert overlapping


def published(pair: Pair, *changed: str) -> Pair:
    """The pair, with digests that a hub publishes of the shards, those of `changed` shards apart."""
    for side, model in enumerate((pair.candidate, pair.reference)):
        index = model.checkpoint.index
        shards = {
            name: replace(shard, published_sha256=f"{side if name in changed else ''}{name}")
            for name, shard in index.shards.items()
        }
        model.checkpoint.index = replace(index, shards=shards)
    return pair


def test_published_digests_show_a_copy_of_which_a_part_is_read(
    llama_tensors: Llama,
    save_checkpoint: Save,
    open_pair: Callable[..., Pair],
    judged: Callable[..., Any],
) -> None:
    tensors = llama_tensors(1)
    shards = [f"model-{number:05d}-of-00002.safetensors" for number in (1, 2)]
    paths = [save_checkpoint(name, tensors, shards=2) for name in ("ours", "theirs")]

    def evidence(*changed: str) -> Any:
        opened = published(open_pair(*paths), *changed)
        return judged("identity.sha256", Pair(opened.candidate, opened.reference, reading=Reading("screen")))

    found = evidence(shards[0])
    assert found.outcome == CONTRADICTS
    names = {*[*tensors][1::2]}  # of the other shard
    assert found.value == len(found.details["tensors"])
    assert {name for name in names if ".self_attn." in name or ".mlp." in name} <= {*found.details["tensors"]} <= names
    opened = published(open_pair(*paths), *shards)
    assert Pair(opened.candidate, opened.reference, reading=Reading("screen")).comparison().identical == ()
    with pytest.raises(NotPlanned):
        Pair(opened.candidate, opened.reference, reading=Reading("screen")).equal_bytes()


def test_equal_shards_of_what_any_model_could_have_accuse_nobody(
    llama_tensors: Llama, save_checkpoint: Save, open_pair: Callable[..., Pair]
) -> None:
    """Zeros, and rotary tables, in a shard of their own."""
    tensors = {name: torch.zeros_like(tensor) for name, tensor in llama_tensors(1).items()}
    opened = published(open_pair(*(save_checkpoint(name, tensors) for name in ("ours", "theirs"))))
    pair = Pair(opened.candidate, opened.reference, reading=Reading("screen"))
    assert pair.comparison().identical == ()
