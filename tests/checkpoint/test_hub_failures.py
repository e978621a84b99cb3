"""What each failure of a hub is called, what is waited for, and what is asked again."""

from __future__ import annotations

import email.utils
import time
from dataclasses import replace
from typing import Any

import pytest

from checks.checkpoint import hub_failures
from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.hub import HubSource, read_hub_index
from tests.checkpoint.loopback_repository import HASTY, NAME, failure, read


def test_gated(hub: Any, commit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories[NAME].gated = True
    message = failure(hub_failures.RepositoryGated, lambda: read_hub_index(NAME, commit, HASTY))
    assert f"accept the terms at {hub.endpoint}/{NAME} with your account and set HF_TOKEN" in message
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    message = failure(hub_failures.RepositoryGated, lambda: read_hub_index(NAME, commit, HASTY))
    assert "with the account of your HF_TOKEN" in message
    monkeypatch.setenv("HF_TOKEN", hub.good_token)
    index = read_hub_index(NAME, commit, HASTY)
    assert read(HubSource(index), *next((s.name, 0, s.size) for s in index.shards.values()))


def test_missing_or_private_repository(hub: Any, commit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    message = failure(hub_failures.RepositoryMissing, lambda: read_hub_index("org/absent", "main", HASTY))
    assert "org/absent@main: there is no such repository, or it is private and HF_TOKEN is not set" in message
    hub.repositories[NAME].private = True
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    message = failure(hub_failures.RepositoryMissing, lambda: read_hub_index(NAME, commit, HASTY))
    assert "your HF_TOKEN does not open it" in message


@pytest.mark.parametrize("revision", ["typo", "b" * 40])
def test_missing_revision(revision: str, commit: str) -> None:
    message = failure(hub_failures.RevisionMissing, lambda: read_hub_index(NAME, revision, HASTY))
    assert "there is no such revision; correct it in the claim" in message


@pytest.mark.parametrize("name", ["no repository", "a/b/c", "../..", ""])
def test_a_name_that_is_no_repository(name: str, hub: Any) -> None:
    failure(hub_failures.HubRefused, lambda: read_hub_index(name, "main", HASTY))
    assert not hub.requests


def test_rate_limit_is_waited_for(hub: Any, commit: str) -> None:
    hub.fail("/api/", status=429, headers={"Retry-After": "1"})
    started = time.monotonic()
    assert read_hub_index(NAME, commit, HASTY)
    assert time.monotonic() - started >= 1


@pytest.mark.parametrize("where", ["/api/", "/resolve/"])
def test_rate_limit_beyond_our_patience(where: str, hub: Any, commit: str) -> None:
    hub.fail(where, status=429, headers={"Retry-After": "3600"}, times=-1)
    message = failure(hub_failures.RateLimited, lambda: read_hub_index(NAME, commit, HASTY))
    assert "allows no more requests now; run again in 3600 s, or set HF_TOKEN" in message


def test_rate_limit_again_and_again(hub: Any, commit: str) -> None:
    hub.fail("/api/", status=429, times=-1)
    message = failure(hub_failures.RateLimited, lambda: read_hub_index(NAME, commit, HASTY))
    assert "run again later" in message
    assert len(hub.seen("/api/")) == HASTY.attempts


def test_the_wait_that_the_hub_asks_for() -> None:
    soon = email.utils.formatdate(time.time() + 30, usegmt=True)
    assert hub_failures.asked_wait({"retry-after": "12"}) == 12
    assert 25 < hub_failures.asked_wait({"retry-after": soon}) <= 30
    assert hub_failures.asked_wait({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0
    assert hub_failures.asked_wait({"ratelimit": '"api";r=0;t=55'}) == 55
    assert hub_failures.asked_wait({"ratelimit": '"api";r=10;t=55'}) == 0
    for senseless in ("", "-5", "soon", "²", "1e9", "nan"):
        assert hub_failures.asked_wait({"retry-after": senseless}) == 0


@pytest.mark.parametrize("where", ["/api/", "/resolve/"])
@pytest.mark.parametrize("how", [{"status": 500}, {"status": 503, "headers": {"Retry-After": "0"}}, {"close": True}])
def test_a_passing_failure_is_asked_again(where: str, how: dict[str, Any], hub: Any, commit: str) -> None:
    hub.fail(where, times=2, **how)
    assert read_hub_index(NAME, commit, HASTY).tensors


def test_a_lasting_failure(hub: Any, commit: str) -> None:
    hub.fail("/api/", status=502, body=b'{"error": "bad gateway"}', times=-1)
    message = failure(hub_failures.HubUnreachable, lambda: read_hub_index(NAME, commit, HASTY))
    assert f"{hub.endpoint} fails (502: 'bad gateway'); try again later" in message
    assert len(hub.seen("/api/")) == HASTY.attempts


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (401, hub_failures.RepositoryMissing),
        (403, hub_failures.RepositoryGated),
        (404, hub_failures.FileMissing),
        (418, hub_failures.HubRefused),
    ],
)
@pytest.mark.parametrize("body", [b"{}", b"<html>", b'{"error": 5}'])
def test_a_refusal_is_final_whatever_it_says(
    status: int, kind: type[CheckpointUnavailable], body: bytes, hub: Any, commit: str
) -> None:
    hub.fail("/api/", status=status, body=body, times=-1)
    message = failure(kind, lambda: read_hub_index(NAME, commit, HASTY))
    assert NAME in message
    assert len(hub.seen("/api/")) == 1


@pytest.mark.parametrize("where", ["/api/", "/resolve/"])
@pytest.mark.parametrize("body", [b"[1]", b"\xff"])
def test_a_refusal_that_makes_no_sense(where: str, body: bytes, hub: Any, commit: str) -> None:
    hub.fail(where, status=404, body=body, times=-1)
    message = failure(hub_failures.HubRefused, lambda: read_hub_index(NAME, commit, HASTY))
    assert "cannot make sense of" in message


@pytest.mark.parametrize(
    "answer",
    [
        b"hello",
        b"[]",
        b'{"siblings": [{}]}',
        b'{"id": "a", "siblings": [{"rfilename": 5, "size": 1}]}',
        b'{"id": "a", "siblings": [{"rfilename": "model.safetensors"}]}',
        b'{"id": "a", "siblings": [{"rfilename": "model.safetensors", "size": -1}]}',
        b'{"id": "a", "siblings": [{"rfilename": "model.safetensors", "lfs": {}}]}',
        b'{"id": "a", "siblings": 5}',
    ],
)
def test_a_listing_that_makes_no_sense(answer: bytes, hub: Any, commit: str) -> None:
    hub.fail("/api/", status=200, body=answer, times=-1)
    failure(hub_failures.HubRefused, lambda: read_hub_index(NAME, commit, HASTY))


def test_time_out(hub: Any, commit: str) -> None:
    hub.fail("/api/", wait=0.5, times=-1)
    hasty = replace(HASTY, timeout=0.05, attempts=2)
    message = failure(hub_failures.HubTimedOut, lambda: read_hub_index(NAME, commit, hasty))
    assert "did not answer in time; try again later, or give it more HF_HUB_DOWNLOAD_TIMEOUT" in message


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:1", "http://hub.invalid", "no address", "ftp://127.0.0.1"])
def test_endpoint_that_cannot_be_reached(endpoint: str, hub: Any, commit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    message = failure(hub_failures.HubUnreachable, lambda: read_hub_index(NAME, commit, HASTY))
    assert f"{endpoint} cannot be reached" in message


def test_a_token_that_cannot_be_sent(hub: Any, commit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_\u20ac")
    assert "HF_TOKEN" in failure(hub_failures.HubRefused, lambda: read_hub_index(NAME, commit, HASTY))
