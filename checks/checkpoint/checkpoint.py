"""A safetensors checkpoint, from disk or hub: its index, and its tensors one at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.files import CheckpointFiles, LocalFiles
from checks.checkpoint.header import BITS
from checks.checkpoint.held_tensors import HeldTensors
from checks.checkpoint.index import ByteSource, TensorInfo
from checks.checkpoint.local import LocalIndex, LocalSource
from checks.checkpoint.roles import Role, role_of
from checks.checkpoint.template import assign_roles
from checks.streaming.planned_source import planned_source
from checks.streaming.read_plan import TensorRead

if TYPE_CHECKING:
    import torch

# safetensors dtypes whose values are weights as they stand; the rest is packed, scaled or no number at all.
FLOAT_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
# Bytes of the integer types in which weights are packed.
_BYTES = {"I32": 4, "U32": 4, "I16": 2, "U16": 2}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a checkpoint, from its header alone."""

    name: str  # without the component's prefix
    stored: TensorInfo
    role: Role

    @property
    def stored_name(self) -> str:
        """Its name in the checkpoint."""
        return self.stored.name

    @property
    def dtype(self) -> str:
        """Its safetensors dtype."""
        return self.stored.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.stored.shape

    @property
    def elements(self) -> int:
        """Number of elements."""
        return self.stored.elements

    @property
    def weights(self) -> int:
        """How many weights it may hold: packed ones count as four bits each, the densest that is common."""
        packed = not self.is_float and not self.dtype.startswith("F")
        return self.elements * _BYTES.get(self.dtype, 1) * 2 if packed else self.elements

    @property
    def is_float(self) -> bool:
        """Are its values weights as they stand (not packed integers, not scaled 8-bit floats)?"""
        return self.dtype in FLOAT_DTYPES


class Checkpoint:
    """The tensors of one component of a checkpoint: of a directory, or of any other files it is opened from.

    `prefixes` are tried in order; the first one that any tensor name starts with is removed from the names.
    Raises CheckpointUnavailable for files that are missing, hold no safetensors, or break their own index.
    """

    def __init__(self, files: Path | CheckpointFiles, prefixes: tuple[str, ...] = ("",)) -> None:
        self.files: CheckpointFiles = LocalFiles(files) if isinstance(files, Path) else files
        self.index = index = self.files.index()
        self.prefix = _first_used_prefix(self.where, index.tensors, prefixes)
        self.config = _config(self.files)
        self.roles = assign_roles({name: info.shape for name, info in index.tensors.items()}, self.config)
        self.tensors: dict[str, TensorEntry] = {
            name.removeprefix(self.prefix): TensorEntry(name.removeprefix(self.prefix), info, self._role(name))
            for name, info in sorted(index.tensors.items())
            if name.startswith(self.prefix)
        }
        self._everything = {name: info.elements for name, info in index.tensors.items()}
        self._sha256: dict[str, str] = {}
        self.held = HeldTensors()

    @property
    def where(self) -> str:
        """The directory, or the repository and its commit, for people."""
        return self.files.where

    @property
    def provenance(self) -> Mapping[str, str]:
        """For the record: the hub repository and commit that was read, and its mirror; nothing for a directory."""
        return self.files.provenance

    @property
    def directory(self) -> Path | None:
        """Where the shards lie on this disk, if they do."""
        return self.index.directory

    @cached_property
    def source(self) -> ByteSource:
        """Where the bytes of the shards come from, by their names in `index`; on this disk, of the very files of it."""
        source = self.files.source()
        index = self.index
        if isinstance(source, LocalSource) and isinstance(index, LocalIndex) and source.directory == index.directory:
            source.expected = index.identities
        return source

    def require_unchanged(self) -> None:
        """To be asked before anything is kept of what was read. Raises CheckpointUnavailable if a file is another now.

        What a hub repository holds at a commit does not change.
        """
        if isinstance(self.index, LocalIndex):
            self.index.require_unchanged()

    def read_only(self, reads: Mapping[str, TensorRead]) -> None:
        """From now on read nothing but this, by stored names; any other byte raises NotPlanned.

        What comes from a hub is kept in temporary files, so that each byte is fetched once.
        """
        self.source = planned_source(self.source, self.index, reads, keep=self.directory is None)

    def _role(self, stored_name: str) -> Role:
        """The role that the template of the model type gives, else what the name says; none where both disagree."""
        assigned = self.roles.roles.get(stored_name)
        if assigned is not None:
            return assigned
        return Role("other") if stored_name in self.roles.problems else role_of(stored_name)

    @cached_property
    def parameters(self) -> int:
        """Elements of all tensors. Tied tensors that are stored once count once."""
        return sum(entry.elements for entry in self.tensors.values())

    def share_outside(self, prefixes: tuple[str, ...]) -> float:
        """Share of all stored elements whose tensor's name starts with none of `prefixes`, 0 to 1."""
        outside = sum(size for name, size in self._everything.items() if not name.startswith(prefixes))
        total = sum(self._everything.values())
        return outside / total if total else 0.0

    def read(self, name: str, rows: slice | None = None) -> torch.Tensor:
        """One tensor, on the CPU, in its stored dtype; or its `rows` along the first axis, whose bytes alone are read.

        What is held is not read again, and what is read whole is held, see `HeldTensors`.
        Raises CheckpointUnavailable when it cannot be read, ValueError for rows that are not stored one after the
        other, as whole bytes.
        """
        import torch

        info = self.tensors[name].stored
        dtype = torch_dtype(info.dtype)
        start, stop, shape = (info.start, info.stop, info.shape) if rows is None else _rows(info, rows)
        if start == stop:
            return torch.empty(shape, dtype=dtype)
        held = self.held.get(name)
        if held is not None:
            buffer = bytearray(held[start - info.start : stop - info.start])
        else:
            buffer = bytearray(stop - start)
            self.source.read_into(info.shard, start, memoryview(buffer))
            if rows is None and len(buffer) <= self.held.limit:
                self.held.put(name, buffer[:])  # whoever asked may write to the tensor
        flat = torch.frombuffer(buffer, dtype=torch.uint8).view(dtype)
        # Types that hold several elements in a byte keep their packed length.
        return flat.reshape(shape) if flat.numel() == prod(shape) else flat

    def sha256(self, name: str, tensor: torch.Tensor | None = None) -> str:
        """SHA-256 of a tensor's stored bytes, in hex. `tensor` saves reading it again."""
        known = self._sha256.get(name)
        if known is None:
            known = _sha256(self.read(name) if tensor is None else tensor)
            self._sha256[name] = known
        return known

    def digest(self) -> str:
        """SHA-256 over names, dtypes, shapes and bytes of all tensors: the same for any split into shards."""
        total = hashlib.sha256()
        for name, entry in self.tensors.items():
            total.update(json.dumps([name, entry.dtype, entry.shape, self.sha256(name)]).encode())
        return total.hexdigest()


def _config(files: CheckpointFiles) -> dict[str, Any]:
    """The model's config.json, for its model type and sizes; empty when there is none that can be used."""
    text = files.config()
    try:
        loaded = json.loads(text.decode("utf-8")) if text is not None else None
    except (ValueError, RecursionError):
        return {}
    return loaded if isinstance(loaded, dict) else {}


def _rows(info: TensorInfo, rows: slice) -> tuple[int, int, tuple[int, ...]]:
    """Where rows of a tensor begin and end in its shard, and their shape."""
    if not info.shape:
        raise ValueError(f"tensor {info.name!r} is a scalar and has no rows")
    first, last, step = rows.indices(info.shape[0])
    last = max(first, last)
    bits = BITS[info.dtype] * prod(info.shape[1:])
    if step != 1 or bits % 8:
        raise ValueError(f"tensor {info.name!r} ({info.dtype} of shape {list(info.shape)}): {rows} are no whole bytes")
    return info.start + first * bits // 8, info.start + last * bits // 8, (last - first, *info.shape[1:])


def torch_dtype(dtype: str) -> torch.dtype:
    """The torch type of a safetensors dtype; bytes for one that torch has not."""
    import torch

    names = {
        "F64": "float64",
        "F32": "float32",
        "F16": "float16",
        "BF16": "bfloat16",
        "F8_E4M3": "float8_e4m3fn",
        "F8_E4M3FNUZ": "float8_e4m3fnuz",
        "F8_E5M2": "float8_e5m2",
        "F8_E5M2FNUZ": "float8_e5m2fnuz",
        "F8_E8M0": "float8_e8m0fnu",
        "F4": "float4_e2m1fn_x2",
        "C64": "complex64",
        "BOOL": "bool",
        **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
        **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
    }
    found: torch.dtype = getattr(torch, names.get(dtype, "uint8"), torch.uint8)
    return found


def _sha256(tensor: torch.Tensor) -> str:
    import torch

    total = hashlib.sha256()
    if tensor.numel():
        # A view of the bytes: torch has dtypes (bfloat16) that numpy has not.
        total.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _first_used_prefix(where: str, names: Iterable[str], prefixes: tuple[str, ...]) -> str:
    for prefix in prefixes:
        if any(name.startswith(prefix) for name in names):
            return prefix
    starts = sorted({".".join(name.split(".")[:2]) + "." for name in names})
    raise CheckpointUnavailable(
        f"{where}: no tensor name starts with {' or '.join(repr(prefix) for prefix in prefixes)}; "
        f"names start with {', '.join(starts[:6])}: correct the prefix in the claim"
    )
