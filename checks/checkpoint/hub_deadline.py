"""Deadlines for a hub that keeps sending and never gets done: a time-out between two bytes does not end that.

A body must bring so many bytes in each span of time, as git's http.lowSpeedLimit and http.lowSpeedTime ask for, so that
any transfer ends: at the least that Patience accepts, 16 MiB take an hour. What comes before a body, and a listing, is
small, and must be there after one such span.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from checks.checkpoint.hub_failures import HubTooSlow, Patience

Answer = TypeVar("Answer")

_ADVICE = (
    "try again later, give it more HF_HUB_DOWNLOAD_TIMEOUT, set HF_ENDPOINT to a faster hub, or download the "
    "checkpoint and give its path"
)


class Progress:
    """Watches the bytes of one body."""

    def __init__(self, patience: Patience, where: str) -> None:
        self._patience = patience
        self._where = where
        self._came, self._since = 0, time.monotonic()

    def add(self, size: int) -> None:
        """So many more bytes came. Raises HubTooSlow at the end of a span of time that brought too few."""
        self._came += size
        now = time.monotonic()
        if now - self._since < self._patience.progress_time:
            return
        if self._came < self._patience.least_progress:
            raise HubTooSlow(
                f"{self._where}: {self._came} bytes came in {now - self._since:.0f} s, expected "
                f"{self._patience.least_progress} at least; {_ADVICE}"
            )
        self._came, self._since = 0, now


def answered(ask: Callable[[], Answer], patience: Patience, where: str, undo: Callable[[Answer], None]) -> Answer:
    """What `ask` returns. Raises what it raises, and HubTooSlow if it takes longer than `patience.answer`.

    Nothing else ends a request whose header lines trickle: it is left to a thread of its own, which calls `undo` with
    the answer, should it come after all.
    """
    asked: Future[Answer] = Future()

    def run() -> None:
        try:
            asked.set_result(ask())
        except BaseException as error:  # noqa: BLE001 - whatever it is, whoever waits raises it
            asked.set_exception(error)

    def too_late(late: Future[Answer]) -> None:
        if late.exception() is None:
            undo(late.result())

    threading.Thread(target=run, daemon=True, name=f"asking for {where}").start()
    try:
        return asked.result(patience.answer)
    except TimeoutError:
        if asked.done():  # its own
            raise
        asked.add_done_callback(too_late)
        raise HubTooSlow(f"{where}: no whole answer came in {patience.answer:g} s; {_ADVICE}") from None
