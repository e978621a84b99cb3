"""The block `initial` of a claim file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checks.claim.initial import InitialWeights, initial_from, source_of
from checks.claim.load import load_claim
from checks.claim.source import ClaimError

Write = Callable[..., Path]


def test_generator_and_seed(tmp_path: Path) -> None:
    assert initial_from({"generator": "torch", "seed": 7}, tmp_path) == InitialWeights("torch", 7)


def test_a_checkpoint_is_a_directory_beside_the_claim_or_a_repository(tmp_path: Path) -> None:
    (tmp_path / "start").mkdir()
    local = initial_from({"checkpoint": "start"}, tmp_path).checkpoint
    assert local is not None
    assert (local.path, local.repo) == (str(tmp_path / "start"), None)
    hub = initial_from({"checkpoint": "org/name@v1.0"}, tmp_path).checkpoint
    assert hub is not None
    assert (hub.path, hub.repo, hub.revision) == (None, "org/name", "v1.0")
    assert source_of("org/name", "initial", tmp_path).revision is None


def test_a_directory_goes_before_a_repository_of_its_name(tmp_path: Path) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert source_of("org/name", "initial", tmp_path).path == str(tmp_path / "org" / "name")


def test_steps_keep_their_order(tmp_path: Path) -> None:
    steps = initial_from({"checkpoint": "o/start", "steps": ["o/b@step-100", "o/a@step-200"]}, tmp_path).steps
    assert [(step.name, step.repo, step.revision) for step in steps] == [
        ("step_1", "o/b", "step-100"),
        ("step_2", "o/a", "step-200"),
    ]


@pytest.mark.parametrize("text", ["nowhere", "../elsewhere", "https://hub/org/name", "org/name@", "org/na me", "-o/n"])
def test_what_is_neither_is_an_error(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no directory"):
        source_of(text, "initial", tmp_path)


def test_a_claim_has_its_initial_weights(write_claim: Write) -> None:
    content = {"model": "axk1", "references": ["kimi_k2"]}
    claim = load_claim(write_claim(**content, initial={"generator": "transformers", "seed": 0}))
    assert claim.initial == InitialWeights("transformers", 0)
    assert load_claim(write_claim(**content)).initial is None


@pytest.mark.parametrize(
    "block",
    [
        {},
        {"seed": 1},
        {"generator": "torch"},
        {"steps": ["org/name"]},
        {"generator": "numpy", "seed": 1},
        {"generator": "torch", "seed": -1},
        {"generator": "torch", "seed": 2**32},
        {"generator": "torch", "seed": 1.5},
        {"checkpoint": "nowhere"},
        {"checkpoint": "org/name", "weights": "mine"},
    ],
)
def test_a_block_that_states_no_start_is_an_error_of_the_claim(write_claim: Write, block: dict[str, Any]) -> None:
    with pytest.raises(ClaimError, match=r"initial|seed|generator|no directory 'nowhere'"):
        load_claim(write_claim(model="axk1", references=["kimi_k2"], initial=block))
