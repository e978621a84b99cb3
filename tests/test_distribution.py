from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from checks.evidence.record import CONTRADICTS, INCONCLUSIVE, NOT_APPLICABLE, SUPPORTS, Evidence
from checks.pair.pair import Pair

Tensors = dict[str, torch.Tensor]
Judged = Callable[..., Evidence]
Open = Callable[..., Pair]
CHECKS = ("pca", "wasserstein", "spectrum")


def evidence_of(pair: Pair, judged: Judged) -> dict[str, Evidence]:
    return {check: judged(f"distribution.{check}", pair) for check in CHECKS}


def test_independent_models_are_not_accused(examples: Path, open_pair: Open, judged: Judged) -> None:
    found = evidence_of(open_pair(examples / "independent", examples / "base"), judged)
    assert found["pca"].outcome == SUPPORTS
    assert found["spectrum"].outcome == SUPPORTS
    # One recipe, one histogram: the documented bound calls this pair derived, so that it may not decide.
    assert found["wasserstein"].outcome == INCONCLUSIVE
    assert float(found["wasserstein"].value or 0) > 0.9


def test_a_fine_tuned_model_is_shown_and_never_decided(examples: Path, open_pair: Open, judged: Judged) -> None:
    found = evidence_of(open_pair(examples / "derived", examples / "base"), judged)
    assert {evidence.outcome for evidence in found.values()} == {INCONCLUSIVE}
    assert float(found["pca"].value or 0) > 0.9
    assert found["pca"].band == "derived, by the document"
    assert float(found["spectrum"].value or 0) > 0.3


def test_a_copy_is_equal_and_no_check_of_distributions_refutes(examples: Path, open_pair: Open, judged: Judged) -> None:
    found = evidence_of(open_pair(examples / "base", examples / "base"), judged)
    assert all(evidence.outcome != CONTRADICTS for evidence in found.values())
    assert all(float(evidence.value or 0) > 0.99 for evidence in found.values())


def test_another_distribution_supports(
    base: Tensors, examples: Path, save_checkpoint: Callable[..., Path], open_pair: Open, judged: Judged
) -> None:
    """Nothing negative: half a pooled deviation away. The spread alone is no difference."""
    config = json.loads((examples / "base" / "config.json").read_text())
    positive = {name: tensor.float().abs() for name, tensor in base.items()}
    pair = open_pair(save_checkpoint("positive", positive, config), examples / "base")
    evidence = judged("distribution.wasserstein", pair)
    assert evidence.outcome == SUPPORTS, evidence.reason


def test_other_widths_have_no_common_projection(
    llama_config: Callable[..., dict[str, Any]],
    llama_tensors: Callable[..., Tensors],
    save_checkpoint: Callable[..., Path],
    open_pair: Open,
    judged: Judged,
) -> None:
    narrow = {"hidden_size": 32, "head_dim": 8}
    pair = open_pair(
        save_checkpoint("narrow", llama_tensors(1, **narrow), llama_config(**narrow)),
        save_checkpoint("wide", llama_tensors(2), llama_config()),
    )
    assert judged("distribution.pca", pair).outcome == NOT_APPLICABLE


def test_one_layer_has_no_measure_of_its_own(
    llama_config: Callable[..., dict[str, Any]],
    llama_tensors: Callable[..., Tensors],
    save_checkpoint: Callable[..., Path],
    open_pair: Open,
    judged: Judged,
) -> None:
    one = {"num_hidden_layers": 1}
    pair = open_pair(*(save_checkpoint(f"m{n}", llama_tensors(n, **one), llama_config(**one)) for n in (1, 2)))
    evidence = judged("distribution.spectrum", pair)
    assert evidence.outcome == INCONCLUSIVE
    assert "no power" in evidence.reason
