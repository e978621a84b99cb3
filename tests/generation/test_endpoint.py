"""The endpoint client against a server that speaks the protocol, and against all the ways in which one fails."""

from __future__ import annotations

import json
from collections.abc import Iterator
from email.utils import formatdate
from time import time
from typing import Any

import pytest

from checks.checkpoint.errors import CheckpointUnavailable
from checks.generation.endpoint import LARGEST_BODY, EndpointTextModel, Patience
from checks.generation.text_model import (
    LONGEST_ANSWER,
    EndpointBusy,
    EndpointRefused,
    EndpointTimedOut,
    EndpointUnreachable,
    MalformedAnswer,
    ModelUnavailable,
    NotOffered,
)
from tests.generation.endpoint_server import LoopbackEndpoint, serving

KEY = "sk-secret-0123456789"
QUICK = Patience(connect=20.0, answer=20.0, attempts=3, pause=0.0, longest_wait=10.0, waiting=15.0)


@pytest.fixture
def endpoint() -> Iterator[LoopbackEndpoint]:
    with serving({"model": lambda text: f"answer to {text}"}) as served:
        yield served


def client(address: str, model: str | None = "model", **more: Any) -> EndpointTextModel:
    return EndpointTextModel(address, model, "candidate", **{"patience": QUICK, "environment": {}, **more})


def test_both_forms_are_asked_deterministically(endpoint: LoopbackEndpoint) -> None:
    with client(endpoint.address + "/") as model:
        assert model.complete("one", 6) == "answer to one"
        assert model.reply("two", 7) == "answer to two"
    (first, _, completion), (second, _, chat) = endpoint.requests
    assert (first, second) == ("/v1/completions", "/v1/chat/completions")
    assert completion["prompt"] == "one"
    assert chat["messages"] == [{"role": "user", "content": "two"}]
    for body, tokens in ((completion, 6), (chat, 7)):
        assert (body["temperature"], body["seed"], body["max_tokens"], body["stream"]) == (0, 0, tokens, False)


def test_the_key_goes_to_this_machine_and_into_no_record(endpoint: LoopbackEndpoint) -> None:
    endpoint.fail(status=400, body=f'{{"error": {{"message": "bad key {KEY}"}}}}'.encode())
    model = client(endpoint.address, environment={"OPENAI_API_KEY": KEY})
    with model, pytest.raises(EndpointRefused) as refused:
        model.reply("one", 5)
    assert endpoint.requests[0][1]["authorization"] == f"Bearer {KEY}"
    assert KEY not in str(refused.value)
    assert KEY not in json.dumps(model.description)
    assert "secret" not in repr(vars(refused.value))


@pytest.mark.parametrize(
    ("address", "base_url", "sent"),
    [
        ("https://api.openai.com/v1", None, True),
        ("http://api.openai.com/v1", None, False),
        ("https://api.openai.com.evil.example/v1", None, False),
        ("https://evil.example/v1", None, False),
        ("https://models.example:8443/v1", "https://models.example:8443/v1", True),
        ("https://models.example/v1", "https://models.example:8443/v1", False),
        ("http://models.example/v1", "http://models.example/v1", False),
        ("http://127.0.0.1:8000/v1", None, True),
    ],
)
def test_a_claim_cannot_collect_keys(address: str, base_url: str | None, sent: bool) -> None:
    environment = {"OPENAI_API_KEY": KEY} | ({"OPENAI_BASE_URL": base_url} if base_url else {})
    assert (client(address, environment=environment)._key == KEY) is sent


@pytest.mark.parametrize("key", ["", "  ", "two\nlines", "schlüssel"])
def test_a_key_that_is_no_header_is_not_sent(key: str, endpoint: LoopbackEndpoint) -> None:
    with client(endpoint.address, environment={"OPENAI_API_KEY": key}) as model:
        model.reply("one", 5)
    assert "authorization" not in endpoint.requests[0][1]


@pytest.mark.parametrize("retry_after", ["7", "date"])
def test_a_rate_limit_is_waited_for(endpoint: LoopbackEndpoint, retry_after: str) -> None:
    value = formatdate(time() + 7.5, usegmt=True) if retry_after == "date" else retry_after
    endpoint.fail(status=429, headers={"retry-after": value})
    waits: list[float] = []
    with client(endpoint.address, sleep=waits.append) as model:
        assert model.reply("one", 5) == "answer to one"
    assert len(waits) == 1
    assert 5 <= waits[0] <= 8


def test_waiting_is_bounded_over_all_questions(endpoint: LoopbackEndpoint) -> None:
    waits: list[float] = []
    with client(endpoint.address, sleep=waits.append) as model:
        endpoint.fail(status=429, headers={"retry-after": "8"})
        model.reply("one", 5)
        endpoint.fail(status=429, headers={"retry-after": "8"})
        with pytest.raises(EndpointBusy, match="patience"):
            model.reply("two", 5)
    assert waits == [8.0]


def test_a_longer_wait_than_ours_is_not_waited_for(endpoint: LoopbackEndpoint) -> None:
    endpoint.fail(times=-1, status=429, headers={"retry-after": "3600"})
    waits: list[float] = []
    with client(endpoint.address, sleep=waits.append) as model, pytest.raises(EndpointBusy):
        model.reply("one", 5)
    assert waits == []


def test_a_passing_failure_is_asked_again(endpoint: LoopbackEndpoint) -> None:
    endpoint.fail(status=503)
    endpoint.fail(close=True)
    with client(endpoint.address) as model:
        assert model.complete("one", 5) == "answer to one"
    assert len(endpoint.requests) == 3


FAILURES: list[tuple[dict[str, Any], type[ModelUnavailable]]] = [
    ({"status": 500}, EndpointUnreachable),
    ({"close": True}, EndpointUnreachable),
    ({"status": 401}, EndpointRefused),
    ({"status": 429, "body": b'{"error": {"message": "insufficient_quota"}}'}, EndpointRefused),
    ({"status": 307, "headers": {"location": "http://127.0.0.1:1/"}}, EndpointRefused),
    ({"status": 400, "body": b"no"}, EndpointRefused),
    ({"body": b"<html>"}, MalformedAnswer),
    ({"body": b"[]"}, MalformedAnswer),
    ({"body": b'{"choices": []}'}, MalformedAnswer),
    ({"body": b'{"choices": [{"message": {"content": 5}}]}'}, MalformedAnswer),
    ({"body": b"[" * 100_000}, MalformedAnswer),
    ({"body": b" " * (LARGEST_BODY + 1)}, MalformedAnswer),
    ({"wait": 1.0}, EndpointTimedOut),
    ({"body": b" " * 1000, "drip": 0.02}, EndpointTimedOut),
]


@pytest.mark.parametrize(("how", "expected"), FAILURES)
def test_every_failure_is_unavailable_and_says_where(
    endpoint: LoopbackEndpoint, how: dict[str, Any], expected: type[ModelUnavailable]
) -> None:
    endpoint.fail(times=-1, **how)
    timeout = 0.2 if expected is EndpointTimedOut else 20.0
    patience = Patience(connect=20.0, answer=timeout, attempts=2, pause=0.0)
    with client(endpoint.address, patience=patience) as model:
        with pytest.raises(expected, match=r"candidate: http://127\.0\.0\.1:\d+/v1/chat/completions") as failure:
            model.reply("one", 5)
        assert isinstance(failure.value, CheckpointUnavailable)
        asked = len(endpoint.requests)
        with pytest.raises(expected):
            model.reply("two", 5)
        assert len(endpoint.requests) == asked, "a dead endpoint was asked again"


def test_nobody_listens() -> None:
    with (
        client("http://127.0.0.1:9/v1") as model,
        pytest.raises(EndpointUnreachable, match=r"check behavior\.endpoint"),
    ):
        model.reply("one", 5)


@pytest.mark.parametrize(
    "address", ["ftp://x/v1", "nowhere", "http://user:pass@127.0.0.1/v1", "http://127.0.0.1/v1?k=1"]
)
def test_an_address_that_cannot_be_used(address: str) -> None:
    with client(address) as model, pytest.raises(EndpointRefused, match="without user, password or query") as refused:
        model.complete("one", 5)
    assert "pass@" not in str(refused.value)
    assert "pass@" not in json.dumps(model.description)


def test_offline_leaves_this_machine_alone(endpoint: LoopbackEndpoint) -> None:
    with (
        client("https://models.example/v1", offline=True) as model,
        pytest.raises(EndpointUnreachable, match="offline"),
    ):
        model.complete("one", 5)
    with client(endpoint.address, offline=True) as model:
        assert model.complete("one", 5) == "answer to one"


def test_a_form_that_is_not_offered_does_not_end_the_other() -> None:
    with serving({"model": str.upper}, chat=False) as endpoint, client(endpoint.address) as model:
        with pytest.raises(NotOffered):
            model.reply("one", 5)
        assert model.complete("one", 5) == "ONE"


def test_no_chat_template_is_no_chat(endpoint: LoopbackEndpoint) -> None:
    endpoint.fail(status=400, body=b'{"message": "default chat template is no longer allowed"}')
    with client(endpoint.address) as model, pytest.raises(NotOffered):
        model.reply("one", 5)


@pytest.mark.parametrize(
    ("form", "said"),
    [
        (
            "complete",
            "This is a chat model and not supported in the v1/completions endpoint. Did you mean to use "
            "v1/chat/completions?",
        ),
        ("reply", "This is not a chat model and thus not supported in the v1/chat/completions endpoint."),
    ],
)
def test_openais_words_for_the_other_form(endpoint: LoopbackEndpoint, form: str, said: str) -> None:
    """It is no mistake of the claim that a model only chats, and the other form is still asked."""
    error = {"message": said, "type": "invalid_request_error", "param": "model", "code": None}
    endpoint.fail(status=404, body=json.dumps({"error": error}).encode())
    with client(endpoint.address) as model:
        with pytest.raises(NotOffered, match="chat model"):
            getattr(model, form)("one", 5)
        assert model.complete("two", 5) == model.reply("two", 5) == "answer to two"


def test_many_texts_are_asked_in_order(endpoint: LoopbackEndpoint) -> None:
    with client(endpoint.address) as model:
        assert model.complete_all(["one", "two"], 5) == ["answer to one", "answer to two"]


def test_an_unknown_model_is_a_mistake_of_the_claim(endpoint: LoopbackEndpoint) -> None:
    with client(endpoint.address, "other") as model, pytest.raises(EndpointRefused, match=r"behavior\.model"):
        model.reply("one", 5)


@pytest.mark.parametrize(
    ("message", "reason", "expected"),
    [
        ({"content": None, "refusal": "I cannot."}, "stop", "I cannot."),
        ({"content": None}, "length", ""),
        ({"content": "x" * (LONGEST_ANSWER + 50)}, "stop", "x" * LONGEST_ANSWER),
        ({"content": "a\ud800"}, "stop", "a?"),
    ],
)
def test_unusual_answers(endpoint: LoopbackEndpoint, message: dict[str, Any], reason: str, expected: str) -> None:
    endpoint.fail(body=json.dumps({"choices": [{"message": message, "finish_reason": reason}]}).encode())
    with client(endpoint.address) as model:
        assert model.reply("one", 5) == expected


@pytest.mark.parametrize("tokens", [0, -1, 100_000])
def test_unbounded_requests_are_a_mistake(endpoint: LoopbackEndpoint, tokens: int) -> None:
    with client(endpoint.address) as model, pytest.raises(ValueError, match="new tokens"):
        model.reply("one", tokens)
