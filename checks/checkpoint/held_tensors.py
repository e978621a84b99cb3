"""Tensors of a checkpoint that were read and may be asked for again: their bytes, as long as there is room."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection


class HeldTensors:
    """Bytes of tensors by name, as they are stored; where room is short the least recently used go first.

    `limit`: bytes in all; 0 holds nothing. Threads may share it.
    """

    def __init__(self, limit: int = 0) -> None:
        self.limit = limit
        self._held: OrderedDict[str, memoryview] = OrderedDict()
        self._lasting: dict[str, memoryview] = {}
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, name: str) -> memoryview | None:
        """The bytes of a tensor, not to be written to; None if they are not held."""
        with self._lock:
            if name in self._lasting:
                return self._lasting[name]
            if name in self._held:
                self._held.move_to_end(name)
            return self._held.get(name)

    def put(self, name: str, data: bytearray | memoryview, *, lasting: bool = False) -> None:
        """Hold a tensor, which nobody writes to any more. What is larger than all the room is not held.

        `lasting`: it stays until `clear`, if no more than half of the room is taken by such ones.
        """
        size = len(data)
        with self._lock:
            if size > self.limit or name in self._lasting or name in self._held:
                return
            view = memoryview(data).toreadonly()
            if lasting and size + sum(len(one) for one in self._lasting.values()) <= self.limit // 2:
                self._lasting[name] = view
            else:
                self._held[name] = view
            self._bytes += size
            while self._bytes > self.limit and self._held:
                self._bytes -= len(self._held.popitem(last=False)[1])

    def has_room(self, size: int) -> bool:
        """Can so many bytes be held without letting go of others?"""
        return self._bytes + size <= self.limit

    def drop(self, names: Collection[str]) -> None:
        """Let go of tensors that nobody asks for any more, except lasting ones."""
        with self._lock:
            for name in names:
                if name in self._held:
                    self._bytes -= len(self._held.pop(name))

    def clear(self) -> None:
        """Let go of everything."""
        with self._lock:
            self._held.clear()
            self._lasting.clear()
            self._bytes = 0
