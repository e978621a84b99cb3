"""What is measured layer by layer: found in a store, or measured and kept there as soon as a layer is complete."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Generic, Protocol, TypeVar

Value = TypeVar("Value")

# The way of reading: all of it.
FULL = "full"


def on_device(reading: str, device: str) -> str:
    """A way of reading, for what is computed on a torch device: sums have other last digits on a GPU."""
    return f"{reading} on {device.partition(':')[0]}"


# What a value is of: names of tensors or of an MLP, of one side or of both.
Item = tuple[str, ...]


class LayerStore(Protocol):
    """Keeps measured layers, by candidate, reference, statistic, version, layer and way of reading."""

    def get(self, key: tuple[str, ...]) -> Any:
        """What was put there; None if nothing was."""

    def put(self, key: tuple[str, ...], payload: Any) -> None:
        """Keep a finished layer."""

    def exclusive(self, key: tuple[str, ...]) -> AbstractContextManager[None]:
        """One worker at a time does what is done under this key."""

    def claimed(self, key: tuple[str, ...]) -> AbstractContextManager[bool]:
        """Does this worker do what is done under this key? False: another one is at it."""


class Ledger(Generic[Value]):
    """The values of one statistic.

    `key`: candidate, reference, statistic and version; `layers`: the items of each layer. `write` and `read` turn a
    value into JSON and back, and lose no bit of it. `reading`: how the checkpoints are read, with what it depends on.
    `require_unchanged`: raises if the checkpoints are others than those of the key by now; then nothing is kept.
    A layer whose kept items are others, or cannot be read, is measured again.
    """

    def __init__(
        self,
        store: LayerStore | None,
        key: tuple[str, str, str, str],
        layers: Mapping[str, Iterable[Item]],
        write: Callable[[Value], Any],
        read: Callable[[Item, Any], Value],
        reading: str = FULL,
        require_unchanged: Callable[[], None] = lambda: None,
    ) -> None:
        self.values: dict[Item, Value] = {}
        self._store = store
        self._reading = reading
        self._require_unchanged = require_unchanged
        self._key = key
        self._write = write
        self._read = read
        self._layers = {label: tuple(items) for label, items in layers.items()}
        self._missing = {label: set(items) for label, items in self._layers.items()}
        self._left: dict[str, set[Item]] = {}  # what is missing and another worker is at
        self._label = {item: label for label, items in self._layers.items() for item in items}
        self._look_up()

    @property
    def missing(self) -> set[Item]:
        """The items that are not measured yet, and that no other worker is at."""
        return {item for items in self._missing.values() for item in items}

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """What is missing is for this worker alone while it is inside. If another one is at these values already, in
        any process, nothing is missing, and `rest` waits for it.

        Whoever is inside must not wait for other work, so that no two workers wait for each other.
        """
        if self._store is None or not self._missing:
            yield
            return
        with self._store.claimed(self._work) as is_ours:
            if is_ours:
                self._look_up()
            else:
                self._left, self._missing = self._missing, {}
            yield

    @contextmanager
    def rest(self) -> Iterator[None]:
        """Waits for the worker that is at the values. What it did not get done is missing, for this one, while it is
        inside; and so is what this one left.
        """
        if self._store is None or not (self._missing or self._left):
            yield
            return
        with self._store.exclusive(self._work):
            self._missing |= self._left
            self._left = {}
            self._look_up()
            yield

    def add(self, item: Item, value: Value) -> None:
        """The value of a missing item. The last one of a layer takes the layer to the store.

        Raises what `require_unchanged` raises.
        """
        label = self._label[item]
        missing = self._missing[label]
        missing.remove(item)
        self.values[item] = value
        if not missing:
            del self._missing[label]
            if self._store is not None:
                self._require_unchanged()
                measured = [[*item, self._write(self.values[item])] for item in self._layers[label]]
                self._store.put((*self._key, label, self._reading), {"measured": measured})

    @property
    def _work(self) -> tuple[str, ...]:
        """What a worker has that measures these values, whichever layers are missing."""
        return (*self._key, self._reading)

    def _look_up(self) -> None:
        """Take what is in the store of the missing layers."""
        for label in [*self._missing]:
            found = self._found(label)
            if found.keys() == set(self._layers[label]):
                self.values |= found
                del self._missing[label]

    def _found(self, label: str) -> dict[Item, Value]:
        stored = self._store.get((*self._key, label, self._reading)) if self._store is not None else None
        try:
            entries = [(tuple(entry[:-1]), entry[-1]) for entry in stored["measured"]] if stored else []
            return {item: self._read(item, value) for item, value in entries if self._label.get(item) == label}
        except (KeyError, TypeError, ValueError, AttributeError):
            return {}
