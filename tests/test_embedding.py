from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from checks.evidence.record import CONTRADICTS, INCONCLUSIVE, NOT_APPLICABLE, SUPPORTS, Evidence
from checks.pair.pair import Pair
from tests.zoo.symmetry import permute_residual
from tests.zoo.weights import read_weights, write_weights

Judged = Callable[..., Evidence]
Open = Callable[..., Pair]
CHECKS = ("rows", "centroids", "moments")


def evidence_of(pair: Pair, judged: Judged) -> dict[str, Evidence]:
    return {check: judged(f"embedding.{check}", pair) for check in CHECKS}


def test_independent_models_support(examples: Path, open_pair: Open, judged: Judged) -> None:
    found = evidence_of(open_pair(examples / "independent", examples / "base"), judged)
    assert (found["rows"].outcome, found["rows"].powered) == (SUPPORTS, True)
    assert found["rows"].details["rows"]["embedding"]["tokens"] >= 64
    assert found["centroids"].outcome == SUPPORTS
    # Frequent tokens have other lengths than rare ones in any model: near equality alone accuses nobody.
    assert found["moments"].outcome in (SUPPORTS, INCONCLUSIVE)


def test_a_fine_tuned_model_contradicts(examples: Path, open_pair: Open, judged: Judged) -> None:
    found = evidence_of(open_pair(examples / "derived", examples / "base"), judged)
    assert found["rows"].outcome == CONTRADICTS
    assert "initialisation seed" in found["rows"].details["note"]
    assert found["centroids"].outcome == CONTRADICTS
    assert found["moments"].outcome == INCONCLUSIVE


def copied(directory: Path, target: Path, change: Callable[..., object]) -> Path:
    """A model with changed weights and the tokenizer it had."""
    shutil.copytree(directory, target)
    write_weights(change(read_weights(directory)), target)  # type: ignore[arg-type]
    return target


def test_permuted_channels_are_the_stated_limit(
    examples: Path, tmp_path: Path, open_pair: Open, judged: Judged
) -> None:
    permuted = copied(examples / "base", tmp_path / "permuted", lambda weights: permute_residual(weights, 1))
    found = evidence_of(open_pair(permuted, examples / "base"), judged)
    assert found["rows"].outcome != CONTRADICTS
    assert found["centroids"].outcome != CONTRADICTS


def test_without_a_tokenizer_nothing_is_decided(
    examples: Path, tmp_path: Path, open_pair: Open, judged: Judged
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(examples / "derived" / name, bare / name)
    for evidence in evidence_of(open_pair(bare, examples / "base"), judged).values():
        assert evidence.outcome == INCONCLUSIVE
        assert not evidence.powered
        assert "no tokenizer of bare" in evidence.reason


def test_without_an_embedding_nothing_applies(examples: Path, tmp_path: Path, open_pair: Open, judged: Judged) -> None:
    def without(weights: object) -> object:
        tensors = weights.tensors  # type: ignore[attr-defined]
        for name in [name for name in tensors if "embed" in name or "lm_head" in name]:
            tensors.pop(name)
        return weights

    headless = copied(examples / "derived", tmp_path / "headless", without)
    for evidence in evidence_of(open_pair(headless, examples / "base"), judged).values():
        assert evidence.outcome == NOT_APPLICABLE


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_rows_that_were_taken_over_contradict(
    share: float, examples: Path, tmp_path: Path, open_pair: Open, judged: Judged
) -> None:
    """All of the embedding, or its mean with one's own."""
    other = read_weights(examples / "base").tensors

    def mix(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return share * other[name] + (1 - share) * tensor if "embed_tokens" in name else tensor

    mixed = copied(examples / "independent", tmp_path / "mixed", lambda weights: weights.map(mix))
    evidence = judged("embedding.rows", open_pair(mixed, examples / "base"))
    assert evidence.outcome == CONTRADICTS
    assert evidence.reason.startswith("embedding:")
