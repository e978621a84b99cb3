"""Workers that compare the same candidate with different references at a time: one of them hashes it."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from checks.checkpoint.checkpoint import Checkpoint
from checks.checkpoint.errors import CheckpointUnavailable
from checks.evidence.store import Store
from checks.pair import passed_fingerprints
from checks.pair.comparison import Comparison, compare
from checks.pair.fingerprints import Fingerprint, picked_fingerprint
from checks.streaming import job
from tests.pair.counting import CountingSource, plain

Tensors = dict[str, torch.Tensor]
Llama = Callable[..., Tensors]
Save = Callable[..., Path]


class Hashed:
    """SHA-256 that counts the bytes of all threads."""

    total = 0
    lock = threading.Lock()

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def update(self, data: memoryview) -> None:
        with self.lock:
            Hashed.total += len(data)
        self._hash.update(data)

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


class Held(CountingSource):
    """Bytes of a directory that come once `let` was set; `asked` is set when the first are asked for."""

    def __init__(self, directory: Path, fail_after: int | None = None) -> None:
        super().__init__(directory, fail_after)
        self.asked, self.let = threading.Event(), threading.Event()

    def read_into(self, shard: str, start: int, buffer: memoryview) -> None:
        self.asked.set()
        self.let.wait(60)
        super().read_into(shard, start, buffer)


@pytest.fixture
def paths(llama_tensors: Llama, save_checkpoint: Save) -> list[Path]:
    return [save_checkpoint(f"{seed}", llama_tensors(seed, num_hidden_layers=2)) for seed in (1, 2, 3)]


def held(path: Path, fail_after: int | None = None) -> tuple[Checkpoint, Held]:
    checkpoint, source = Checkpoint(path), Held(path, fail_after)
    checkpoint.source = source
    return checkpoint, source


def begun(
    pool: ThreadPoolExecutor, store: Store, candidate: Path, other: Path, fail_after: int | None = None
) -> tuple[Future[Comparison], Held]:
    """A comparison under way: it has decided what it measures, and got no byte of the reference."""
    (theirs, source) = held(other, fail_after)
    running = pool.submit(compare, Checkpoint(candidate), theirs, with_fingerprints=True, store=store)
    assert source.asked.wait(60)
    return running, source


def test_one_of_two_workers_hashes_the_candidate(
    paths: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [plain(compare(Checkpoint(paths[0]), Checkpoint(other), with_fingerprints=True)) for other in paths[1:]]
    taken: list[tuple[int, ...]] = []

    def count(shape: tuple[int, ...], values: torch.Tensor) -> Fingerprint:
        taken.append(shape)
        return picked_fingerprint(shape, values)

    monkeypatch.setattr(passed_fingerprints, "picked_fingerprint", count)
    monkeypatch.setattr(job, "hashlib", SimpleNamespace(sha256=Hashed))
    monkeypatch.setattr(Hashed, "total", 0)
    store = Store(tmp_path / "store")
    with ThreadPoolExecutor(2) as pool:
        first, first_source = begun(pool, store, paths[0], paths[1])
        second, second_source = begun(pool, store, paths[0], paths[2])
        second_source.let.set()
        time.sleep(0.3)
        assert not second.done()  # waits for what the first one has to hash
        first_source.let.set()
        assert [plain(one.result(60)) for one in (first, second)] == expected
    tensors = Checkpoint(paths[0]).tensors
    assert Hashed.total == 3 * sum(entry.stored.stop - entry.stored.start for entry in tensors.values())
    assert len(taken) == 3 * len(tensors)


def test_workers_that_need_each_others_hashes(paths: list[Path], tmp_path: Path) -> None:
    """Each is at what the other one waits for, and neither waits for ever."""
    store = Store(tmp_path / "store")
    with ThreadPoolExecutor(3) as pool:
        running = [begun(pool, store, paths[ours], paths[theirs]) for ours, theirs in ((0, 1), (1, 2), (2, 0))]
        for _, source in running:
            source.let.set()
        found = [one.result(60) for one, _ in running]
    expected = [
        compare(Checkpoint(paths[a]), Checkpoint(paths[b]), with_fingerprints=True) for a, b in ((0, 1), (1, 2), (2, 0))
    ]
    assert [*map(plain, found)] == [*map(plain, expected)]


def test_a_model_compared_with_itself(paths: list[Path], tmp_path: Path) -> None:
    both = [Checkpoint(paths[0]), Checkpoint(paths[0])]
    found = compare(both[0], both[1], with_fingerprints=True, store=Store(tmp_path / "store"))
    assert plain(found) == plain(compare(Checkpoint(paths[0]), Checkpoint(paths[0]), with_fingerprints=True))
    assert both[0].digest() == both[1].digest()


def test_what_a_failed_worker_left_is_hashed_by_the_other(paths: list[Path], tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    with ThreadPoolExecutor(2) as pool:
        failing, failing_source = begun(pool, store, paths[0], paths[1], fail_after=3)
        candidate = Checkpoint(paths[0])
        other = pool.submit(compare, candidate, Checkpoint(paths[2]), with_fingerprints=True, store=store)
        time.sleep(0.3)
        assert not other.done()
        failing_source.let.set()
        with pytest.raises(CheckpointUnavailable, match="the hub asks to wait"):
            failing.result(60)
        found = other.result(60)
    assert plain(found) == plain(compare(Checkpoint(paths[0]), Checkpoint(paths[2]), with_fingerprints=True))
    assert candidate.digest() == Checkpoint(paths[0]).digest()


STUCK = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
import torch
from checks.checkpoint.checkpoint import Checkpoint
from checks.evidence.store import Store
from checks.pair.comparison import compare

class Stuck:
    def read_into(self, shard, start, buffer):
        Path(sys.argv[4]).touch()
        time.sleep(600)

torch.set_num_threads(1)
candidate, reference = (Checkpoint(Path(path)) for path in sys.argv[1:3])
reference.source = Stuck()
compare(candidate, reference, store=Store(Path(sys.argv[3])))
"""


def test_a_killed_worker_blocks_nobody(paths: list[Path], tmp_path: Path, repository: Path) -> None:
    store, mark = Store(tmp_path / "store"), tmp_path / "mark"
    stuck = subprocess.Popen(
        [sys.executable, "-c", STUCK, *map(str, paths[:2]), str(store.directory), str(mark)], cwd=repository
    )
    try:
        while not mark.exists():
            assert stuck.poll() is None
            time.sleep(0.01)
        candidate = Checkpoint(paths[0])
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(compare, candidate, Checkpoint(paths[2]), store=store)
            time.sleep(0.3)
            assert not other.done()
            stuck.kill()
            assert plain(other.result(60)) == plain(compare(Checkpoint(paths[0]), Checkpoint(paths[2])))
    finally:
        stuck.kill()
        stuck.wait(60)
    assert candidate.digest() == Checkpoint(paths[0]).digest()
