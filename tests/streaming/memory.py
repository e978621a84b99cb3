"""Two checkpoints in memory, the pass over them, and what it must give."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from checks.checkpoint.index import CheckpointIndex, Shard, TensorInfo
from checks.statistics.elementwise import elementwise_sums
from checks.streaming.stream import SMALLEST_PIECE, TensorResult, stream_pair

FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
DTYPES = {**FLOATS, "U8": torch.uint8, "I64": torch.int64, "F8_E4M3": torch.float8_e4m3fn}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
Tensors = Mapping[str, Tensor]


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def packed(tensors: Tensors, shard: str, gap: int = 0) -> tuple[bytes, dict[str, TensorInfo]]:
    """A shard with the tensors in the given order, unaligned where they come to be."""
    header: dict[str, Any] = {}
    offset = 0
    for name, tensor in tensors.items():
        size = len(bytes_of(tensor))
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header).encode() + b" " * gap
    content = len(text).to_bytes(8, "little") + text + b"".join(map(bytes_of, tensors.values()))
    begin = 8 + len(text)
    found = {
        name: TensorInfo(
            name, entry["dtype"], tuple(entry["shape"]), shard, *(begin + x for x in entry["data_offsets"])
        )
        for name, entry in header.items()
    }
    return content, found


class Memory:
    """A checkpoint in memory, whose source counts how often each byte is read, and can fail or dawdle."""

    def __init__(self, *shards: Tensors, origin: str = "memory", gap: int = 0) -> None:
        self.contents: dict[str, bytes] = {}
        infos: dict[str, TensorInfo] = {}
        self.tensors: dict[str, Tensor] = {}
        for number, tensors in enumerate(shards):
            shard = f"{number}.safetensors"
            self.contents[shard], found = packed(tensors, shard, gap)
            infos.update(found)
            self.tensors.update(tensors)
        files = {shard: Shard(shard, len(content)) for shard, content in self.contents.items()}
        self.index = CheckpointIndex(origin, files, infos)
        self.counts = {shard: np.zeros(len(content), np.int32) for shard, content in self.contents.items()}
        self.reads: list[tuple[str, int, int]] = []
        self.most_at_once = 0
        self.before_read: Callable[[int], None] = lambda number: None
        self._under_way = 0
        self._lock = threading.Lock()

    def read_into(self, shard: str, start: int, buffer: memoryview) -> None:
        with self._lock:
            self.reads.append((shard, start, len(buffer)))
            number = len(self.reads)
            self.counts[shard][start : start + len(buffer)] += 1
            self._under_way += 1
            self.most_at_once = max(self.most_at_once, self._under_way)
        self.before_read(number)
        buffer[:] = self.contents[shard][start : start + len(buffer)]
        with self._lock:
            self._under_way -= 1

    def save(self, directory: Path) -> Path:
        directory.mkdir(parents=True)
        for shard, content in self.contents.items():
            (directory / shard).write_bytes(content)
        return directory

    def was_read_once(self, names: set[str]) -> bool:
        """Was each byte of these tensors read once, and no other byte?"""
        for shard, counts in self.counts.items():
            expected = np.zeros_like(counts)
            for info in self.index.tensors.values():
                if info.shard == shard and info.name in names:
                    expected[info.start : info.stop] += 1
            if (counts != expected).any():
                return False
        return True


def random_tensor(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (values * (50 if dtype in (torch.uint8, torch.int64) else 0.02)).abs().to(dtype)


def make(seed: int, spec: Mapping[str, tuple[tuple[int, ...], str]]) -> dict[str, Tensor]:
    return {
        name: random_tensor(seed + k, shape, DTYPES[dtype]) for k, (name, (shape, dtype)) in enumerate(spec.items())
    }


OURS = [
    {
        "embedding": ((301, 64), "BF16"),
        "odd": ((3,), "U8"),
        "norm": ((64,), "F32"),
        "up": ((200, 333), "BF16"),
        "only ours": ((77, 1001), "F16"),
    },
    {"scalar": ((), "F64"), "empty": ((0, 4), "BF16"), "down": ((333, 200), "F32"), "codes": ((9, 9), "F8_E4M3")},
]
THEIRS = [
    {"only theirs": ((50001,), "I64"), "down": ((333, 200), "BF16"), "norm": ((8, 8), "F64"), "scalar": ((1,), "F16")},
    {"empty": ((4, 0), "F32"), "up": ((200, 333), "BF16"), "other": ((5,), "F32"), "embedding": ((301, 64), "F16")},
]
PAIRED = ["embedding", "norm", "up", "scalar", "empty", "down"]
PAIRS = [(name, name) for name in PAIRED]


def run(ours: Memory, theirs: Memory, pairs: list[tuple[str, str]] = PAIRS, **options: Any) -> list[TensorResult]:
    return list(stream_pair(ours.index, theirs.index, (ours, theirs), pairs, **{"piece": SMALLEST_PIECE, **options}))


def sha256(tensor: Tensor) -> str:
    return hashlib.sha256(bytes_of(tensor)).hexdigest()


def assert_right(results: list[TensorResult], ours: Memory, theirs: Memory, pairs: list[tuple[str, str]]) -> None:
    """Every tensor is in one result, with its hash, and every pair has the sums of float64."""
    assert Counter(result.candidate for result in results if result.candidate) == Counter(ours.tensors.keys())
    assert Counter(result.reference for result in results if result.reference) == Counter(theirs.tensors.keys())
    found = [(result.candidate, result.reference) for result in results if result.candidate and result.reference]
    assert Counter(found) == Counter(pairs)
    for result in results:
        if result.candidate is not None:
            assert result.candidate_sha256 == sha256(ours.tensors[result.candidate])
        if result.reference is not None:
            assert result.reference_sha256 == sha256(theirs.tensors[result.reference])
        if result.candidate is None or result.reference is None:
            assert result.sums is None
            continue
        a, b = ours.tensors[result.candidate].flatten(), theirs.tensors[result.reference].flatten()
        expected = elementwise_sums(a, b)
        assert result.sums is not None
        assert (result.sums.n, result.sums.equal, result.sums.max_difference, result.sums.nonfinite) == (
            expected.n,
            expected.equal,
            expected.max_difference,
            expected.nonfinite,
        )
        assert astuple(result.sums) == pytest.approx(astuple(expected), rel=1e-5, abs=1e-9)
