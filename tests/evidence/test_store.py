from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checks.evidence import store as store_module
from checks.evidence.store import NullStore, ResultStore, Store, StoreError

KEY = ("candidate", "reference", "elementwise", "1", "3", "full")

payloads = st.recursive(
    st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def file_of(store: Store, key: tuple[str, ...] = KEY) -> Path:
    (found,) = (path for path in store.directory.glob("??/*.json") if json.loads(path.read_text())["key"] == list(key))
    return found


def same(one: Any, other: Any) -> bool:
    """Equal to the last bit, signs of zero and NaN included."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def refuse() -> Any:
    raise AssertionError("is measured again")


@given(payload=payloads, key=st.lists(st.text(max_size=5), min_size=1, max_size=6))
@settings(deadline=None, max_examples=40)
def test_results_come_back_to_the_last_bit(
    tmp_path_factory: pytest.TempPathFactory, payload: Any, key: list[str]
) -> None:
    store = Store(tmp_path_factory.mktemp("store"))
    assert store.get(tuple(key)) is None
    assert same(store.measure(tuple(key), lambda: payload), payload)
    assert same(Store(store.directory).measure(tuple(key), refuse), payload)
    assert same(NullStore().measure(tuple(key), lambda: payload), payload)
    assert store.get((*key, "more")) is None
    assert store.finished(key[:1]) == store.finished() == 1


def test_first_and_resumed_run_have_the_same(tmp_path: Path) -> None:
    measured = {2: (0.1 + 0.2, math.inf), 10: [math.nan, -0.0], "x": (1, 2)}
    store = Store(tmp_path / "new" / "store")
    first = store.measure(KEY, lambda: measured)
    assert first.keys() == {"2", "10", "x"}
    assert first["2"] == [0.30000000000000004, math.inf]
    assert same(first, store.measure(KEY, refuse))
    assert same(first, Store(store.directory).get(KEY))


def test_each_part_of_the_key_counts(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for part in range(len(KEY)):
        store.put((*KEY[:part], KEY[part] + "x", *KEY[part + 1 :]), part)
    assert store.get(KEY) is None
    store.put(KEY, "all")
    assert store.get(KEY) == "all"
    assert store.get(("candidate reference", *KEY[2:])) is None
    store.put(KEY, "replaced")
    assert store.get(KEY) == "replaced"
    assert store.finished() == 7
    assert store.finished(KEY[:2]) == 5
    assert store.finished(("nobody",)) == 0


@pytest.mark.parametrize("size", [0, 1, 30, -10, -2, -1])
def test_a_truncated_file_is_no_result(tmp_path: Path, size: int) -> None:
    store = Store(tmp_path)
    store.put(KEY, {"cosine": 0.5})
    file = file_of(store)
    whole = file.read_bytes()
    file.write_bytes(whole[:size] if size >= 0 else whole[: len(whole) + size])
    fresh = Store(tmp_path)
    assert fresh.get(KEY) is None
    assert fresh.finished() == 0
    assert fresh.measure(KEY, lambda: {"cosine": 0.5}) == {"cosine": 0.5}
    assert file.read_bytes() == whole
    assert fresh.finished() == 1


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xfe",
        b"null",
        b"[1]",
        b'{"key": 3, "payload": 1}',
        b'{"key": [["a"]], "payload": 1, "sha256": ""}',
        b"[" * 100_000,
        b'{"payload": 1}',
    ],
)
def test_a_foreign_file_is_no_result(tmp_path: Path, content: bytes) -> None:
    store = Store(tmp_path)
    store.put(KEY, 1)
    file_of(store).write_bytes(content)
    assert Store(tmp_path).get(KEY) is None
    assert Store(tmp_path).finished() == 0
    store.put(KEY, 2)
    assert store.get(KEY) == 2


def test_a_changed_or_misplaced_result_is_none(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put(KEY, {"cosine": 0.5})
    other = ("other", *KEY[1:])
    store.put(other, {"cosine": 0.1})
    whole = file_of(store).read_text()
    misplaced, place = file_of(store, other), file_of(store)
    misplaced.write_text(whole)
    place.write_text(whole.replace("0.5", "0.1"))
    fresh = Store(tmp_path)
    assert fresh.get(KEY) is None
    assert fresh.get(other) is None
    assert fresh.finished() == 0
    (tmp_path / "README.txt").write_text("not a result")
    (tmp_path / "ab").mkdir(exist_ok=True)
    (tmp_path / "ab" / "stray.json").write_text(whole)
    assert fresh.finished() == 0


def test_a_failing_measurement_keeps_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(AssertionError, match="measured"):
        store.measure(KEY, refuse)
    assert store.get(KEY) is None
    assert store.finished() == 0
    assert store.measure(KEY, lambda: 1) == 1


@pytest.mark.parametrize("store", [Store, lambda _: NullStore()], ids=["store", "none"])
def test_wrong_keys_and_payloads(tmp_path: Path, store: Any) -> None:
    results: ResultStore = store(tmp_path)
    for key in ((), "text", ("a", 1), ["a"]):
        with pytest.raises(TypeError, match="tuple of strings"):
            results.get(key)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="tuple of strings"):
            results.put(key, 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="None"):
        results.measure(KEY, lambda: None)
    with pytest.raises(TypeError):
        results.measure(KEY, lambda: {1, 2})
    assert results.get(KEY) is None
    assert results.finished() == 0


def test_no_store_measures_every_time() -> None:
    counted: list[int] = []
    for _ in range(2):
        NullStore().measure(KEY, lambda: [counted.append(1)])  # type: ignore[func-returns-value]
    assert len(counted) == 2


# Directories that cannot be used


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"file.*cannot be made.*--store"):
        Store(tmp_path / "file")
    with pytest.raises(StoreError, match="cannot be made"):
        Store(tmp_path / "file" / "below")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_is_read_only(tmp_path: Path) -> None:
    Store(tmp_path).put(KEY, 1)
    for place in (tmp_path, *tmp_path.iterdir()):
        place.chmod(0o555)
    try:
        assert Store(tmp_path).get(KEY) == 1
        with pytest.raises(StoreError, match=r"cannot be written.*writable"):
            Store(tmp_path).put(("another",), 1)
    finally:
        for place in (tmp_path, *tmp_path.iterdir()):
            place.chmod(0o755)


@pytest.mark.parametrize("name", ["replace", "fsync"])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    store = Store(tmp_path)
    store.put(KEY, "before")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, name, full)
        with pytest.raises(StoreError, match=r"No space left.*make room"):
            store.put(KEY, "after")
        with pytest.raises(StoreError, match="cannot be written"):
            store.measure(("another",), lambda: 1)
    assert store.get(KEY) == "before"
    assert store.get(("another",)) is None
    store.put(KEY, "after")
    assert store.get(KEY) == "after"


def test_a_directory_in_the_place_of_a_result(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.put(KEY, 1)
    file = file_of(store)
    file.unlink()
    file.mkdir()
    assert store.get(KEY) is None
    with pytest.raises(StoreError, match="cannot be written"):
        store.put(KEY, 1)


# Several workers, and workers that are killed

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
    assert Store(tmp_path / "store").finished(("layer",)) == 30


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
    assert Store(tmp_path).finished(("pair",)) == 3
    with NullStore().exclusive(("pair", "pass")), NullStore().exclusive(("pair", "pass")):
        pass


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
    assert Store(directory).finished() == 25
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
    assert Store(directory).finished() == is_kept
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
