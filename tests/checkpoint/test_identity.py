from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from checks.checkpoint.checkpoint import Checkpoint
from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.identity import identity_of
from checks.checkpoint.index import CheckpointIndex, Shard
from checks.checkpoint.local import read_local_index


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    place = tmp_path / "model"
    place.mkdir()
    for number in (1, 2):
        save_file({f"t{number}": torch.ones(3, 4)}, place / f"model-0000{number}-of-00002.safetensors")
    return place


def touch(place: Path) -> None:
    os.utime(place / "model-00001-of-00002.safetensors", ns=(1, 1))


def change_a_value(place: Path) -> None:
    save_file({"t2": torch.zeros(3, 4)}, place / "model-00002-of-00002.safetensors")


def put_another_file_in_place(place: Path) -> None:
    file = place / "model-00002-of-00002.safetensors"
    state = file.stat()
    shutil.copy(file, place / "new")
    os.replace(place / "new", file)  # noqa: PTH105
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))


def change_a_value_and_restore_its_time(place: Path) -> None:
    """As `rsync --inplace -t` and `touch -r` do."""
    file = place / "model-00002-of-00002.safetensors"
    state = file.stat()
    time.sleep(0.02)  # the clock of a file system may tick a hundred times a second only
    with file.open("r+b") as opened:
        opened.seek(-4, os.SEEK_END)
        opened.write(b"\0\0\0\0")
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))


@pytest.mark.parametrize(
    "change", [touch, change_a_value, put_another_file_in_place, change_a_value_and_restore_its_time]
)
def test_a_changed_file_is_another_checkpoint(directory: Path, change: Callable[[Path], None]) -> None:
    before = identity_of(read_local_index(directory))
    assert identity_of(read_local_index(directory)) == before
    assert before.startswith("local:")
    change(directory)
    assert identity_of(read_local_index(directory)) != before


def test_component_and_configuration_count(directory: Path) -> None:
    index = read_local_index(directory)
    found = {
        identity_of(index),
        identity_of(index, "model.vision."),
        identity_of(index, config={"model_type": "llama"}),
        identity_of(index, config={"model_type": "qwen2"}),
    }
    assert len(found) == 4
    assert identity_of(index, config={"a": 1, "b": 2}) == identity_of(index, config={"b": 2, "a": 1})


def test_a_moved_checkpoint_is_the_same(directory: Path) -> None:
    before = identity_of(read_local_index(directory))
    moved = directory.rename(directory.with_name("moved"))
    assert identity_of(read_local_index(moved)) == before


def test_it_is_of_the_files_whose_headers_were_read(directory: Path) -> None:
    """Not of whatever has their names by now, since that is not what is read."""
    checkpoint = Checkpoint(directory)
    before = identity_of(checkpoint.index)
    checkpoint.read("t2")
    put_another_file_in_place(directory)
    assert identity_of(checkpoint.index) == before
    assert checkpoint.read("t2").tolist() == [[1.0] * 4] * 3
    with pytest.raises(CheckpointUnavailable, match="changed while it was read; run again"):
        checkpoint.require_unchanged()


def test_a_file_that_was_replaced_before_its_weights_were_read(directory: Path) -> None:
    checkpoint = Checkpoint(directory)
    put_another_file_in_place(directory)
    checkpoint.read("t1")
    with pytest.raises(CheckpointUnavailable, match="changed while it was read; run again"):
        checkpoint.read("t2")


def test_hub_checkpoints_go_by_commit_and_digests(directory: Path) -> None:
    shards = {"a": Shard("a", 10, "1" * 64), "b": Shard("b", 20, "2" * 64)}
    index = CheckpointIndex("org/name", shards, {}, "c" * 40)
    known = identity_of(index)
    assert known.startswith(f"org/name@{'c' * 40}:")
    assert identity_of(replace(index, shards=dict(reversed(shards.items())))) == known
    others = [
        replace(index, revision="d" * 40),
        replace(index, origin="org/other"),
        replace(index, shards={**shards, "b": Shard("b", 20, "3" * 64)}),
        replace(index, shards={**shards, "b": Shard("b", 20, None)}),
        replace(index, shards={"a": shards["a"]}),
        # A snapshot in the local hub cache can be changed on this disk.
        replace(read_local_index(directory), origin="org/name", revision="c" * 40),
    ]
    assert len({known, *map(identity_of, others)}) == 7
