"""The repository org/name of the loopback hub: how it is opened, read and refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.hub import HubSource, read_hub_index
from checks.checkpoint.hub_failures import Patience
from checks.checkpoint.index import Shard
from checks.checkpoint.local import LocalSource

Tensors = dict[str, torch.Tensor]
HASTY = Patience(timeout=5.0, attempts=3, pause=0.001, longest_wait=2.0)
NAME = "org/name"


def failure(kind: type[CheckpointUnavailable], action: Callable[[], object]) -> str:
    """The message of this very kind of failure, which the action must raise."""
    with pytest.raises(CheckpointUnavailable) as caught:
        action()
    assert type(caught.value) is kind
    return str(caught.value)


def read(source: HubSource | LocalSource, shard: str, start: int, stop: int) -> bytes:
    """A range of a shard's bytes."""
    buffer = bytearray(stop - start)
    source.read_into(shard, start, memoryview(buffer))
    return bytes(buffer)


def source_of(commit: str) -> tuple[HubSource, Shard]:
    """A source for org/name, and its first shard."""
    index = read_hub_index(NAME, commit, HASTY)
    return HubSource(index, HASTY), next(iter(index.shards.values()))
