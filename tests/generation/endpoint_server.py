"""An OpenAI-compatible server on this machine: it answers as it is told, and fails as it is told."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from time import sleep
from typing import Any

Answering = Callable[[str], str]


@dataclass
class Fault:
    """What goes wrong for the next `times` requests (-1: all)."""

    times: int = 1
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b"{}"
    wait: float = 0.0  # seconds before the answer
    drip: float = 0.0  # seconds between the bytes of the body
    close: bool = False  # no answer at all


class LoopbackEndpoint:
    """Serves models by name: a function from prompt or message to answer. `chat` and `completions`: what is offered."""

    def __init__(self, models: Mapping[str, Answering], *, chat: bool = True, completions: bool = True) -> None:
        self.models = dict(models)
        self.routes = {"/v1/chat/completions": chat, "/v1/completions": completions}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.lock = threading.Lock()
        self.server = _Server(self)
        self.address = f"http://127.0.0.1:{self.server.server_port}/v1"

    def fail(self, **how: Any) -> None:
        """Lets requests fail, see Fault."""
        self.faults.append(Fault(**how))

    def close(self) -> None:
        """Ends the server."""
        self.server.shutdown()
        self.server.server_close()


@contextmanager
def serving(models: Mapping[str, Answering], **offered: bool) -> Iterator[LoopbackEndpoint]:
    """A server of these models, closed at the end."""
    endpoint = LoopbackEndpoint(models, **offered)
    try:
        yield endpoint
    finally:
        endpoint.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, endpoint: LoopbackEndpoint) -> None:
        self.endpoint = endpoint
        super().__init__(("127.0.0.1", 0), _Handler)
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, *arguments: Any) -> None:
        """Nothing on the terminal."""

    def do_POST(self) -> None:
        endpoint = self.server.endpoint
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with endpoint.lock:
            endpoint.requests.append((self.path, {name.lower(): value for name, value in self.headers.items()}, body))
            fault = next((fault for fault in endpoint.faults if fault.times), None)
            if fault is not None:
                fault.times -= fault.times > 0
        if fault is not None:
            sleep(fault.wait)
            if fault.close:
                self.close_connection = True
            else:
                self.answer(fault.status, fault.body, fault.headers, fault.drip)
        elif not endpoint.routes.get(self.path, False):
            self.answer(404, b'{"detail": "Not Found"}')
        elif body.get("model") not in endpoint.models:
            self.answer(404, b'{"error": {"message": "The model does not exist", "code": "model_not_found"}}')
        else:
            self.answer(200, json.dumps(self.made(body)).encode())

    def made(self, body: dict[str, Any]) -> dict[str, Any]:
        answer = self.server.endpoint.models[body["model"]]
        if "messages" in body:
            message = {"role": "assistant", "content": answer(body["messages"][-1]["content"])}
            return {"object": "chat.completion", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
        choice = {"index": 0, "text": answer(body["prompt"]), "finish_reason": "length"}
        return {"object": "text_completion", "choices": [choice]}

    def answer(self, status: int, body: bytes, headers: Mapping[str, str] | None = None, drip: float = 0.0) -> None:
        self.send_response(status)
        for name, value in {"content-type": "application/json", **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        for position in range(0, len(body), 1 if drip else max(1, len(body))):
            self.wfile.write(body[position : position + (1 if drip else len(body))])
            sleep(drip)
