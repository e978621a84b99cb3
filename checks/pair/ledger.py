"""What is measured layer by layer: found in a store, or measured and kept there as soon as a layer is complete."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
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
        self._layers = {label: tuple(items) for label, items in layers.items()}
        self._missing: dict[str, set[Item]] = {}
        self._label = {item: label for label, items in self._layers.items() for item in items}
        for label, items in self._layers.items():
            found = self._found(label, read)
            if found.keys() == set(items):
                self.values |= found
            else:
                self._missing[label] = set(items)

    @property
    def missing(self) -> set[Item]:
        """The items that are not measured yet."""
        return {item for items in self._missing.values() for item in items}

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

    def _found(self, label: str, read: Callable[[Item, Any], Value]) -> dict[Item, Value]:
        stored = self._store.get((*self._key, label, self._reading)) if self._store is not None else None
        try:
            entries = [(tuple(entry[:-1]), entry[-1]) for entry in stored["measured"]] if stored else []
            return {item: read(item, value) for item, value in entries if self._label.get(item) == label}
        except (KeyError, TypeError, ValueError, AttributeError):
            return {}
