"""A repository on the loopback hub for the tests of what is read from a hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.loopback_repository import NAME, Tensors

Save = Callable[..., Path]


@pytest.fixture
def tensors(llama_tensors: Callable[..., Tensors]) -> Tensors:
    """The tensors of a very small Llama."""
    return llama_tensors(hidden_size=16, intermediate_size=24, vocab_size=20, head_dim=4, num_hidden_layers=2)


@pytest.fixture
def sharded(hub: Any, tensors: Tensors, save_checkpoint: Save) -> Path:
    """A directory of three shards that the hub serves as org/name."""
    directory = save_checkpoint("sharded", tensors, shards=3)
    hub.add_directory(NAME, directory)
    return directory


@pytest.fixture
def commit(hub: Any, sharded: Path) -> str:
    """The commit of org/name."""
    return str(hub.repositories[NAME].commit)
