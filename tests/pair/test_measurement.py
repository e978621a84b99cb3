"""One pass for everything: what it reads and finds, the same in every run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from checks.checkpoint.checkpoint import Checkpoint
from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.hub_failures import RateLimited
from checks.pair import measures
from checks.pair.comparison import compare
from checks.pair.fingerprints import fingerprints
from checks.pair.neurons import neuron_groups
from checks.pair.pair import Pair
from checks.pair.reading import Reading
from checks.statistics.elementwise import elementwise_sums
from checks.statistics.ordinary import ordinary_reason
from checks.streaming import stream
from tests.pair.counting import CountingPages, CountingSource, opened, plain
from tests.pair.random_tensors import normal

Tensors = dict[str, torch.Tensor]
Llama = Callable[..., Tensors]
Save = Callable[..., Path]
EXAMPLE_PAIRS = [("derived", "base"), ("independent", "base"), ("base", "base")]


# What it finds


@pytest.mark.parametrize(("ours", "theirs"), EXAMPLE_PAIRS)
def test_finds_what_reading_tensor_by_tensor_finds(ours: str, theirs: str, examples: Path) -> None:
    candidate, reference = Checkpoint(examples / ours), Checkpoint(examples / theirs)
    comparison = compare(candidate, reference, with_neurons=True, with_fingerprints=True)
    expected_ordinary = {}
    for name in candidate.tensors:
        a, b = candidate.read(name), reference.read(name)
        if ordinary_reason(a) and ordinary_reason(b):
            expected_ordinary[name] = ordinary_reason(a)
    assert comparison.ordinary == expected_ordinary
    assert [one.entry.name for one in comparison.compared] == [
        n for n in candidate.tensors if n not in expected_ordinary
    ]
    for one in comparison.compared:
        expected = elementwise_sums(candidate.read(one.entry.name), reference.read(one.entry.name))
        assert one.cosine == pytest.approx(expected.centred_cosine, abs=1e-6)
    fresh = Checkpoint(examples / ours), Checkpoint(examples / theirs)
    equal = [name for name in fresh[0].tensors if fresh[0].sha256(name) == fresh[1].sha256(name)]
    assert comparison.identical == tuple((name, name) for name in equal)
    assert candidate.digest() == fresh[0].digest()
    assert comparison.neurons == tuple(neuron_groups(candidate, reference))
    read_again = replace(comparison, fingerprints=(fingerprints(candidate), fingerprints(reference)))
    assert plain(comparison) == plain(read_again)


def test_is_the_same_in_every_run(examples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = set()
    for cores, piece in ((1, stream.CACHED_PIECE), (7, stream.SMALLEST_PIECE)):
        monkeypatch.setattr(stream, "_cores", lambda cores=cores: cores)
        monkeypatch.setattr(stream, "CACHED_PIECE", piece)
        pair = Checkpoint(examples / "derived"), Checkpoint(examples / "base")
        found.add(plain(compare(*pair, with_neurons=True, with_fingerprints=True)))
    assert len(found) == 1


# What it reads


@pytest.mark.parametrize("reads_ahead", [False, True])
def test_whatever_is_asked_for_each_byte_is_read_once(
    reads_ahead: bool, llama_tensors: Llama, save_checkpoint: Save, examples: Path
) -> None:
    """Tensors with a counterpart, without one and of other shapes alike."""
    ours = llama_tensors(1, torch.bfloat16) | {"alone": normal(3, 70, 300), "of another shape": normal(3, 90, 9, 40)}
    theirs = llama_tensors(2) | {"other": normal(4, 300, 100).half(), "of another shape": normal(3, 90)}
    sides = [opened(save_checkpoint(name, one)) for name, one in (("ours", ours), ("theirs", theirs))]
    if not reads_ahead:  # what lies in the page cache is read by the threads that hash
        for checkpoint, _ in sides:
            checkpoint.source = CountingPages(checkpoint.files.directory)
    comparison = compare(*(checkpoint for checkpoint, _ in sides), with_neurons=True, with_fingerprints=True)
    for checkpoint, _ in sides:
        assert {name: checkpoint.source.times(checkpoint, name) for name in checkpoint.tensors} == dict.fromkeys(
            checkpoint.tensors, 1
        )
    assert sum(one.robust is not None for one in comparison.compared) == 30
    assert comparison.fingerprints is not None
    assert all(side.names == tuple(one.tensors) for side, (one, _) in zip(comparison.fingerprints, sides, strict=True))


def test_a_check_of_sketches_reads_nothing_again(
    llama_tensors: Llama, save_checkpoint: Save, open_pair: Callable[..., Pair]
) -> None:
    pair = open_pair(*(save_checkpoint(f"{seed}", llama_tensors(seed)) for seed in (1, 2)))
    pair._takes_fingerprints = True
    sources = []
    for model in (pair.candidate, pair.reference):
        sources.append(CountingSource(model.checkpoint.files.directory))
        model.checkpoint.source = sources[-1]
    found = pair.once(measures.nameless)
    assert len(found.matches) == 30
    assert pair.elementwise().mean().cosine is not None
    assert pair.read()["candidate"]["sha256"]
    assert {int(counts.max()) for source in sources for counts in source.counts.values()} == {1}


def test_mlps_whose_names_alone_say_nothing_are_read_once_as_well(base: Tensors, save_checkpoint: Save) -> None:
    """No tensor has a counterpart by name, but the MLPs have one by their place."""
    renamed = {name.replace("model.layers", "transformer.h"): tensor for name, tensor in base.items()}
    (ours, our_source), (theirs, their_source) = (
        opened(save_checkpoint("ours", renamed)),
        opened(save_checkpoint("theirs", base)),
    )
    comparison = compare(ours, theirs, with_neurons=True)
    assert comparison.neurons == tuple(neuron_groups(ours, theirs))
    assert len(comparison.neurons or ()) == 4
    assert not [one for one in comparison.compared if "transformer" in one.entry.name]
    mlps = [name for name in ours.tensors if "mlp" in name]
    assert {our_source.times(ours, name) for name in mlps} == {2 + 1}  # the pass, neuron_groups, and equal tensors
    assert {their_source.times(theirs, name.replace("transformer.h", "model.layers")) for name in mlps} == {2}


def test_large_tables_are_read_again_and_nothing_else(llama_tensors: Llama, save_checkpoint: Save) -> None:
    """The beginning of a table says that it may be one; that of trained weights says that they are none."""
    angles = torch.outer(torch.arange(4000.0), 10000.0 ** -(torch.arange(0, 64, 2) / 64))
    large = {"table.cos": angles.cos(), "model.layers.0.mlp.wide.weight": normal(5, 300, 400)}
    (ours, our_source), (theirs, their_source) = (
        opened(save_checkpoint(side, llama_tensors(seed) | large)) for side, seed in (("ours", 1), ("theirs", 2))
    )
    comparison = compare(ours, theirs, with_neurons=True, with_fingerprints=True)
    assert comparison.ordinary.keys() == {"table.cos"}
    assert comparison.fingerprints is not None
    assert all(side.excluded.keys() == {"table.cos"} for side in comparison.fingerprints)
    assert comparison.identical == (("model.layers.0.mlp.wide.weight",) * 2,)
    for checkpoint, source in ((ours, our_source), (theirs, their_source)):
        times = {name: source.times(checkpoint, name) for name in checkpoint.tensors}
        assert {name for name, count in times.items() if count > 1} == {"table.cos"}
        assert times["table.cos"] <= 3


# What goes wrong


def test_a_failure_is_kept_with_its_kind(
    llama_tensors: Llama, save_checkpoint: Save, open_pair: Callable[..., Pair]
) -> None:
    paths = [save_checkpoint(f"{seed}", llama_tensors(seed)) for seed in (1, 2)]
    pair = open_pair(*paths)
    source = CountingSource(paths[1], fail_after=3)
    pair.reference.checkpoint.source = source
    with pytest.raises(RateLimited, match="the hub asks to wait") as first:
        pair.elementwise()
    before = source.read
    with pytest.raises(RateLimited) as second:
        pair.neurons()
    assert str(first.value) == str(second.value)
    assert source.read == before


def test_an_mlp_that_contradicts_itself_spoils_only_the_tests_of_neurons(
    llama_tensors: Llama, save_checkpoint: Save, open_pair: Callable[..., Pair]
) -> None:
    broken = llama_tensors(1) | {"model.layers.1.mlp.down_proj.weight": normal(1, 64, 100)}
    path = save_checkpoint("broken", broken)
    pair = open_pair(path, path)
    assert pair.elementwise().mean().cosine == pytest.approx(1)
    with pytest.raises(CheckpointUnavailable, match=r"'model.layers.1.mlp' disagree about their hidden units"):
        pair.neurons()


def test_neurons_are_read_when_nobody_said_that_they_are_asked_for(
    llama_tensors: Llama, save_checkpoint: Save, open_pair: Callable[..., Pair]
) -> None:
    paths = [save_checkpoint(f"{seed}", llama_tensors(seed)) for seed in (1, 2)]
    expected = open_pair(*paths)
    asked = Pair(expected.candidate, expected.reference, tests_neurons=False)
    assert asked.elementwise().neurons is None
    assert asked.neurons() == expected.neurons()


@pytest.mark.parametrize("mode", ["full", "sample"])
def test_a_file_that_is_changed_while_it_is_read_says_nothing(
    mode: str,
    llama_tensors: Llama,
    llama_config: Callable[..., Tensors],
    save_checkpoint: Save,
    open_pair: Callable[..., Pair],
) -> None:
    paths = [save_checkpoint(f"{seed}", llama_tensors(seed), llama_config()) for seed in (1, 2)]
    opened = open_pair(*paths)
    reading = Reading(mode, None if mode == "full" else 3_000_000)
    pair = Pair(opened.candidate, opened.reference, reading=reading)
    shard = paths[0] / "model.safetensors"
    assert pair.candidate.checkpoint.tensors
    with shard.open("r+b") as file:  # the same file, in place
        file.seek(-8, 2)
        file.write(b"\0" * 8)
    with pytest.raises(CheckpointUnavailable, match=r"model\.safetensors.*chang"):
        pair.comparison()
