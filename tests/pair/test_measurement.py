"""One pass for everything: what it reads, holds, and finds; the same in every run, and after a run that was killed."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from checks.checkpoint.checkpoint import Checkpoint
from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.hub_failures import RateLimited
from checks.checkpoint.local import LocalSource
from checks.evidence.store import Store as StoreOnDisk
from checks.pair import measurement
from checks.pair.comparison import Comparison, compare
from checks.pair.neurons import neuron_groups
from checks.pair.pair import Pair
from checks.statistics import kernel_cpu
from checks.statistics.elementwise import elementwise_sums
from checks.statistics.ordinary import ordinary_reason
from checks.streaming import job, stream

Tensors = dict[str, torch.Tensor]
Llama = Callable[..., Tensors]
Save = Callable[..., Path]
EXAMPLE_PAIRS = [("derived", "base"), ("independent", "base"), ("base", "base")]


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class CountingSource:
    """The bytes of a directory, how often each was read, and a failure after so many reads."""

    def __init__(self, directory: Path, fail_after: int | None = None) -> None:
        self._source = LocalSource(directory)
        self._left = fail_after
        self.counts = {path.name: np.zeros(path.stat().st_size, int) for path in directory.glob("*.safetensors")}

    def read_into(self, shard: str, start: int, buffer: memoryview) -> None:
        if self._left is not None:
            self._left -= 1
            if self._left < 0:
                raise RateLimited("the hub asks to wait")
        self.counts[shard][start : start + len(buffer)] += 1
        self._source.read_into(shard, start, buffer)

    @property
    def read(self) -> int:
        """Bytes."""
        return int(sum(counts.sum() for counts in self.counts.values()))

    def times(self, checkpoint: Checkpoint, name: str) -> int:
        """How often was all of a tensor read?"""
        info = checkpoint.tensors[name].stored
        (times,) = np.unique(self.counts[info.shard][info.start : info.stop])
        return int(times)


def opened(directory: Path, fail_after: int | None = None) -> tuple[Checkpoint, CountingSource]:
    checkpoint, source = Checkpoint(directory), CountingSource(directory, fail_after)
    checkpoint.source = source
    return checkpoint, source


def plain(comparison: Comparison) -> str:
    """Everything that a comparison found, to the last bit."""
    compared = [(one.entry.name, one.reference_name, one.sums) for one in comparison.compared]
    found = (compared, comparison.identical, comparison.ordinary, comparison.nonfinite, comparison.neurons)
    return repr(found)


# What it finds


@pytest.mark.parametrize(("ours", "theirs"), EXAMPLE_PAIRS)
def test_finds_what_reading_tensor_by_tensor_finds(ours: str, theirs: str, examples: Path) -> None:
    candidate, reference = Checkpoint(examples / ours), Checkpoint(examples / theirs)
    comparison = compare(candidate, reference, with_neurons=True)
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
        assert one.sums is not None
        assert (one.sums.n, one.sums.equal, one.sums.max_difference, one.sums.nonfinite) == (
            expected.n,
            expected.equal,
            expected.max_difference,
            expected.nonfinite,
        )
        assert one.cosine == pytest.approx(expected.centred_cosine, abs=1e-6)
    fresh = Checkpoint(examples / ours), Checkpoint(examples / theirs)
    equal = [name for name in fresh[0].tensors if fresh[0].sha256(name) == fresh[1].sha256(name)]
    assert comparison.identical == tuple((name, name) for name in equal)
    assert candidate.digest() == fresh[0].digest()
    assert comparison.neurons == tuple(neuron_groups(candidate, reference))


def test_is_the_same_in_every_run(examples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for numba in [kernel_cpu.numba, None]:
        monkeypatch.setattr(kernel_cpu, "numba", numba)
        found = set()
        for cores, piece in itertools.product((1, 2, 7), (stream.CACHED_PIECE, stream.SMALLEST_PIECE)):
            monkeypatch.setattr(stream, "_cores", lambda cores=cores: cores)
            monkeypatch.setattr(stream, "CACHED_PIECE", piece)
            pair = Checkpoint(examples / "derived"), Checkpoint(examples / "base")
            found.add(plain(compare(*pair, with_neurons=True)))
        assert len(found) == 1


# What it reads


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
    comparison = compare(ours, theirs, with_neurons=True)
    assert comparison.ordinary.keys() == {"table.cos"}
    assert comparison.identical == (("model.layers.0.mlp.wide.weight",) * 2,)
    for checkpoint, source in ((ours, our_source), (theirs, their_source)):
        assert {name for name in checkpoint.tensors if source.times(checkpoint, name) > 1} == {"table.cos"}


def test_stacks_that_only_their_first_axis_could_tell_are_looked_at_where_they_are_equal(
    llama_tensors: Llama, save_checkpoint: Save
) -> None:
    stacks = {"a": normal(1, 9, 100, 100), "b": torch.arange(9.0)[:, None, None] * normal(2, 1, 100, 100)}
    stacks["c"] = normal(3, 9, 100, 100)
    (ours, our_source), (theirs, _) = (
        opened(save_checkpoint("ours", stacks)),
        opened(save_checkpoint("theirs", stacks | {"c": normal(4, 9, 100, 100)})),
    )
    comparison = compare(ours, theirs)
    assert comparison.identical == (("a", "a"),)
    assert comparison.ordinary.keys() == {"b"}
    assert [our_source.times(ours, name) for name in stacks] == [2, 2, 1]


def test_of_large_tensors_equal_to_others_the_beginning_is_read(
    save_checkpoint: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measurement, "SMALL", 1000)
    weights = {f"w{number}": normal(number, 600, 300) for number in range(3)}
    (ours, our_source), (theirs, _) = (
        opened(save_checkpoint("ours", {name.replace("w", "v"): one for name, one in weights.items()})),
        opened(save_checkpoint("theirs", weights)),
    )
    assert len(compare(ours, theirs).identical) == 3
    size = 600 * 300 * 4 * 3
    assert size < our_source.read <= size + 3 * 65536 * 4


def published(checkpoint: Checkpoint, digest: str) -> Checkpoint:
    """As the hub tells the SHA-256 of the first shard."""
    first = min(checkpoint.index.shards)
    shards = dict(checkpoint.index.shards)
    shards[first] = replace(shards[first], published_sha256=digest)
    checkpoint.index = replace(checkpoint.index, shards=shards)
    return checkpoint


def test_shards_of_equal_published_digest_are_equal_without_a_byte_read(
    llama_tensors: Llama, save_checkpoint: Save
) -> None:
    tensors = llama_tensors(1)
    tensors["model.layers.0.post_attention_layernorm.weight"] = torch.ones(64)
    names = list(tensors)
    other = {name: tensor if names.index(name) % 2 == 0 else -tensor.flip(0) for name, tensor in tensors.items()}
    ours = Checkpoint(save_checkpoint("ours", tensors, shards=2))
    theirs, their_source = opened(save_checkpoint("theirs", other, shards=2))
    published(ours, "same")
    published(theirs, "same")
    first = min(ours.index.shards)
    in_first = {name for name, entry in ours.tensors.items() if entry.stored.shard == first}
    comparison = compare(ours, theirs)
    assert their_source.counts[first].sum() == 0
    assert {name for name, _ in comparison.identical} | set(comparison.ordinary) == in_first
    assert set(comparison.ordinary) == {"model.layers.0.post_attention_layernorm.weight"}
    assert {one.entry.name for one in comparison.compared if one.sums is None} == in_first
    assert all(one.cosine == one.raw_cosine == 1 for one in comparison.compared if one.sums is None)
    # The reference's hashes of that shard are not known, so no digest of all its tensors is.
    assert not in_first & theirs._sha256.keys()
    everything = compare(Checkpoint(ours.files.directory), Checkpoint(theirs.files.directory))
    for layer in range(3):
        assert comparison.layer(layer).cosine == pytest.approx(everything.layer(layer).cosine, abs=1e-9)
        assert comparison.layer(layer).elements == everything.layer(layer).elements
    assert comparison.identical == everything.identical


def test_a_record_names_published_digests_where_not_everything_was_read(
    llama_tensors: Llama, save_checkpoint: Save, open_pair: Callable[..., Pair]
) -> None:
    path = save_checkpoint("ours", llama_tensors(1))
    pair = open_pair(path, path)
    for model in (pair.candidate, pair.reference):
        published(model.checkpoint, "digest")
    assert len(pair.elementwise().identical) == 30
    read = pair.read()["candidate"]
    assert (read["sha256"], read["shards"]) == (None, {"model.safetensors": "digest"})
    assert len(pair.neurons()) == 3


# What it holds


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
    monkeypatch.setattr(measurement, "HELD_MEMORY", room_for * MLP)
    mlps = {seed: {n: t for n, t in llama_tensors(seed).items() if ".mlp." in n} for seed in (1, 2)}
    (ours, our_source), (theirs, their_source) = (opened(save_checkpoint(f"{s}", mlps[s], shards=3)) for s in (1, 2))
    comparison = compare(ours, theirs, with_neurons=True)
    for checkpoint, source in ((ours, our_source), (theirs, their_source)):
        times = {layer: source.times(checkpoint, f"model.layers.{layer}.mlp.up_proj.weight") for layer in range(3)}
        assert times == {layer: 1 if layer < room_for else 2 for layer in range(3)}
    monkeypatch.undo()
    assert comparison.neurons == compare(ours, theirs, with_neurons=True).neurons


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


# What a store keeps


class Killed(Exception):
    """The run ended here."""


class Store:
    """Keeps what can be written to a file; can end the run after so many layers."""

    def __init__(self, die_after: int | None = None) -> None:
        self.files: dict[tuple[str, ...], str] = {}
        self.left = die_after

    def get(self, key: tuple[str, ...]) -> dict[str, Any] | None:
        return json.loads(self.files[key]) if key in self.files else None

    def put(self, key: tuple[str, ...], payload: dict[str, Any]) -> None:
        assert key not in self.files, "measured twice"
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise Killed
        self.files[key] = json.dumps(payload, allow_nan=False)

    def exclusive(self, key: tuple[str, ...]) -> AbstractContextManager[None]:
        assert key[2] == "pass"
        return nullcontext()


@pytest.mark.parametrize("with_neurons", [True, False])
def test_a_killed_run_goes_on_where_it_was(with_neurons: bool, llama_tensors: Llama, save_checkpoint: Save) -> None:
    """Wherever it was killed; and the last run reads nothing."""
    tensors = llama_tensors(1)
    tensors["model.layers.2.mlp.up_proj.weight"][0, 0] = torch.nan
    theirs = llama_tensors(2) | {
        "lm_head.weight": tensors["model.embed_tokens.weight"],
        "model.norm.weight": torch.ones(64),
    }
    paths = [
        save_checkpoint("ours", tensors | {"model.norm.weight": torch.ones(64)}),
        save_checkpoint("theirs", theirs, shards=2),
    ]
    whole = Store()
    expected = plain(compare(*map(Checkpoint, paths), with_neurons=with_neurons, store=whole))
    assert expected == plain(compare(*map(Checkpoint, paths), with_neurons=with_neurons))
    store, kept = Store(), 0
    for _ in range(2 * len(whole.files)):
        store.left = 2
        (ours, our_source), (theirs_, their_source) = map(opened, paths)
        finished = {key[4] for key in store.files if key[2] == "sha256" and key[1] == ""}
        try:
            found = compare(ours, theirs_, with_neurons=with_neurons, store=store)
        except Killed:
            assert len(store.files) == kept + 2
            kept = len(store.files)
            continue
        break
    assert plain(found) == expected
    assert store.files == whole.files
    assert finished
    (ours, our_source), (theirs_, their_source) = map(opened, paths)
    assert plain(compare(ours, theirs_, with_neurons=with_neurons, store=store)) == expected
    assert our_source.read == their_source.read == 0
    assert ours.digest() == Checkpoint(paths[0]).digest()
    assert our_source.read == 0


KILLED_AT_A_PUT = """
import os, signal, sys
from pathlib import Path
import torch
from checks.checkpoint.checkpoint import Checkpoint
from checks.pair.comparison import compare
from checks.evidence.store import Store

torch.set_num_threads(1)

class Deadly(Store):
    left = int(sys.argv[4])

    def put(self, key, payload):
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)
        self.left -= 1
        super().put(key, payload)

compare(*(Checkpoint(Path(path)) for path in sys.argv[1:3]), with_neurons=True, store=Deadly(Path(sys.argv[3])))
"""


def test_a_process_that_was_killed_leaves_finished_layers_and_no_lock(examples: Path, tmp_path: Path) -> None:
    paths = [examples / "derived", examples / "base"]
    command = [sys.executable, "-c", KILLED_AT_A_PUT, *map(str, paths), str(tmp_path / "store"), "6"]
    done = subprocess.run(command, cwd=examples.parents[1], check=False, timeout=100)
    assert done.returncode == -signal.SIGKILL
    store = StoreOnDisk(tmp_path / "store")
    assert store.finished() == 6
    (ours, our_source), (theirs, _) = map(opened, paths)
    resumed = compare(ours, theirs, with_neurons=True, store=store)
    assert plain(resumed) == plain(compare(*map(Checkpoint, paths), with_neurons=True))
    assert 0 < our_source.read < sum(entry.stored.stop - entry.stored.start for entry in ours.tensors.values())


def test_finished_layers_are_not_read_again(llama_tensors: Llama, save_checkpoint: Save) -> None:
    paths = [save_checkpoint(f"{seed}", llama_tensors(seed)) for seed in (1, 2)]
    store = Store()
    compare(*map(Checkpoint, paths), with_neurons=True, store=store)
    for key in [key for key in store.files if key[4] == "model.layers.1"]:
        del store.files[key]
    (ours, our_source), (theirs, their_source) = map(opened, paths)
    compare(ours, theirs, with_neurons=True, store=store)
    for checkpoint, source in ((ours, our_source), (theirs, their_source)):
        times = {name: source.times(checkpoint, name) for name in checkpoint.tensors}
        assert times == {name: int(".layers.1." in name) for name in checkpoint.tensors}


def test_tests_of_neurons_that_come_later_read_the_mlps_alone(llama_tensors: Llama, save_checkpoint: Save) -> None:
    paths = [save_checkpoint(f"{seed}", llama_tensors(seed)) for seed in (1, 2)]
    store = Store()
    compare(*map(Checkpoint, paths), store=store)
    (ours, our_source), (theirs, _) = map(opened, paths)
    comparison = compare(ours, theirs, with_neurons=True, store=store)
    assert comparison.neurons == compare(*map(Checkpoint, paths), with_neurons=True).neurons
    assert {name for name in ours.tensors if our_source.times(ours, name)} == {n for n in ours.tensors if "mlp" in n}


def test_a_candidate_is_hashed_once_for_all_references(
    llama_tensors: Llama, save_checkpoint: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [save_checkpoint(f"{seed}", llama_tensors(seed)) for seed in (1, 2, 3)]
    hashed: list[int] = []

    class Counted:
        def __init__(self) -> None:
            self.bytes = 0
            hashed.append(0)
            self.number = len(hashed) - 1

        def update(self, data: memoryview) -> None:
            hashed[self.number] += len(data)

        def hexdigest(self) -> str:
            return f"{self.number:064x}"

    store = Store()
    monkeypatch.setattr(job.hashlib, "sha256", Counted)
    monkeypatch.setattr(measurement, "identity_of", lambda index, *_: str(index.directory))
    compare(*map(Checkpoint, paths[:2]), store=store)
    size = sum(tensor.nbytes for tensor in llama_tensors(1).values())
    assert sum(hashed) == 2 * size
    compare(Checkpoint(paths[0]), Checkpoint(paths[2]), store=store)
    assert sum(hashed) == 3 * size
    compare(Checkpoint(paths[2]), Checkpoint(paths[1]), store=store)
    assert sum(hashed) == 3 * size


def test_a_changed_file_is_measured_again(llama_tensors: Llama, save_checkpoint: Save) -> None:
    paths = [save_checkpoint(f"{seed}", llama_tensors(seed)) for seed in (1, 2)]
    store = Store()
    before = compare(*map(Checkpoint, paths), store=store)
    changed = save_checkpoint("1", llama_tensors(4))
    os.utime(changed / "model.safetensors", ns=(5, 5))
    (ours, our_source), (theirs, _) = map(opened, paths)
    after = compare(ours, theirs, store=store)
    assert after.mean().cosine != before.mean().cosine
    assert {our_source.times(ours, name) for name in ours.tensors} == {1}


def test_another_version_is_measured_again(
    llama_tensors: Llama, save_checkpoint: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [save_checkpoint(f"{seed}", llama_tensors(seed)) for seed in (1, 2)]
    store = Store()
    compare(*map(Checkpoint, paths), with_neurons=True, store=store)
    monkeypatch.setitem(measurement.VERSIONS, "neurons", "another")
    (ours, our_source), (theirs, _) = map(opened, paths)
    compare(ours, theirs, with_neurons=True, store=store)
    assert {name for name in ours.tensors if our_source.times(ours, name)} == {n for n in ours.tensors if "mlp" in n}
