"""Tensors of equal bytes, under any names, and why any model could have some of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence, Set

from checks.checkpoint.checkpoint import Checkpoint, torch_dtype

# Tensors up to this many elements are read whole where their beginning might do.
SMALL = 1 << 20


def equal_tensors(
    sides: Sequence[Checkpoint], digests: Sequence[Mapping[str, str]], published: Set[str]
) -> list[tuple[str, str]]:
    """Tensors of equal bytes and dtype, shapes ignored, each of the candidate's with one counterpart.

    `digests`: SHA-256 by name, of both sides, as far as they are known. `published`: tensors that are equal for
    certain, by stored names that both sides have.
    """
    candidate, reference = sides
    stored = {entry.stored_name: name for name, entry in reference.tensors.items()}
    by_digest: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, entry in reference.tensors.items():
        if name in digests[1]:
            by_digest[entry.dtype, digests[1][name]].append(name)
    pairs = []
    for name, entry in candidate.tensors.items():
        names = by_digest.get((entry.dtype, digests[0][name])) if name in digests[0] else None
        if entry.stored_name in published:
            pairs.append((name, stored[entry.stored_name]))
        elif names:
            pairs.append((name, name if name in names else names[0]))
    return pairs


def why_ordinary(checkpoint: Checkpoint, name: str) -> str | None:
    """Why could any model have this tensor? Read as far as that takes. Raises CheckpointUnavailable."""
    import torch

    from checks.statistics.ordinary import head_elements, may_be_ordinary, ordinary_reason

    # 64-bit integers index things (positions, relative windows); packed weights have fewer bits.
    if checkpoint.tensors[name].dtype in ("I64", "U64"):
        return "integer indices"
    info = checkpoint.tensors[name].stored
    dtype = torch_dtype(info.dtype)
    if info.elements > SMALL and info.stop - info.start == info.elements * dtype.itemsize:
        buffer = bytearray(head_elements(info.shape) * dtype.itemsize)
        checkpoint.source.read_into(info.shard, info.start, memoryview(buffer))
        if not may_be_ordinary(torch.frombuffer(buffer, dtype=dtype), info.shape, if_unseen=True):
            return None
    return ordinary_reason(checkpoint.read(name))
