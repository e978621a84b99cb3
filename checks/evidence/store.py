"""Results that outlive the run that measured them: a killed run resumes, workers share, a second run is instant.

A directory with one JSON file for each result, which may lie on a file system that several machines share, as long as
that has locks. Nothing in it is believed before it was checked: what is cut short, was changed, or belongs to another
key counts as absent and is measured again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, Protocol

from filelock import BaseFileLock, FileLock, Timeout

# Candidate identity, reference identity, statistic, version, layer, way of reading: strings that say what was measured.
Key = tuple[str, ...]

SUFFIX, LOCK, UNFINISHED = ".json", ".lock", ".part"


class StoreError(Exception):
    """The store cannot be used. The text names its directory, what went wrong, and what to do."""


class ResultStore(Protocol):
    """Where results of measurements are kept."""

    def get(self, key: Key) -> Any:
        """The result of a key; None if there is none."""

    def put(self, key: Key, payload: Any) -> None:
        """Keep a result."""

    def measure(self, key: Key, compute: Callable[[], Any]) -> Any:
        """The result of a key, computed and kept if there is none."""

    def exclusive(self, key: Key) -> AbstractContextManager[None]:
        """One worker at a time does what is done under this key."""

    def claimed(self, key: Key) -> AbstractContextManager[bool]:
        """Does this worker do what is done under this key? False: another one is at it."""


class Store:
    """Results in a directory, which is made if it is not there.

    A payload is anything that JSON holds; floats come back to the last bit, tuples as lists, keys as strings. Raises
    StoreError if the directory cannot be made, read or written, and ValueError or TypeError for what JSON cannot hold.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        with self._explained("made"):
            directory.mkdir(parents=True, exist_ok=True)

    def get(self, key: Key) -> Any:
        """The result of a key; None if there is none, or no whole one."""
        found = self._read(self._path(key))
        return found[1] if found is not None and found[0] == key else None

    def put(self, key: Key, payload: Any) -> None:
        """Keep a result, in place of what there is under this key."""
        text = _text(key, payload)
        with self._locked(key):
            self._write(key, text)

    def measure(self, key: Key, compute: Callable[[], Any]) -> Any:
        """The result of a key; if there is none, what `compute` returns, which is kept.

        Whoever else asks for the same key meanwhile, in any process, waits and does not compute. The lock goes with
        its process, however that ends. The result is always as it would be read back, so that the first run and a
        resumed one have the same. None is no result and cannot be kept. Raises what `compute` raises, and keeps nothing
        then.
        """
        found = self.get(key)
        if found is not None:
            return found
        with self._locked(key):
            found = self.get(key)
            if found is not None:
                return found
            text = _text(key, compute())
            self._write(key, text)
        return _checked(text)[1]

    def exclusive(self, key: Key) -> AbstractContextManager[None]:
        """One worker at a time is inside, in any process; who waited finds in the store what the other one put there.

        For work that measures many keys at once, such as one pass over a pair: look again for what is missing, inside.
        `key`: of the work, not one of those that it measures, since these are locked while they are written.
        """
        return self._locked(key)

    @contextmanager
    def claimed(self, key: Key) -> Iterator[bool]:
        """As `exclusive`, but whoever comes second does not wait: is told False, and does something else meanwhile.

        Whoever is inside must not wait for work under another key: it keeps others waiting for this one.
        """
        lock: BaseFileLock | None = None
        with suppress(Timeout):
            lock = self._acquired(key, blocking=False)
        try:
            yield lock is not None
        finally:
            if lock is not None:
                lock.release()

    def _path(self, key: Key) -> Path:
        digest = hashlib.sha256(_canonical(_strings(key)).encode()).hexdigest()
        return self.directory / digest[:2] / f"{digest}{SUFFIX}"

    def _read(self, path: Path) -> tuple[Key, Any] | None:
        with self._explained("read"):
            try:
                text = path.read_bytes()
            except (FileNotFoundError, IsADirectoryError):
                return None
        try:
            return _checked(text.decode())
        except (ValueError, TypeError, KeyError, RecursionError):
            return None

    def _write(self, key: Key, text: str) -> None:
        """Put a file in its place at once, or not at all. The lock is held, so what is unfinished is nobody's."""
        path = self._path(key)
        unfinished = path.with_suffix(UNFINISHED)
        with self._explained("written"):
            with unfinished.open("wb") as file:
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)  # noqa: PTH105
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    @contextmanager
    def _locked(self, key: Key) -> Iterator[None]:
        lock = self._acquired(key)
        try:
            yield
        finally:
            lock.release()

    def _acquired(self, key: Key, blocking: bool = True) -> BaseFileLock:
        """The lock of a key, once it is had. Raises Timeout if it is not to be waited for and another one has it."""
        path = self._path(key).with_suffix(LOCK)
        with self._explained("written"):
            path.parent.mkdir(exist_ok=True)
            # A lock that is a mere file would outlive a killed process: better none than that.
            lock = FileLock(path, fallback_to_soft=False)
            lock.acquire(blocking=blocking)
        return lock

    @contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        except Timeout:  # an OSError too, which says that a lock is another worker's
            raise
        except (OSError, NotImplementedError) as error:
            raise StoreError(
                f"{self.directory}: the store of results cannot be {what} ({error}); make room, make it readable and "
                "writable, on a file system with locks, or name another directory with --store"
            ) from error


class NullStore:
    """Keeps nothing. Results come out just as from a store."""

    def get(self, key: Key) -> None:
        """None: there is no result."""
        _strings(key)

    def put(self, key: Key, payload: Any) -> None:
        """Forget it."""
        _text(key, payload)

    def measure(self, key: Key, compute: Callable[[], Any]) -> Any:
        """What `compute` returns, as a store would return it."""
        return _checked(_text(key, compute()))[1]

    def exclusive(self, key: Key) -> AbstractContextManager[None]:
        """Nobody waits: there is nothing to share."""
        _strings(key)
        return nullcontext()

    def claimed(self, key: Key) -> AbstractContextManager[bool]:
        """True: everyone works for himself."""
        _strings(key)
        return nullcontext(True)


def _text(key: Key, payload: Any) -> str:
    """What a file holds. JSON first makes strings of other keys, so that sorting them is the same ever after."""
    if payload is None:
        raise ValueError(f"{key}: None is no result and cannot be kept")
    content = _canonical(json.loads(json.dumps(payload)))
    digest = hashlib.sha256(content.encode()).hexdigest()
    return f'{{"key": {_canonical(_strings(key))}, "payload": {content}, "sha256": "{digest}"}}\n'


def _checked(text: str) -> tuple[Key, Any]:
    """Key and payload of a file. Raises ValueError, TypeError or KeyError if it is not what `_text` wrote."""
    loaded = json.loads(text)
    key, payload = tuple(loaded["key"]), loaded["payload"]
    if text != _text(key, payload):
        raise ValueError("no result, or a changed one")
    return key, payload


def _canonical(value: Any) -> str:
    """JSON with sorted keys. Floats in the shortest form that is exact; NaN and infinities as Python writes them."""
    return json.dumps(value, sort_keys=True)


def _strings(key: Key) -> Key:
    if not isinstance(key, tuple) or not key or not all(isinstance(part, str) for part in key):
        raise TypeError(f"a key is a tuple of strings, not {key!r}")
    return key
