from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any

import pytest

from checks.checkpoint.errors import CheckpointUnavailable
from checks.evidence.store import Store as StoreOnDisk
from checks.pair.ledger import Item, Ledger, on_device

KEY = ("candidate", "reference", "statistic", "1")
LAYERS: dict[str, list[Item]] = {"0": [("a", "x"), ("b", "y")], "1": [("c", "z")], "none": []}


class Store:
    """Keeps what can be written to a file."""

    def __init__(self) -> None:
        self.files: dict[tuple[str, ...], str] = {}

    def get(self, key: tuple[str, ...]) -> dict[str, Any] | None:
        return json.loads(self.files[key]) if key in self.files else None

    def put(self, key: tuple[str, ...], payload: dict[str, Any]) -> None:
        self.files[key] = json.dumps(payload, allow_nan=False)

    def exclusive(self, key: tuple[str, ...]) -> AbstractContextManager[None]:
        return nullcontext()

    def claimed(self, key: tuple[str, ...]) -> AbstractContextManager[bool]:
        return nullcontext(True)


def ledger(
    store: Store | StoreOnDisk | None, key: tuple[str, str, str, str] = KEY, layers: Any = LAYERS
) -> Ledger[float]:
    return Ledger(store, key, layers, float.hex, lambda item, stored: float.fromhex(stored))


def test_a_layer_goes_to_the_store_with_its_last_value() -> None:
    store = Store()
    first = ledger(store)
    assert first.missing == {("a", "x"), ("b", "y"), ("c", "z")}
    first.add(("b", "y"), 0.1)
    assert not store.files
    first.add(("a", "x"), -0.0)
    assert store.files.keys() == {(*KEY, "0", "full")}
    again = ledger(store)
    assert again.missing == {("c", "z")}
    assert again.values == {("a", "x"): -0.0, ("b", "y"): 0.1}
    assert repr(again.values) == repr({("a", "x"): -0.0, ("b", "y"): 0.1})
    again.add(("c", "z"), float("inf"))
    assert not ledger(store).missing
    assert not again.missing


def test_without_a_store_values_are_only_collected() -> None:
    one = ledger(None)
    one.add(("c", "z"), 2.0)
    assert one.values == {("c", "z"): 2.0}
    assert one.missing == {("a", "x"), ("b", "y")}


def test_other_keys_know_nothing() -> None:
    store = Store()
    ledger(store).add(("c", "z"), 1.0)
    for place in range(4):
        other = [*KEY]
        other[place] = "other"
        assert ("c", "z") in ledger(store, (other[0], other[1], other[2], other[3])).missing


def test_a_layer_of_other_items_is_measured_again() -> None:
    store = Store()
    ledger(store).add(("c", "z"), 1.0)
    for items in ([("c", "other")], [("c", "z"), ("d", "z")], [("c",)]):
        assert ledger(store, layers={"1": items}).missing == set(items)


@pytest.mark.parametrize(
    "payload", [{}, {"measured": None}, {"measured": [["c"]]}, {"measured": [["c", "z", "much"]]}, {"measured": [1]}]
)
def test_a_layer_that_cannot_be_read_is_measured_again(payload: dict[str, Any]) -> None:
    store = Store()
    store.put((*KEY, "1", "full"), payload)
    assert ("c", "z") in ledger(store).missing


def test_nothing_is_kept_of_a_checkpoint_that_changed() -> None:
    def raising() -> None:
        raise CheckpointUnavailable("changed while it was read")

    store = Store()
    one = Ledger(store, KEY, LAYERS, float.hex, lambda _, stored: float.fromhex(stored), require_unchanged=raising)
    one.add(("a", "x"), 1.0)
    with pytest.raises(CheckpointUnavailable, match="changed"):
        one.add(("b", "y"), 1.0)
    assert not store.files
    Ledger(None, KEY, LAYERS, float.hex, lambda _, stored: 0.0, require_unchanged=raising).add(("c", "z"), 1.0)


def test_devices_of_one_kind_share_what_they_measure() -> None:
    assert on_device("full", "cuda:0") == on_device("full", "cuda:1") == "full on cuda"
    assert on_device("sample 1", "cpu") == "sample 1 on cpu"


def test_another_way_of_reading_has_values_of_its_own() -> None:
    store = Store()
    first = Ledger(store, KEY, {"0": [("a", "x")]}, float.hex, lambda _, stored: float.fromhex(stored), "sample seed 1")
    first.add(("a", "x"), 0.1)
    for reading, found in (("sample seed 1", {("a", "x"): 0.1}), ("sample seed 2", {}), ("full", {})):
        again = Ledger(
            store, KEY, {"0": [("a", "x")]}, float.hex, lambda _, stored: float.fromhex(stored), reading=reading
        )
        assert again.values == found


# Workers that want the same values


def everything(one: Ledger[float], value: float) -> None:
    for item in sorted(one.missing):
        one.add(item, value)


def rest(one: Ledger[float]) -> set[Item]:
    """Waits, and measures what is missing then."""
    with one.rest():
        missing = one.missing
        everything(one, 0.75)
    return missing


def test_what_another_worker_is_at_is_left_to_it_and_waited_for(tmp_path: Path) -> None:
    store = StoreOnDisk(tmp_path)
    first, second = ledger(store), ledger(store)
    with ThreadPoolExecutor(1) as pool, first.claimed():
        with second.claimed():
            assert second.missing == set()
            assert len(first.missing) == 3
        waiting = pool.submit(rest, second)
        everything(first, 0.25)
        time.sleep(0.2)
        assert not waiting.done()
    assert waiting.result() == set()
    assert second.values == first.values == dict.fromkeys(first.values, 0.25)
    assert len(second.values) == 3


def test_what_the_other_worker_did_not_get_done_is_measured_after_it(tmp_path: Path) -> None:
    store = StoreOnDisk(tmp_path)
    first, second = ledger(store), ledger(store)
    with suppress(CheckpointUnavailable), first.claimed(), second.claimed():
        first.add(("c", "z"), 0.25)
        first.add(("a", "x"), 0.25)  # its layer is not complete
        raise CheckpointUnavailable("the hub is down")
    assert rest(second) == {("a", "x"), ("b", "y")}
    assert second.values == {("a", "x"): 0.75, ("b", "y"): 0.75, ("c", "z"): 0.25}
    assert not ledger(store).missing


def test_what_was_measured_since_it_was_looked_up_is_not_measured_again(tmp_path: Path) -> None:
    store = StoreOnDisk(tmp_path)
    late = ledger(store)
    everything(ledger(store), 0.25)
    with late.claimed():
        assert late.missing == set()
    assert late.values == dict.fromkeys(late.values, 0.25)


def test_workers_that_want_other_values_do_not_wait(tmp_path: Path) -> None:
    store = StoreOnDisk(tmp_path)
    others = [ledger(store, (*KEY[:place], "other", *KEY[place + 1 :])) for place in range(4)]  # type: ignore[arg-type]
    with ledger(store).claimed():
        for other in others:
            with other.claimed():
                assert len(other.missing) == 3


def test_without_a_store_nobody_waits() -> None:
    one, other = ledger(None), ledger(None)
    with one.claimed(), other.claimed():
        assert len(other.missing) == len(one.missing) == 3
        with one.rest():
            everything(one, 0.25)
    assert rest(one) == set()
