"""Several workers that share a store, and workers that are killed."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from checks.evidence import store as store_module
from checks.evidence.store import NullStore, Store
from tests.kept_results import kept_results

KEY = ("candidate", "reference", "elementwise", "1", "3", "full")

WORKER = """
import math, os, sys, time
from pathlib import Path
from checks.evidence.store import Store

directory, log, run, order, pause = sys.argv[1:]
store = Store(Path(directory))

def compute(number):
    with open(log, "a") as file:
        file.write(f"{run} {number}\\n")
    time.sleep(float(pause))
    return {"values": [math.sin(number + step) for step in range(2000)], "number": number}

for number in map(int, order.split(",")):
    store.measure(("layer", str(number)), lambda: compute(number))
"""
PROJECT = Path(store_module.__file__).parents[2]


def worker(directory: Path, log: Path, run: int, order: list[int], pause: float) -> subprocess.Popen[bytes]:
    arguments = [str(directory), str(log), str(run), ",".join(map(str, order)), str(pause)]
    return subprocess.Popen([sys.executable, "-c", WORKER, *arguments], cwd=PROJECT)


def computed(log: Path) -> list[tuple[int, int]]:
    """Runs and numbers of what was computed."""
    if not log.exists():
        return []
    pairs = (line.split() for line in log.read_text().splitlines())
    return [(int(run), int(number)) for run, number in pairs]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("??/*.json")}


def test_two_workers_never_measure_the_same(tmp_path: Path) -> None:
    log = tmp_path / "log"
    orders = [random.Random(seed).sample(range(30), 30) for seed in range(4)]
    running = [worker(tmp_path / "store", log, run, order, 0.01) for run, order in enumerate(orders)]
    assert [one.wait(60) for one in running] == [0] * 4
    assert sorted(number for _, number in computed(log)) == list(range(30))
    assert len({run for run, _ in computed(log)}) > 1
    assert kept_results(tmp_path / "store") == 30


def test_threads_never_measure_the_same(tmp_path: Path) -> None:
    counted: list[int] = []
    store = Store(tmp_path)

    def slow() -> int:
        counted.append(1)
        time.sleep(0.05)
        return 7

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(lambda _: store.measure(KEY, slow), range(6))) == [7] * 6
    assert len(counted) == 1


def test_work_on_many_keys_is_done_by_one_at_a_time(tmp_path: Path) -> None:
    counted: list[str] = []

    def work(_: int) -> None:
        store = Store(tmp_path)
        with store.exclusive(("pair", "pass")):
            for layer in "abc":
                if store.get(("pair", layer)) is None:
                    counted.append(layer)
                    time.sleep(0.01)
                    store.put(("pair", layer), layer)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert counted == ["a", "b", "c"]
    assert kept_results(tmp_path) == 3
    with NullStore().exclusive(("pair", "pass")), NullStore().exclusive(("pair", "pass")):
        pass


def is_free(store: Store, work: tuple[str, ...]) -> bool:
    with store.claimed(work) as is_ours:
        return is_ours


def test_whoever_comes_second_is_told_and_does_not_wait(tmp_path: Path) -> None:
    store, work = Store(tmp_path), ("candidate", "hashes")
    with store.claimed(work) as first, Store(tmp_path).claimed(work) as second, store.claimed(("another",)) as other:
        assert (first, second, other) == (True, False, True)
        store.put((*work, "layer"), 1)
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(is_free, store, work).result(10) is False
    with suppress(ValueError), store.claimed(work):
        raise ValueError("the work fails")
    assert is_free(store, work)
    with store.exclusive(work), store.claimed(work) as meanwhile:
        assert not meanwhile
    assert is_free(store, work)
    with NullStore().claimed(work) as one, NullStore().claimed(work) as two:
        assert one
        assert two
    with pytest.raises(TypeError, match="tuple of strings"):
        NullStore().claimed(["a"])  # type: ignore[arg-type]


CLAIMING = """
import sys, time
from pathlib import Path
from checks.evidence.store import Store

with Store(Path(sys.argv[1])).claimed(("work",)) as ours:
    Path(sys.argv[2]).write_text(str(ours))
    time.sleep(600)
"""


def test_what_a_killed_worker_claimed_is_free(tmp_path: Path) -> None:
    store, mark = Store(tmp_path / "store"), tmp_path / "mark"
    claiming = subprocess.Popen([sys.executable, "-c", CLAIMING, str(store.directory), str(mark)], cwd=PROJECT)
    try:
        while not mark.exists() or not mark.read_text():
            assert claiming.poll() is None
            time.sleep(0.01)
        assert not is_free(store, ("work",))

        def wait() -> bool:
            with store.exclusive(("work",)):
                return True

        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(wait)
            time.sleep(0.2)
            assert not waiting.done()
            claiming.kill()
            assert waiting.result(30)
    finally:
        claiming.kill()
        claiming.wait(30)


def test_a_killed_worker_loses_nothing_that_was_finished(tmp_path: Path) -> None:
    log, directory = tmp_path / "log", tmp_path / "store"
    chance = random.Random(3)
    order = list(range(25))
    run = 0
    while True:
        before = {number for number in order if Store(directory).get(("layer", str(number))) is not None}
        running = worker(directory, log, run, order, 0.002)
        if run < 12:
            # From the first measurement on, at any point: while computing, writing, or between.
            while running.poll() is None and not any(one == run for one, _ in computed(log)):
                time.sleep(0.002)
            time.sleep(chance.random() * 0.03)
            running.send_signal(signal.SIGKILL)
        status = running.wait(60)
        again = before & {number for one, number in computed(log) if one == run}
        assert not again
        if status == 0:
            break
        assert status == -signal.SIGKILL
        run += 1
    assert run >= 3
    assert worker(tmp_path / "undisturbed", tmp_path / "other log", 0, order, 0).wait(60) == 0
    assert contents(directory) == contents(tmp_path / "undisturbed")
    assert kept_results(directory) == 25
    assert not list(directory.glob("??/*.part"))


KILL_IN = """
import os, signal
done = getattr(os, "{name}")
def killed(*arguments):
    {before}
    done(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
os.{name} = killed
"""


@pytest.mark.parametrize(
    ("name", "before", "is_kept"),
    [
        ("fsync", "os.kill(os.getpid(), signal.SIGKILL)", False),
        ("fsync", "os.ftruncate(arguments[0], 40)", False),
        ("replace", "os.kill(os.getpid(), signal.SIGKILL)", False),
        ("replace", "pass", True),
    ],
    ids=["before it is on disk", "half written", "before it is in place", "in place"],
)
def test_killed_while_writing(tmp_path: Path, name: str, before: str, is_kept: bool) -> None:
    log, directory = tmp_path / "log", tmp_path / "store"
    script = KILL_IN.format(name=name, before=before) + WORKER
    arguments = [str(directory), str(log), "0", "1,2", "0"]
    status = subprocess.Popen([sys.executable, "-c", script, *arguments], cwd=PROJECT).wait(30)
    assert status == -signal.SIGKILL
    assert kept_results(directory) == is_kept
    assert worker(directory, log, 1, [1, 2], 0).wait(30) == 0
    assert computed(log) == [(0, 1), *([] if is_kept else [(1, 1)]), (1, 2)]
    assert not list(directory.glob("??/*.part"))


def test_whoever_waits_for_a_killed_worker_goes_on(tmp_path: Path) -> None:
    log = tmp_path / "log"
    stuck = worker(tmp_path / "store", log, 0, [1], 600)
    while not computed(log):
        time.sleep(0.01)
    waiting = worker(tmp_path / "store", log, 1, [1], 0)
    with pytest.raises(subprocess.TimeoutExpired):
        waiting.wait(0.5)
    stuck.kill()
    assert waiting.wait(30) == 0
    stuck.wait(30)
    assert computed(log) == [(0, 1), (1, 1)]
    assert Store(tmp_path / "store").get(("layer", "1"))["number"] == 1
