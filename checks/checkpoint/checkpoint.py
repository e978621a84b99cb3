"""A local safetensors checkpoint: its index, and its tensors one at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.index import TensorInfo
from checks.checkpoint.local import LocalSource, read_local_index
from checks.checkpoint.roles import Role, role_of
from checks.checkpoint.template import assign_roles

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
    """The tensors of one component of a checkpoint directory.

    `prefixes` are tried in order; the first one that any tensor name starts with is removed from the names.
    Raises CheckpointUnavailable for a directory that is missing, holds no safetensors, or breaks its own index.
    """

    def __init__(self, directory: Path, prefixes: tuple[str, ...] = ("",)) -> None:
        self.directory = directory
        try:
            index = read_local_index(directory)
        except OSError as error:
            # A name that no file system has, a directory without permission.
            raise CheckpointUnavailable(f"{directory}: cannot be read ({error})") from error
        self.prefix = _first_used_prefix(directory, index.tensors, prefixes)
        self.roles = assign_roles({name: info.shape for name, info in index.tensors.items()}, _config(directory))
        self.tensors: dict[str, TensorEntry] = {
            name.removeprefix(self.prefix): TensorEntry(name.removeprefix(self.prefix), info, self._role(name))
            for name, info in sorted(index.tensors.items())
            if name.startswith(self.prefix)
        }
        self._everything = {name: info.elements for name, info in index.tensors.items()}
        self._source = LocalSource(directory)
        self._sha256: dict[str, str] = {}

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

    def read(self, name: str) -> torch.Tensor:
        """One tensor, on the CPU, in its stored dtype. Raises CheckpointUnavailable when it cannot be read."""
        import torch

        info = self.tensors[name].stored
        dtype = torch_dtype(info.dtype)
        if info.start == info.stop:
            return torch.empty(info.shape, dtype=dtype)
        buffer = bytearray(info.stop - info.start)
        self._source.read_into(info.shard, info.start, memoryview(buffer))
        flat = torch.frombuffer(buffer, dtype=torch.uint8).view(dtype)
        # Types that hold several elements in a byte keep their packed length.
        return flat.reshape(info.shape) if flat.numel() == info.elements else flat

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


def _config(directory: Path) -> dict[str, object]:
    """The model's config.json, for its model type and sizes; empty when there is none that can be used."""
    try:
        loaded = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return loaded if isinstance(loaded, dict) else {}


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


def _first_used_prefix(directory: Path, names: Iterable[str], prefixes: tuple[str, ...]) -> str:
    for prefix in prefixes:
        if any(name.startswith(prefix) for name in names):
            return prefix
    starts = sorted({".".join(name.split(".")[:2]) + "." for name in names})
    raise CheckpointUnavailable(
        f"{directory}: no tensor name starts with {' or '.join(repr(prefix) for prefix in prefixes)}; "
        f"names start with {', '.join(starts[:6])}: correct the prefix in the claim"
    )
