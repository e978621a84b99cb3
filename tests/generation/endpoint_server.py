"""An OpenAI-compatible server on this machine: it answers as it is told, and fails as it is told."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from time import sleep
from typing import Any

from tests.loopback_server import Fault, LoopbackServer, QuietHandler, next_fault

Answering = Callable[[str], str]


@dataclass(kw_only=True)
class EndpointFault(Fault):
    """What goes wrong instead of an answer of the model."""

    status: int | None = 200
    drip: float = 0.0  # seconds between the bytes of the body


class LoopbackEndpoint:
    """Serves models by name: a function from prompt or message to answer. `chat` and `completions`: what is offered."""

    def __init__(self, models: Mapping[str, Answering], *, chat: bool = True, completions: bool = True) -> None:
        self.models = dict(models)
        self.routes = {"/v1/chat/completions": chat, "/v1/completions": completions}
        self.faults: list[EndpointFault] = []
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.lock = threading.Lock()
        self.server = LoopbackServer(_Handler, self)
        self.address = f"{self.server.address}/v1"

    def fail(self, **how: Any) -> None:
        """Lets requests fail, see EndpointFault."""
        self.faults.append(EndpointFault(**how))

    def close(self) -> None:
        """Ends the server."""
        self.server.close()


@contextmanager
def serving(models: Mapping[str, Answering], **offered: bool) -> Iterator[LoopbackEndpoint]:
    """A server of these models, closed at the end."""
    endpoint = LoopbackEndpoint(models, **offered)
    try:
        yield endpoint
    finally:
        endpoint.close()


class _Handler(QuietHandler):
    drip = 0.0

    def do_POST(self) -> None:  # noqa: N802
        endpoint: LoopbackEndpoint = self.server.owner
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with endpoint.lock:
            endpoint.requests.append((self.path, self.lower_headers(), body))
            fault = next_fault(endpoint.faults, self.path)
        self.drip = fault.drip if fault else 0.0
        if fault is not None:
            self.fails(fault)
        elif not endpoint.routes.get(self.path, False):
            self.answer(404, b'{"detail": "Not Found"}')
        elif body.get("model") not in endpoint.models:
            self.answer(404, b'{"error": {"message": "The model does not exist", "code": "model_not_found"}}')
        else:
            self.answer(200, json.dumps(self.made(body)).encode())

    def made(self, body: dict[str, Any]) -> dict[str, Any]:
        answer = self.server.owner.models[body["model"]]
        if "messages" in body:
            message = {"role": "assistant", "content": answer(body["messages"][-1]["content"])}
            return {"object": "chat.completion", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}
        choice = {"index": 0, "text": answer(body["prompt"]), "finish_reason": "length"}
        return {"object": "text_completion", "choices": [choice]}

    def answer(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        super().answer(status, body, {"content-type": "application/json", **(headers or {})})

    def write(self, piece: bytes) -> int:
        if not self.drip:
            return super().write(piece)
        for position in range(len(piece)):
            super().write(piece[position : position + 1])
            sleep(self.drip)
        return len(piece)
