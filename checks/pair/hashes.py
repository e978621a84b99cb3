"""The hashes of one checkpoint's tensors that no pass over a pair took."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace

from checks.checkpoint.checkpoint import Checkpoint
from checks.pair.ledger import Ledger


def hash_missing(checkpoint: Checkpoint, hashes: Ledger[str], needless: Set[str] = frozenset()) -> None:
    """Read and hash the tensors whose hash is missing, apart from those that are `needless` (stored names).

    As when the worker died that another one had left them to. Raises CheckpointUnavailable.
    """
    from checks.streaming.stream import stream_pair

    names = {checkpoint.tensors[name].stored_name: name for (name,) in hashes.missing}
    tensors = {name: one for name, one in checkpoint.index.tensors.items() if name in names and name not in needless}
    if not tensors:
        return
    index, nothing = replace(checkpoint.index, tensors=tensors), replace(checkpoint.index, tensors={})
    for result in stream_pair(index, nothing, (checkpoint.source, checkpoint.source), []):
        if result.candidate is not None and result.candidate_sha256 is not None:
            hashes.add((names[result.candidate],), result.candidate_sha256)
