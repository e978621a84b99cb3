"""Reading past the page cache and through it: right bytes, and every file closed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checks.checkpoint.errors import CheckpointUnavailable
from checks.streaming.reader import CACHED_SHARE, PAGE, DirectSource, PageBuffer, TensorReader, cached_share
from checks.streaming.stream import stream_pair
from tests.streaming.memory import (
    PAIRS,
    Memory,
)

PROJECT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("no_thread_is_left")


@given(start=st.integers(0, 3 * PAGE), size=st.integers(0, 5 * PAGE))
def test_bytes_stand_in_a_buffer_as_in_the_pages_of_their_file(start: int, size: int) -> None:
    buffer = PageBuffer(size)
    view = buffer.place(start, start + size)
    assert len(view) == size
    if size:
        assert np.frombuffer(view, np.uint8).ctypes.data % PAGE == start % PAGE
    assert np.frombuffer(buffer.pages, np.uint8).ctypes.data % PAGE == 0
    assert len(buffer.pages) % PAGE == 0
    with pytest.raises(ValueError, match="do not fit"):
        buffer.place(0, size + 2 * PAGE)


@given(start=st.integers(0, 40_000), size=st.integers(0, 40_000))
@settings(max_examples=100)
def test_direct_reads_give_the_bytes_of_the_file(
    start: int, size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = tmp_path_factory.getbasetemp() / "direct"
    directory.mkdir(exist_ok=True)
    content = np.random.default_rng(0).integers(0, 256, 50_001, np.uint8).tobytes()
    if not (directory / "shard").exists():
        (directory / "shard").write_bytes(content)
    stop = min(start + size, len(content))
    source = DirectSource(directory, direct=True)
    buffer = PageBuffer(stop - start)
    source.read_pages("shard", start, stop, buffer)
    assert buffer.place(start, stop) == content[start:stop]
    source.close()


@pytest.mark.parametrize("refused", ["open", "read"])
def test_ordinary_reads_where_direct_ones_are_refused(
    ours: Memory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    path = ours.save(tmp_path / "ours")
    direct: set[int] = set()
    real_open, real_read = os.open, os.preadv

    def open_file(name: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & os.O_DIRECT and refused == "open":
            raise OSError(22, "Invalid argument")
        descriptor = real_open(name, flags & ~os.O_DIRECT, *rest, **more)
        if flags & os.O_DIRECT:
            direct.add(descriptor)
        return descriptor

    def read(descriptor: int, *rest: Any) -> int:
        if descriptor in direct:
            raise OSError(22, "Invalid argument")
        return real_read(descriptor, *rest)

    monkeypatch.setattr(os, "open", open_file)
    monkeypatch.setattr(os, "preadv", read)
    source = DirectSource(path, direct=True)
    for info in ours.index.tensors.values():
        view = TensorReader(ours.index, source).read(info, info.start, info.stop, PageBuffer(info.stop - info.start))
        assert bytes(view) == ours.contents[info.shard][info.start : info.stop]
    assert bool(direct) is (refused == "read")


def test_is_cached_tells_memory_from_disk(tmp_path: Path) -> None:
    file = tmp_path / "shard"
    file.write_bytes(bytes(1 << 20))
    descriptor = os.open(file, os.O_RDONLY)
    os.fsync(descriptor)
    if cached_share(descriptor) == 0:
        pytest.skip("this file system does not tell")
    assert cached_share(descriptor) == 1
    assert DirectSource(tmp_path).is_cached("shard")
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    if cached_share(descriptor) >= CACHED_SHARE:
        pytest.skip("this file system keeps what it was told to drop")
    assert not DirectSource(tmp_path).is_cached("shard")
    os.close(descriptor)


MANY = """
import resource, sys
from pathlib import Path
from checks.streaming.reader import DirectSource, PageBuffer

_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
for directory in sys.argv[1:]:
    source = DirectSource(Path(directory), direct=True)
    for shard in range(80):
        source.read_pages(f"{shard}.safetensors", 0, 10, PageBuffer(10))
    globals()[directory] = source
"""


def test_checkpoints_of_many_shards_need_no_other_limit_on_open_files(tmp_path: Path) -> None:
    """Two descriptors for each shard: 320 of them, where 100 are allowed to begin with."""
    directories = [tmp_path / "ours", tmp_path / "theirs"]
    for directory in directories:
        directory.mkdir()
        for shard in range(80):
            (directory / f"{shard}.safetensors").write_bytes(bytes(10))
    program = [sys.executable, "-c", MANY, *map(str, directories)]
    done = subprocess.run(program, capture_output=True, text=True, check=False, cwd=PROJECT)
    assert done.returncode == 0, done.stderr


def test_closing_closes_every_file(ours: Memory, tmp_path: Path) -> None:
    path = ours.save(tmp_path / "ours")

    def opened() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = opened()
    source = DirectSource(path, direct=True)
    list(stream_pair(ours.index, ours.index, (source, source), PAIRS))
    assert opened() > before
    source.close()
    assert opened() == before
    with pytest.raises(CheckpointUnavailable, match="closed"):
        source.read_pages("0.safetensors", 0, 10, PageBuffer(10))
