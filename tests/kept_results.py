"""What a store holds, for tests that count it."""

from __future__ import annotations

import json
from pathlib import Path

from checks.evidence.store import Store


def kept_results(directory: Path, statistic: str | None = None) -> int:
    """How many results does a store give, of any statistic or of one?"""
    keys = set()
    for file in directory.glob("??/*.json"):
        try:
            keys.add(tuple(json.loads(file.read_bytes())["key"]))
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            continue  # no result, which is for the store to tell
    store = Store(directory)
    texts = [key for key in keys if key and all(isinstance(part, str) for part in key)]
    wanted = [key for key in texts if statistic is None or statistic in key[2:3]]
    return sum(store.get(key) is not None for key in wanted)
