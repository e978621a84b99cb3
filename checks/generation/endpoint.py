"""An OpenAI-compatible endpoint as a text model, asked patiently and within bounds."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from checks.checkpoint.index import shown
from checks.generation.text_model import (
    EndpointBusy,
    EndpointRefused,
    EndpointTimedOut,
    EndpointUnreachable,
    MalformedAnswer,
    ModelUnavailable,
    NotOffered,
    bounded,
    kept,
)

KEY_VARIABLE, BASE_VARIABLE = "OPENAI_API_KEY", "OPENAI_BASE_URL"
OPENAI = "https://api.openai.com"
LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})
LARGEST_BODY = 1_000_000  # bytes
SEED = 0
PASSING = frozenset({408, 425, 500, 502, 503, 504})
NO_SUCH_ROUTE = frozenset({404, 405, 501})

# OpenAI's words for a model asked in the other form: "This is (not) a chat model and (thus) not supported in …".
_OTHER_FORM = re.compile(r"\ba chat model\b.{0,40}\bnot supported\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait for an endpoint, in seconds, and how often to ask the same."""

    connect: float = 10.0
    answer: float = 120.0  # for a whole answer
    attempts: int = 4
    pause: float = 0.5  # before the second attempt; doubled before each further one
    longest_wait: float = 60.0  # an endpoint that asks for more is not waited for
    waiting: float = 300.0  # in all, over all questions


class EndpointTextModel:
    """Asks `/completions` and `/chat/completions` below an address, at temperature 0 and with a fixed seed.

    An endpoint may still answer differently a second time: its hardware, batches and versions are its own. The key of
    OPENAI_API_KEY goes to OpenAI, to this machine and to the server of OPENAI_BASE_URL, and nowhere else: a claim file
    names the endpoint and must not be able to collect keys. It stands in no record and no message.
    """

    def __init__(
        self,
        endpoint: str,
        model: str | None,
        name: str,
        offline: bool = False,
        patience: Patience = Patience(),
        environment: Mapping[str, str] = os.environ,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.endpoint = endpoint.rstrip("/")
        self.model = model
        self.name = name
        self._offline = offline
        self._patience = patience
        self._sleep = sleep
        self._waited = 0.0
        self._failure: ModelUnavailable | None = None
        self._client: Any = None
        self._base_url = environment.get(BASE_VARIABLE)
        key = environment.get(KEY_VARIABLE, "").strip()
        # A key that is no header could end up in the client's complaint about it.
        self._key = key if key and key.isascii() and key.isprintable() and self._may_have_key() else None

    @property
    def description(self) -> dict[str, Any]:
        """What answered and how it was asked; the address without user, password and query."""
        return {
            "model": self.name,
            "runs": f"at {_origin(self.endpoint)}{urlsplit(self.endpoint).path}",
            "model_there": self.model,
            "decoding": f"temperature 0, seed {SEED}",
        }

    def complete(self, text: str, tokens: int) -> str:
        """What follows `text` by `/completions`. Raises NotOffered, ModelUnavailable."""
        return self._ask("/completions", {"prompt": text}, tokens, _completion_text)

    def complete_all(self, texts: Sequence[str], tokens: int) -> list[str]:
        """What follows each of the texts, asked one after the other. Raises NotOffered, ModelUnavailable."""
        return [self.complete(text, tokens) for text in texts]

    def reply(self, message: str, tokens: int) -> str:
        """The reply to a message by `/chat/completions`. Raises NotOffered, ModelUnavailable."""
        messages = [{"role": "user", "content": message}]
        return self._ask("/chat/completions", {"messages": messages}, tokens, _chat_text)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def _ask(self, route: str, content: dict[str, Any], tokens: int, read: Callable[[Any], str | None]) -> str:
        if self._failure is not None:
            raise type(self._failure)(str(self._failure))
        body = {**content, "max_tokens": bounded(tokens), "temperature": 0, "seed": SEED, "n": 1, "stream": False}
        if self.model is not None:
            body["model"] = self.model
        try:
            data = self._post(route, body)
            text = read(data)
            if text is None:
                raise self._malformed(route, f"no text in {shown(data)}")
        except NotOffered:
            raise
        except ModelUnavailable as error:
            # One dead endpoint is one wait, not one for each of a hundred questions.
            self._failure = error
            raise
        return kept(text)

    def _post(self, route: str, body: dict[str, Any]) -> Any:
        """The JSON that answers a request, asked again after failures that may pass."""
        self._require_address()
        attempt, pause = 1, self._patience.pause
        while True:
            failure, wait = self._attempt(route, body)
            if not isinstance(failure, ModelUnavailable):
                return failure
            if wait is None or attempt >= self._patience.attempts:
                raise failure
            wait = max(wait, pause)
            if wait > self._patience.longest_wait or self._waited + wait > self._patience.waiting:
                raise EndpointBusy(f"{failure}; waiting {wait:.0f} s more is beyond this suite's patience")
            self._waited += wait
            self._sleep(wait)
            attempt, pause = attempt + 1, 2 * pause

    def _attempt(self, route: str, body: dict[str, Any]) -> tuple[Any, float | None]:
        """One request: what it returned, or a failure with the seconds after which to ask again (None: never)."""
        from huggingface_hub.utils import httpx  # type: ignore[attr-defined]

        where = f"{self.name}: {self._place(route)}"
        try:
            status, headers, text = self._send(httpx, route, body)
        except httpx.TimeoutException:
            return EndpointTimedOut(f"{where} did not answer in time; try again when it is less busy"), 0.0
        except httpx.UnsupportedProtocol as error:
            return EndpointUnreachable(f"{where} is no address ({shown(str(error))}); correct behavior.endpoint"), None
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            return EndpointUnreachable(
                f"{where} cannot be reached ({self._without_key(str(error))}); check behavior.endpoint, the network "
                "and that the server runs"
            ), 0.0
        except MalformedAnswer as error:
            return error, None
        if status == 200:
            try:
                return json.loads(text), None
            except (ValueError, RecursionError):
                return self._malformed(route, f"no JSON but {self._without_key(text)}"), None
        return self._meaning(status, headers, text, route)

    def _send(self, httpx: Any, route: str, body: dict[str, Any]) -> tuple[int, Mapping[str, str], str]:
        """Status, headers and bounded body. A server that drips bytes is cut off like a silent one."""
        if self._client is None:
            timeout = httpx.Timeout(self._patience.answer, connect=self._patience.connect)
            self._client = httpx.Client(timeout=timeout, follow_redirects=False)
        headers = {"accept-encoding": "identity"}
        if self._key:
            headers["authorization"] = f"Bearer {self._key}"
        end = time.monotonic() + self._patience.answer
        with self._client.stream("POST", f"{self.endpoint}{route}", json=body, headers=headers) as response:
            data = bytearray()
            for chunk in response.iter_bytes():
                data += chunk
                if len(data) > LARGEST_BODY:
                    raise self._malformed(route, f"more than {LARGEST_BODY} bytes")
                if time.monotonic() > end:
                    raise httpx.ReadTimeout("the answer was not complete in time")
            return response.status_code, response.headers, data.decode("utf-8", "replace")

    def _meaning(
        self, status: int, headers: Mapping[str, str], text: str, route: str
    ) -> tuple[ModelUnavailable, float | None]:
        where = f"{self.name}: {self._place(route)}"
        said = self._without_key(_message(text))
        if status in (401, 403):
            what = (
                f"set {KEY_VARIABLE}" if self._may_have_key() else f"set {BASE_VARIABLE} to it, so that it gets a key"
            )
            return EndpointRefused(f"{where} refuses the key or its lack (HTTP {status}); {what}"), None
        if status == 429:
            if "quota" in text[:LARGEST_BODY].lower():
                return EndpointRefused(f"{where}: the account has no quota left ({said})"), None
            return EndpointBusy(f"{where} limits the rate ({said}); try again later"), _retry_after(headers)
        if status in PASSING:
            return EndpointUnreachable(f"{where} fails (HTTP {status}, {said}); try again later"), _retry_after(headers)
        if status in NO_SUCH_ROUTE | {400} and _OTHER_FORM.search(text[:2000]):
            return NotOffered(f"{where} is not offered for this model ({said})"), None
        names_model = re.search(r"\bmodel\b", text[:2000], re.IGNORECASE) is not None
        if status in NO_SUCH_ROUTE and not names_model:
            return NotOffered(f"{where} is not offered (HTTP {status})"), None
        if status == 400 and "chat template" in text[:2000].lower():
            return NotOffered(f"{where}: the model has no chat template ({said})"), None
        if 300 <= status < 400:
            return EndpointRefused(f"{where} sends elsewhere (HTTP {status}); give the address that it names"), None
        return EndpointRefused(
            f"{where} refuses the request (HTTP {status}, {said}); check behavior.model and what the server supports"
        ), None

    def _may_have_key(self) -> bool:
        parts = urlsplit(self.endpoint)
        trusted = {OPENAI, _origin(self._base_url)} if self._base_url else {OPENAI}
        return parts.hostname in LOOPBACK or (parts.scheme == "https" and _origin(self.endpoint) in trusted)

    def _require_address(self) -> None:
        parts = urlsplit(self.endpoint)
        if self._offline and parts.hostname not in LOOPBACK:
            raise EndpointUnreachable(
                f"{self.name}: --offline is set; leave it out, or serve the model on this machine"
            )
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username is not None:
            raise EndpointRefused(
                f"{self.name}: behavior.endpoint must be http(s)://host[:port]/v1, without user, password or query"
            )

    def _malformed(self, route: str, what: str) -> MalformedAnswer:
        return MalformedAnswer(
            f"{self.name}: {self._place(route)} sent {what}; expected the answer of an OpenAI-compatible server, see "
            "that the address ends in /v1"
        )

    def _place(self, route: str) -> str:
        return f"{_origin(self.endpoint)}{urlsplit(self.endpoint).path}{route}"

    def _without_key(self, text: str) -> str:
        return shown(text.replace(self._key, "…") if self._key else text)


def _origin(address: str) -> str:
    """Scheme, host and port of an address; nothing that could be a secret."""
    try:
        parts = urlsplit(address)
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return "an address that cannot be read"
    return f"{parts.scheme}://{parts.hostname or ''}{port}"


def _message(text: str) -> str:
    """What an error's body says, by the protocol's form or as it stands."""
    try:
        error = json.loads(text)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError, RecursionError):
        return text


def _retry_after(headers: Mapping[str, str]) -> float:
    """Seconds of Retry-After, as a number or a date; 0 without one."""
    value = headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0


def _choice(data: Any) -> dict[str, Any] | None:
    choices = data.get("choices") if isinstance(data, dict) else None
    first = choices[0] if isinstance(choices, list) and choices else None
    return first if isinstance(first, dict) else None


def _completion_text(data: Any) -> str | None:
    choice = _choice(data)
    text = choice.get("text") if choice else None
    return text if isinstance(text, str) else None


def _chat_text(data: Any) -> str | None:
    """The content of the message, or the refusal that stands beside it; "" when reasoning used up the tokens."""
    choice = _choice(data)
    message = choice.get("message") if choice else None
    if not isinstance(message, dict):
        return None
    for name in ("content", "refusal"):
        if isinstance(message.get(name), str):
            return str(message[name])
    return "" if choice and choice.get("finish_reason") == "length" else None
