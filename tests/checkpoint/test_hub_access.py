"""The hub as one run sees it: commits agreed once, repositories opened once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants, snapshot_download
from safetensors.torch import save

from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.hub_access import HubAccess, Revisions, is_commit, mirrors_of, resolve_revisions
from checks.checkpoint.hub_failures import Patience
from checks.checkpoint.mirror import MirroredFiles
from checks.checkpoint.model import Model
from checks.claim.load import catalogued_source
from checks.claim.model import ModelSource

HASTY = Patience(timeout=5.0, attempts=2, pause=0.001, longest_wait=2.0)
FILES = {"model.safetensors": save({"a": torch.ones(2)}), "config.json": b"{}"}
SHA = "0123456789abcdef0123456789abcdef01234567"


def named(name: str, revision: str | None = None, **more: Any) -> ModelSource:
    return ModelSource(name, repo=f"org/{name}", revision=revision, **more)


@pytest.fixture
def commits(hub: Any) -> dict[str, str]:
    """Two repositories on the hub."""
    return {name: hub.add(f"org/{name}", FILES) for name in ("one", "two")}


def test_each_branch_is_asked_for_once(hub: Any, commits: dict[str, str]) -> None:
    sources = [named("one", "main"), named("one", "main"), named("two"), named("one", SHA), named("local", path="x")]
    found = resolve_revisions(sources, False, HASTY)
    assert found == Revisions({"org/one@main": commits["one"], "org/two": commits["two"]}, {})
    assert len(hub.requests) == 2
    assert [found.where(source) for source in sources] == [
        f"org/one@{commits['one']}",
        f"org/one@{commits['one']}",
        f"org/two@{commits['two']}",
        f"org/one@{SHA}",
        "x",
    ]


def test_nothing_to_ask_opens_nothing(hub: Any) -> None:
    assert (
        resolve_revisions([named("one", SHA), named("local", path="x"), ModelSource("nameless")], False) == Revisions()
    )
    assert not hub.requests


def test_a_failure_concerns_one_model(hub: Any, commits: dict[str, str]) -> None:
    found = resolve_revisions([named("absent", "main"), named("one", "main")], False, HASTY)
    assert found.commits == {"org/one@main": commits["one"]}
    assert "org/absent@main: there is no such repository" in found.failures["org/absent@main"]
    access = HubAccess(revisions=found, patience=HASTY)
    hub.requests.clear()
    for _ in range(2):
        with pytest.raises(CheckpointUnavailable, match="there is no such repository"):
            access.files(named("absent", "main"))
    assert not hub.requests


def test_a_hub_that_cannot_be_reached_is_not_asked_again_and_again(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("checks.checkpoint.hub_access.ASKED_AT_ONCE", 1)
    hub.fail("/api/", status=503, times=-1)
    found = resolve_revisions([named(f"m{number}") for number in range(20)], False, HASTY)
    assert len(hub.requests) == HASTY.attempts
    assert len(found.failures) == 20
    assert "org/m19: not asked for, after org/m0: " in found.failures["org/m19"]
    assert "fails (503" in found.failures["org/m19"]


@pytest.mark.parametrize("how", ["option", "environment"])
def test_offline_the_local_hub_cache_says_what_a_branch_names(
    how: str, hub: Any, commits: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot_download("org/one", endpoint=hub.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", how == "environment")
    hub.requests.clear()
    found = resolve_revisions([named("one", "main"), named("two", "main")], how == "option", HASTY)
    assert found.commits == {"org/one@main": commits["one"]}
    assert "hf download org/two --revision main" in found.failures["org/two@main"]
    access = HubAccess(how == "option", found, HASTY)
    assert access.files(named("one", "main")).index().directory is not None
    assert not hub.requests


def test_what_the_controller_did_not_resolve_is_resolved_once(hub: Any, commits: dict[str, str]) -> None:
    access = HubAccess(patience=HASTY)
    assert access.commit("org/one", None) == access.commit("org/one", None) == commits["one"]
    assert access.commit("org/one", SHA) == SHA
    assert len(hub.requests) == 1


def test_a_repository_is_opened_once_for_all_its_models(hub: Any, commits: dict[str, str]) -> None:
    access = HubAccess(patience=HASTY)
    models = [Model(named("one", revision), None, ("",), access) for revision in ("main", commits["one"], "main")]
    assert all(model.checkpoint.parameters == 2 for model in models)
    assert len(hub.seen("/api/")) == 2  # the branch, and the listing
    assert len(hub.seen("model.safetensors")) == 1


def test_what_the_controller_hands_over_is_plain(commits: dict[str, str]) -> None:
    found = resolve_revisions([named("one"), named("absent")], False, HASTY)
    assert set(map(type, found.as_plain().values())) == {dict}
    assert Revisions.from_plain(found.as_plain()) == found


@pytest.mark.parametrize("revision", ["../../../etc/passwd", "/etc/passwd", "a b", "", "main\n", "-x", "x;rm"])
def test_a_hostile_revision_opens_no_file_and_no_connection(revision: str, hub: Any, tmp_path: Path) -> None:
    found = resolve_revisions([named("one", revision)], False, HASTY)
    if revision:
        assert "is no branch, tag or commit" in found.failures[f"org/one@{revision}"]
        assert not hub.requests


def test_a_commit_is_forty_hexadecimal_digits() -> None:
    assert is_commit(SHA)
    assert not any(is_commit(one) for one in (None, "main", SHA[:12], SHA.upper(), f"{SHA}\n"))


def test_mirrors_belong_to_the_catalogues_own_repository(hub: Any) -> None:
    source = catalogued_source("llama_3_70b")
    assert mirrors_of(source) == [("NousResearch/Meta-Llama-3-70B", None)]
    fork = ModelSource("llama_3_70b", catalog_key="llama_3_70b", repo="org/fork")
    assert mirrors_of(fork) == mirrors_of(named("one")) == []
    for name in (str(source.repo), "NousResearch/Meta-Llama-3-70B"):
        hub.add(name, FILES)
    found = resolve_revisions([source], False, HASTY)
    assert set(found.commits) == {source.repo, "NousResearch/Meta-Llama-3-70B"}
    assert isinstance(HubAccess(revisions=found).files(source), MirroredFiles)
