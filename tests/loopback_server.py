"""An HTTP server on this machine, in threads of the tests' process: it says nothing, and fails as it is told."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from time import sleep
from typing import Any, TypeVar


@dataclass(kw_only=True)
class Fault:
    """What goes wrong for the next `times` requests (-1: all) whose path contains `where`."""

    where: str = ""
    times: int = 1
    status: int | None = None  # of the answer that is sent instead of the right one
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b"{}"
    wait: float = 0.0  # seconds before the answer
    close: bool = False  # no answer at all


AnyFault = TypeVar("AnyFault", bound=Fault)


def next_fault(faults: Iterable[AnyFault], path: str) -> AnyFault | None:
    """The first fault that is still to come and meets this path, counted as used; None if there is none."""
    fault = next((fault for fault in faults if fault.times and fault.where in path), None)
    if fault is not None:
        fault.times -= fault.times > 0
    return fault


class LoopbackServer(ThreadingHTTPServer):
    """Serves at a free port of 127.0.0.1 until it is closed; `owner` is what its handlers answer for."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, handler: type[BaseHTTPRequestHandler], owner: Any) -> None:
        self.owner = owner
        super().__init__(("127.0.0.1", 0), handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is part of the tests."""

    def close(self) -> None:
        """Ends the server."""
        self.shutdown()
        self.server_close()


class QuietHandler(BaseHTTPRequestHandler):
    """A handler that keeps connections open and writes nothing to the terminal."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: LoopbackServer

    def log_message(self, *arguments: Any) -> None:
        """Nothing on the terminal."""

    def lower_headers(self) -> dict[str, str]:
        """The headers of the request, their names in lower case."""
        return {name.lower(): value for name, value in self.headers.items()}

    def fails(self, fault: Fault) -> bool:
        """Lets a request fail as the fault says; False: it is still to be answered."""
        sleep(fault.wait)
        if fault.close:
            self.close_connection = True
        elif fault.status is not None:
            self.answer(fault.status, fault.body, fault.headers)
        else:
            return False
        return True

    def answer(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        """Sends an answer with its length, and without its body if that was asked for (HEAD)."""
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.write(body)

    def write(self, piece: bytes) -> int:
        """Sends bytes of a body."""
        self.wfile.write(piece)
        return len(piece)
