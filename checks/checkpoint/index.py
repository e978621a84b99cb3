"""What a checkpoint holds, without its weights: names, dtypes, shapes and byte ranges."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, NoReturn, Protocol

from checks.checkpoint.errors import CheckpointUnavailable

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")

# The largest header or index that is read, in bytes. A tensor takes about 100: this is room for 250,000 tensors,
# more than any released model has. safetensors itself reads four times as much, but a hostile header costs its reader
# twenty times its size in memory: measured were 1.6 GiB and 20 s for 100 MB, 0.5 GiB and 6 s for 25 MB.
LARGEST_JSON = 25_000_000
LONGEST_FILE_NAME = 255


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One stored tensor. `start` and `stop` are byte offsets from the beginning of the shard file."""

    name: str
    dtype: str  # as safetensors writes it: BF16, F32, F8_E4M3, I8, …
    shape: tuple[int, ...]
    shard: str
    start: int
    stop: int

    @property
    def elements(self) -> int:
        """Number of stored elements."""
        return prod(self.shape)


@dataclass(frozen=True, slots=True)
class Shard:
    """One safetensors file: its size in bytes, and the SHA-256 that its publisher states, if one does."""

    name: str
    size: int
    published_sha256: str | None = None


@dataclass(frozen=True)
class CheckpointIndex:
    """The tensors of a checkpoint and the files they stand in, in the order in which they lie there.

    `origin` is a directory or the name of a hub repository, `revision` the commit sha of a hub checkpoint, and
    `directory` where the shards lie on this disk, if they do.
    """

    origin: str
    shards: Mapping[str, Shard]
    tensors: Mapping[str, TensorInfo]
    revision: str | None = None
    directory: Path | None = None

    @cached_property
    def parameters(self) -> int:
        """Elements of all stored tensors."""
        return sum(tensor.elements for tensor in self.tensors.values())


class ByteSource(Protocol):
    """Where the bytes of a checkpoint's shards come from."""

    def read_into(self, shard: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the bytes of `shard` from `start`. Raises CheckpointUnavailable when that fails."""


def build_index(
    origin: str,
    shards: Iterable[tuple[Shard, Sequence[TensorInfo]]],
    listed: Mapping[str, frozenset[str]],
    revision: str | None = None,
    directory: Path | None = None,
) -> CheckpointIndex:
    """One index from the headers of all shards. `listed` says which tensors the index file promises in each.

    Raises CheckpointUnavailable for a tensor that stands in two shards, one that is promised and absent, and a
    checkpoint without tensors.
    """
    files: dict[str, Shard] = {}
    tensors: dict[str, TensorInfo] = {}
    for shard, header in shards:
        files[shard.name] = shard
        absent = sorted(listed[shard.name] - {tensor.name for tensor in header})
        if absent:
            raise CheckpointUnavailable(
                f"{origin}: {INDEX_NAME} lists {shown(absent[0])} in {shard.name}, which does not hold it; "
                "download the index and the shards of one revision"
            )
        for tensor in header:
            if tensor.name in tensors:
                raise CheckpointUnavailable(
                    f"{origin}: tensor {shown(tensor.name)} stands in {tensors[tensor.name].shard} and in "
                    f"{shard.name}; it must stand in one shard: remove the file that is not part of the checkpoint"
                )
            tensors[tensor.name] = tensor
    if not tensors:
        raise CheckpointUnavailable(f"{origin}: its safetensors files hold no tensors; name the checkpoint itself")
    return CheckpointIndex(origin, files, tensors, revision, directory)


def equal_shards(one: CheckpointIndex, other: CheckpointIndex) -> frozenset[str]:
    """Which tensors are identical for certain, without reading a byte: those in shards of equal published digest.

    A tensor counts only if both headers agree on where it stands and what it is.
    """
    digests = {name: (shard.published_sha256, shard.size) for name, shard in other.shards.items()}
    equal = set()
    for name, tensor in one.tensors.items():
        shard, twin = one.shards[tensor.shard], other.tensors.get(name)
        if shard.published_sha256 is None or twin is None:
            continue
        same_file = digests[twin.shard] == (shard.published_sha256, shard.size)
        if same_file and replace(twin, shard=tensor.shard) == tensor:
            equal.add(name)
    return frozenset(equal)


def may_read_from_mirror(original: CheckpointIndex, mirror: CheckpointIndex) -> bool:
    """Does a mirror hold the very shards of the original, by published digest? A shard without a digest says no."""
    shards = [*original.shards.values(), *mirror.shards.values()]
    stated = all(shard.published_sha256 is not None for shard in shards)
    return bool(shards) and stated and dict(original.shards) == dict(mirror.shards)


def shards_of_weight_map(text: bytes, where: str) -> dict[str, frozenset[str]]:
    """Which shard holds which tensors, as model.safetensors.index.json says. `where` names that file in errors.

    A shard is a plain .safetensors file beside its index: anything else would reach out of the checkpoint.
    Raises CheckpointUnavailable for that, for what is no such JSON, and for a tensor listed twice.
    """
    weight_map = load_json_object(text, where).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointUnavailable(
            f"{where}: expected a JSON object with a 'weight_map' from tensor to shard, found {shown(weight_map)}; "
            "download the file again"
        )
    shards: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not is_plain_file_name(shard) or not shard.endswith(".safetensors"):
            raise CheckpointUnavailable(
                f"{where}: tensor {shown(name)} names the shard {shown(shard)}; expected a .safetensors file "
                "beside the index; correct the index or download it again"
            )
        shards.setdefault(shard, set()).add(name)
    return {shard: frozenset(shards[shard]) for shard in sorted(shards)}


def shards_without_index(files: Iterable[str], where: str) -> dict[str, frozenset[str]]:
    """Which of `files` (plain names) make up a checkpoint that has no index file: one, or all there are.

    Raises CheckpointUnavailable when there is none, when only pickles are there, and when a numbered shard is absent.
    """
    names = sorted(files)
    shards = [name for name in names if name.endswith(".safetensors")]
    if SINGLE_NAME in shards:
        shards = [SINGLE_NAME]
    if not shards:
        _refuse_without_safetensors([name for name in names if name.endswith(PICKLE_SUFFIXES)], where)
    for shard in shards:
        series = re.fullmatch(r"(.*-)(\d{5})(-of-(\d{5})\.safetensors)", shard)
        if series is None:
            continue
        expected = (f"{series[1]}{number:05d}{series[3]}" for number in range(1, int(series[4]) + 1))
        absent = next((name for name in expected if name not in shards), None)
        if absent is not None:
            raise CheckpointUnavailable(f"{where}: holds {shard} but not {absent}; download the absent shards")
    return {shard: frozenset() for shard in shards}


def _refuse_without_safetensors(pickles: Sequence[str], where: str) -> NoReturn:
    if not pickles:
        raise CheckpointUnavailable(
            f"{where}: holds no .safetensors file; name the directory or repository that holds the weights"
        )
    # The name goes into a command that someone may run: only a harmless one is repeated.
    pickle = next((name for name in pickles if re.fullmatch(r"[\w.-]+", name, re.ASCII)), "FILE")
    raise CheckpointUnavailable(
        f"{where}: holds pickle files ({shown(pickles[0])}), which can run code and are not read; in a local copy "
        "convert each with: "
        'python -c "import torch, safetensors.torch as s; '
        f"s.save_file({{k: v.clone() for k, v in torch.load('{pickle}', weights_only=True).items()}}, "
        f"'{pickle.rsplit('.', 1)[0]}.safetensors')\" and give the claim that path"
    )


def is_plain_file_name(name: str) -> bool:
    """Is this the name of a file in the same directory, and nothing that leads elsewhere?"""
    return name not in ("", ".", "..") and not set(name) & set("/\\") and is_plain_text(name, LONGEST_FILE_NAME)


def is_plain_text(text: str, longest: int) -> bool:
    """Can this stand in a report: at most `longest` characters, no line breaks, NULs, escapes or half characters?"""
    return len(text) <= longest and text.isprintable()


def shown(value: object) -> str:
    """A value from a file as it may stand in a message: quoted, escaped, and cut when long."""
    text = ascii(value[:200]) if isinstance(value, str | bytes) else reprlib.repr(value)
    text = text.encode("ascii", "backslashreplace").decode()
    return text if len(text) <= 120 else f"{text[:117]}..."


def load_json_object(text: bytes, where: str) -> dict[str, Any]:
    """A JSON object in UTF-8. Raises CheckpointUnavailable, naming `where`, for anything else and for a double key."""
    try:
        loaded = json.loads(text.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = "too deeply nested" if isinstance(error, RecursionError) else shown(str(error)).strip("'\"")
        raise CheckpointUnavailable(f"{where}: expected a JSON object: {reason}; download the file again") from error
    if not isinstance(loaded, dict):
        raise CheckpointUnavailable(f"{where}: expected a JSON object, found {shown(loaded)}; download the file again")
    return loaded


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {shown(key)} stands twice")
        found[key] = value
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")
