"""A local safetensors checkpoint: its index, and its tensors one at a time."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.roles import Role, role_of

if TYPE_CHECKING:
    import torch

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
ADAPTER_NAME = "adapter_model.safetensors"
PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt")

# safetensors dtypes whose values are weights as they stand; the rest is packed, scaled or no number at all.
FLOAT_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
# Bytes of the integer types in which weights are packed.
_BYTES = {"I32": 4, "U32": 4, "I16": 2, "U16": 2}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a checkpoint, from its header alone."""

    name: str  # without the component's prefix
    stored_name: str
    shard: Path
    dtype: str
    shape: tuple[int, ...]
    role: Role

    @property
    def elements(self) -> int:
        """Number of elements."""
        return prod(self.shape)

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
            everything = _read_index(directory)
        except OSError as error:
            # A name that no file system has, a directory without permission.
            raise CheckpointUnavailable(f"{directory}: cannot be read ({error})") from error
        self.prefix = _first_used_prefix(directory, everything, prefixes)
        self.tensors: dict[str, TensorEntry] = {
            name.removeprefix(self.prefix): TensorEntry(
                name.removeprefix(self.prefix), name, shard, dtype, shape, role_of(name)
            )
            for name, (shard, dtype, shape) in sorted(everything.items())
            if name.startswith(self.prefix)
        }
        self._everything = {name: prod(shape) for name, (_, _, shape) in everything.items()}
        self._sha256: dict[str, str] = {}

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
        entry = self.tensors[name]
        with _opened(entry.shard) as shard:
            tensor: torch.Tensor = shard.get_tensor(entry.stored_name)
        return tensor

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


def _sha256(tensor: torch.Tensor) -> str:
    import torch

    total = hashlib.sha256()
    if tensor.numel():
        # A view of the bytes: torch has dtypes (bfloat16) that numpy has not.
        total.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


@contextmanager
def _opened(shard: Path) -> Iterator[Any]:
    """A shard opened for reading; every way in which that fails as CheckpointUnavailable."""
    try:
        with safe_open(shard, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise CheckpointUnavailable(
            f"{shard}: cannot be read as safetensors ({error}); download the file again and compare its size and "
            "SHA-256 with the published ones"
        ) from error


def _read_index(directory: Path) -> dict[str, tuple[Path, str, tuple[int, ...]]]:
    """Tensor name → shard, dtype, shape, from the headers. Nothing in an index is trusted before it is checked."""
    if not directory.is_dir():
        raise CheckpointUnavailable(f"{directory}: no such directory; correct the path in the claim")
    index_file = directory / INDEX_NAME
    if index_file.is_file() and (directory / SINGLE_NAME).is_file():
        raise CheckpointUnavailable(
            f"{directory}: holds both {SINGLE_NAME} and {INDEX_NAME}, which may be two models; remove the "
            "one that is not loaded"
        )
    adapter = directory / ADAPTER_NAME
    if adapter.is_file():
        raise CheckpointUnavailable(f"{adapter}: an adapter changes the weights beside it; merge it into them first")
    shards = _shards_of_index(index_file) if index_file.is_file() else _shards_without_index(directory)
    found: dict[str, tuple[Path, str, tuple[int, ...]]] = {}
    for shard, listed in shards.items():
        with _opened(shard) as opened:
            stored = set(opened.keys())
            absent = sorted(listed - stored)
            if absent:
                raise CheckpointUnavailable(
                    f"{index_file}: lists {absent[0]!r} in {shard.name}, which does not hold it; download the "
                    "index and the shards of one revision"
                )
            for name in sorted(stored):
                if name in found:
                    raise CheckpointUnavailable(
                        f"{shard}: tensor {name!r} also stands in {found[name][0].name}; it must stand in one shard"
                    )
                view = opened.get_slice(name)
                found[name] = (shard, str(view.get_dtype()), tuple(view.get_shape()))
    if not found:
        raise CheckpointUnavailable(f"{directory}: its safetensors files hold no tensors")
    return found


def _shards_of_index(index_file: Path) -> dict[Path, set[str]]:
    try:
        loaded = json.loads(index_file.read_text(encoding="utf-8"))
        weight_map = loaded["weight_map"]
        pairs = [(str(name), shard) for name, shard in weight_map.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointUnavailable(f"{index_file}: expected a JSON object with a 'weight_map' ({error!r})") from error
    shards: dict[Path, set[str]] = {}
    for name, shard in pairs:
        # A shard is a plain file beside its index: anything else reaches out of the checkpoint.
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointUnavailable(
                f"{index_file}: tensor {name!r} names the shard {shard!r}; expected a .safetensors file beside it"
            )
        shards.setdefault(index_file.parent / shard, set()).add(name)
    for shard_path in shards:
        if len(shard_path.name) > 255 or not shard_path.is_file():
            raise CheckpointUnavailable(f"{index_file}: lists {shard_path.name}, which is absent; download it")
    return dict(sorted(shards.items()))


def _shards_without_index(directory: Path) -> dict[Path, set[str]]:
    single = directory / SINGLE_NAME
    files = [single] if single.is_file() else sorted(directory.glob("*.safetensors"))
    if not files:
        pickles = sorted(file.name for pattern in PICKLE_PATTERNS for file in directory.glob(pattern))
        if pickles:
            raise CheckpointUnavailable(
                f"{directory}: holds pickle files ({pickles[0]}), which can run code and are not read; convert with: "
                'python -c "import torch, safetensors.torch as s; '
                f"s.save_file(torch.load('{pickles[0]}', weights_only=True), 'model.safetensors')\""
            )
        raise CheckpointUnavailable(f"{directory}: holds no .safetensors file")
    for file in files:
        part = re.search(r"-of-0*(\d+)\.safetensors$", file.name)
        if part and int(part.group(1)) != len(files):
            raise CheckpointUnavailable(
                f"{directory}: holds {len(files)} of the {part.group(1)} files of {file.name}; fetch the rest"
            )
    return {file: set() for file in files}


def _first_used_prefix(directory: Path, names: dict[str, Any], prefixes: tuple[str, ...]) -> str:
    for prefix in prefixes:
        if any(name.startswith(prefix) for name in names):
            return prefix
    starts = sorted({".".join(name.split(".")[:2]) + "." for name in names})
    raise CheckpointUnavailable(
        f"{directory}: no tensor name starts with {' or '.join(repr(prefix) for prefix in prefixes)}; "
        f"names start with {', '.join(starts[:6])}: correct the prefix in the claim"
    )
