from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checks.evidence.store import NullStore, ResultStore, Store, StoreError
from tests.kept_results import kept_results

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
    assert kept_results(store.directory) == 1


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
    assert kept_results(store.directory) == 7
    assert kept_results(store.directory, "elementwise") == 6
    assert kept_results(store.directory, "nothing") == 0


@pytest.mark.parametrize("size", [0, 1, 30, -10, -2, -1])
def test_a_truncated_file_is_no_result(tmp_path: Path, size: int) -> None:
    store = Store(tmp_path)
    store.put(KEY, {"cosine": 0.5})
    file = file_of(store)
    whole = file.read_bytes()
    file.write_bytes(whole[:size] if size >= 0 else whole[: len(whole) + size])
    fresh = Store(tmp_path)
    assert fresh.get(KEY) is None
    assert kept_results(fresh.directory) == 0
    assert fresh.measure(KEY, lambda: {"cosine": 0.5}) == {"cosine": 0.5}
    assert file.read_bytes() == whole
    assert kept_results(fresh.directory) == 1


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
    assert kept_results(tmp_path) == 0
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
    assert kept_results(fresh.directory) == 0
    (tmp_path / "README.txt").write_text("not a result")
    (tmp_path / "ab").mkdir(exist_ok=True)
    (tmp_path / "ab" / "stray.json").write_text(whole)
    assert kept_results(fresh.directory) == 0


def test_a_failing_measurement_keeps_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(AssertionError, match="measured"):
        store.measure(KEY, refuse)
    assert store.get(KEY) is None
    assert kept_results(store.directory) == 0
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
