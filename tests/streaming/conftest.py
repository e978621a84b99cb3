"""Two checkpoints in memory for the tests of what reads them."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

pytest.register_assert_rewrite("tests.streaming.memory")

from tests.streaming.memory import OURS, THEIRS, Memory, make  # noqa: E402


@pytest.fixture
def ours() -> Memory:
    """The candidate, in memory."""
    return Memory(*(make(100 * k, spec) for k, spec in enumerate(OURS)), origin="candidate", gap=3)


@pytest.fixture
def theirs() -> Memory:
    """The reference, in memory."""
    return Memory(*(make(1000 * k + 7, spec) for k, spec in enumerate(THEIRS)), origin="reference")


@pytest.fixture
def no_thread_is_left() -> Iterator[None]:
    """Fails a test that leaves a thread behind."""
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before
