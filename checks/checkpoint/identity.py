"""Which checkpoint is this, without reading its weights: the key under which a store keeps what was measured on it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from checks.checkpoint.index import CheckpointIndex
from checks.checkpoint.local import LocalIndex


def identity_of(index: CheckpointIndex, prefix: str = "", config: Mapping[str, Any] | None = None) -> str:
    """One line that changes whenever a shard, the revision, the component or the configuration does.

    A shard on this disk counts by its device, inode, size, times of modification and change, and header, as they were
    when the index was read, since whoever can replace it need not publish a digest; one on the hub by commit, size and
    published SHA-256. `prefix`: of the component's tensors. `config`: config.json, of which the tensors' roles depend.
    """
    identities = index.identities if isinstance(index, LocalIndex) else {}
    shards = {
        name: identities[name].key if name in identities else f"{shard.size} {shard.published_sha256}"
        for name, shard in index.shards.items()
    }
    # Where it lies is no part of what it is, but a commit says more of a shard without digest than its size does.
    place = None if index.revision is None else [index.origin, index.revision]
    text = json.dumps([place, prefix, shards, config], sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"{index.origin}@{index.revision}:{digest}" if index.revision is not None else f"local:{digest}"
