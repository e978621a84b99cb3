"""Checkpoints whose reads are counted, a store that can end a run, and all that a comparison found as text."""

from __future__ import annotations

import hashlib
import json
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from checks.checkpoint.checkpoint import Checkpoint
from checks.checkpoint.hub_failures import RateLimited
from checks.checkpoint.local import LocalSource
from checks.pair.comparison import Comparison
from checks.streaming.reader import PageBuffer


class CountingSource:
    """The bytes of a directory, how often each was read, and a failure after so many reads."""

    def __init__(self, directory: Path, fail_after: int | None = None) -> None:
        self._source = LocalSource(directory)
        self._left = fail_after
        self.counts = {path.name: np.zeros(path.stat().st_size, int) for path in directory.glob("*.safetensors")}

    def read_into(self, shard: str, start: int, buffer: memoryview) -> None:
        if self._left is not None:
            self._left -= 1
            if self._left < 0:
                raise RateLimited("the hub asks to wait")
        self.counts[shard][start : start + len(buffer)] += 1
        self._source.read_into(shard, start, buffer)

    @property
    def read(self) -> int:
        """Bytes."""
        return int(sum(counts.sum() for counts in self.counts.values()))

    def times(self, checkpoint: Checkpoint, name: str) -> int:
        """How often was all of a tensor read?"""
        info = checkpoint.tensors[name].stored
        (times,) = np.unique(self.counts[info.shard][info.start : info.stop])
        return int(times)


class CountingPages(CountingSource):
    """The same, of a directory that lies in the page cache."""

    def read_pages(self, shard: str, start: int, stop: int, buffer: PageBuffer) -> None:
        self.read_into(shard, start, buffer.place(start, stop))

    def is_cached(self, shard: str) -> bool:
        return True


def opened(directory: Path, fail_after: int | None = None) -> tuple[Checkpoint, CountingSource]:
    checkpoint, source = Checkpoint(directory), CountingSource(directory, fail_after)
    checkpoint.source = source
    return checkpoint, source


def plain(comparison: Comparison) -> str:
    """Everything that a comparison found, to the last bit."""
    compared = [(one.entry.name, one.reference_name, one.sums, one.robust) for one in comparison.compared]
    found = (compared, comparison.identical, comparison.ordinary, comparison.nonfinite, comparison.neurons)
    prints = [
        (side.names, side.excluded, *(_bits(vars(one)) for one in (*side.sketches, *side.samples)))
        for side in comparison.fingerprints or ()
    ]
    return repr((found, prints))


def _bits(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.shape, value.dtype, hashlib.sha256(value.numpy().tobytes()).hexdigest()
    if isinstance(value, dict):
        return {name: _bits(one) for name, one in value.items()}
    return [_bits(one) for one in value] if isinstance(value, tuple) else value


class Killed(Exception):
    """The run ended here."""


class Store:
    """Keeps what can be written to a file; can end the run after so many layers."""

    def __init__(self, die_after: int | None = None) -> None:
        self.files: dict[tuple[str, ...], str] = {}
        self.left = die_after

    def get(self, key: tuple[str, ...]) -> dict[str, Any] | None:
        return json.loads(self.files[key]) if key in self.files else None

    def put(self, key: tuple[str, ...], payload: dict[str, Any]) -> None:
        assert key not in self.files, "measured twice"
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                raise Killed
        self.files[key] = json.dumps(payload, allow_nan=False)

    def exclusive(self, key: tuple[str, ...]) -> AbstractContextManager[None]:
        return nullcontext()

    def claimed(self, key: tuple[str, ...]) -> AbstractContextManager[bool]:
        return nullcontext(True)
