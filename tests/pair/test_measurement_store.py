"""What a store keeps of a pass: a run that was killed goes on, and nothing is measured twice."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from checks.checkpoint.checkpoint import Checkpoint
from checks.checkpoint.errors import CheckpointUnavailable
from checks.evidence.store import Store as StoreOnDisk
from checks.pair import measurement, passed_fingerprints
from checks.pair.comparison import compare
from checks.pair.fingerprints import Fingerprint, picked_fingerprint
from checks.pair.measurement import identities_of
from checks.streaming import job
from tests.kept_results import kept_results
from tests.pair.counting import Killed, Store, opened, plain

Tensors = dict[str, torch.Tensor]
Llama = Callable[..., Tensors]
Save = Callable[..., Path]


@pytest.mark.parametrize("asked", [True, False])
def test_a_killed_run_goes_on_where_it_was(asked: bool, llama_tensors: Llama, save_checkpoint: Save) -> None:
    """Wherever it was killed; and the last run reads nothing."""
    wanted = {"with_neurons": asked, "with_fingerprints": asked}
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
    expected = plain(compare(*map(Checkpoint, paths), **wanted, store=whole))
    assert expected == plain(compare(*map(Checkpoint, paths), **wanted))
    store, kept = Store(), 0
    for _ in range(len(whole.files)):
        store.left = 4
        (ours, our_source), (theirs_, their_source) = map(opened, paths)
        finished = {key[4] for key in store.files if key[2] == "sha256" and key[1] == ""}
        try:
            found = compare(ours, theirs_, **wanted, store=store)
        except Killed:
            assert len(store.files) == kept + 4
            kept = len(store.files)
            continue
        break
    assert plain(found) == expected
    assert store.files == whole.files
    assert finished
    (ours, our_source), (theirs_, their_source) = map(opened, paths)
    assert plain(compare(ours, theirs_, **wanted, store=store)) == expected
    assert our_source.read == their_source.read == 0
    assert ours.digest() == Checkpoint(paths[0]).digest()
    assert our_source.read == 0


KILLED_AT_A_PUT = """
import os, signal, sys
from pathlib import Path
import torch
from checks.checkpoint.checkpoint import Checkpoint
from checks.checkpoint.errors import CheckpointUnavailable
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
    assert kept_results(store.directory) == 6
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
    pairs = [[Checkpoint(paths[side]) for side in sides] for sides in ((0, 1), (0, 2), (2, 1))]
    monkeypatch.setattr(job.hashlib, "sha256", Counted)
    monkeypatch.setattr(measurement, "identity_of", lambda index, *_: str(index.directory))
    compare(*pairs[0], store=store)
    size = sum(tensor.nbytes for tensor in llama_tensors(1).values())
    assert sum(hashed) == 2 * size
    compare(*pairs[1], store=store)
    assert sum(hashed) == 3 * size
    compare(*pairs[2], store=store)
    assert sum(hashed) == 3 * size


def test_fingerprints_are_taken_once_for_all_references(
    llama_tensors: Llama, save_checkpoint: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [save_checkpoint(f"{seed}", llama_tensors(seed)) for seed in (1, 2, 3)]
    taken: list[tuple[int, ...]] = []

    def count(shape: tuple[int, ...], values: torch.Tensor) -> Fingerprint:
        taken.append(shape)
        return picked_fingerprint(shape, values)

    store = Store()
    monkeypatch.setattr(passed_fingerprints, "picked_fingerprint", count)
    compare(*map(Checkpoint, paths[:2]), with_fingerprints=True, store=store)
    assert len(taken) == 2 * 30
    again = compare(Checkpoint(paths[0]), Checkpoint(paths[2]), with_fingerprints=True, store=store)
    assert len(taken) == 3 * 30
    (ours, our_source), (theirs, their_source) = map(opened, (paths[0], paths[2]))
    assert plain(compare(ours, theirs, with_fingerprints=True, store=store)) == plain(again)
    assert our_source.read == their_source.read == 0


def test_fingerprints_that_come_later_read_everything_once(llama_tensors: Llama, save_checkpoint: Save) -> None:
    paths = [save_checkpoint(f"{seed}", llama_tensors(seed)) for seed in (1, 2)]
    store = Store()
    compare(*map(Checkpoint, paths), store=store)
    (ours, our_source), (theirs, their_source) = map(opened, paths)
    found = compare(ours, theirs, with_fingerprints=True, store=store)
    assert plain(found) == plain(compare(*map(Checkpoint, paths), with_fingerprints=True))
    for checkpoint, source in ((ours, our_source), (theirs, their_source)):
        assert {source.times(checkpoint, name) for name in checkpoint.tensors} == {1}


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


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("side", ["1", "2"])
def test_nothing_is_kept_of_a_file_that_changes_meanwhile(
    in_place: bool, side: str, llama_tensors: Llama, save_checkpoint: Save, tmp_path: Path
) -> None:
    """Neither under the old identity nor under the new one."""
    paths = [save_checkpoint(name, llama_tensors(int(name))) for name in ("1", "2")]
    store, sides = Store(), [*map(Checkpoint, paths)]
    for one in sides:
        one.read("model.norm.weight")
    file = tmp_path / side / "model.safetensors"
    data = file.read_bytes()
    time.sleep(0.02)  # the clock of a file system may tick a hundred times a second only
    place = file if in_place else file.with_name("new")
    place.write_bytes(data[:-4] + bytes(4))
    place.replace(file)
    with pytest.raises(CheckpointUnavailable, match=r"model\.safetensors: changed while it was read; run again"):
        compare(*sides, store=store)
    changed = identities_of(store, *sides)[int(side) - 1]
    assert not [key for key in store.files if changed in key]
    assert plain(compare(*map(Checkpoint, paths), store=store)) == plain(compare(*map(Checkpoint, paths)))


def test_sums_and_tests_say_what_they_were_computed_on(llama_tensors: Llama, save_checkpoint: Save) -> None:
    """Sums have other last digits on a GPU; hashes are the same anywhere."""
    paths = [save_checkpoint(f"{seed}", llama_tensors(seed)) for seed in (1, 2)]
    store = Store()
    compare(*map(Checkpoint, paths), with_neurons=True, store=store)
    kinds = {(key[2], key[-1]) for key in store.files if key[2] != "equal tensors"}
    assert kinds == {("sha256", "full"), ("elementwise", "full on cpu"), ("neurons", "full on cpu")}
