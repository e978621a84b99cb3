"""The block `behavior` of a claim."""

from __future__ import annotations

from pathlib import Path

from checks.claim.behavior import Behavior, behavior_from


def test_an_endpoint_and_its_models() -> None:
    found = behavior_from(
        {"endpoint": "http://host/v1", "model": "ours", "references": {"b": "theirs-b", "a": "theirs-a"}},
        Path("/claims"),
    )
    assert (found.endpoint, found.model, found.directory) == ("http://host/v1", "ours", None)
    assert found.references == (("a", "theirs-a"), ("b", "theirs-b"))
    assert found.can_be_asked
    assert hash(found)


def test_a_model_without_an_endpoint_is_a_directory_beside_the_claim(tmp_path: Path) -> None:
    found = behavior_from({"model": "../checkpoints/base"}, tmp_path / "claims")
    assert (found.model, found.directory) == (None, str(tmp_path / "checkpoints" / "base"))
    assert found.can_be_asked


def test_a_cutoff_alone_is_nobody_to_ask() -> None:
    found = behavior_from({"knowledge_cutoff": "2025-05"})
    assert found == Behavior(knowledge_cutoff="2025-05")
    assert not found.can_be_asked
