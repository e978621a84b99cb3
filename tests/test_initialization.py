from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from checks.checkpoint.checkpoint import Checkpoint
from checks.checkpoint.initial import regenerate
from checks.claim.initial import InitialWeights
from checks.evidence.record import INCONCLUSIVE, NOT_APPLICABLE, SUPPORTS, Evidence
from checks.pair.pair import Pair

Tensors = dict[str, torch.Tensor]
Test = Callable[..., Evidence]
SEED = 13
GENERATED = InitialWeights("torch", SEED)


@pytest.fixture
def start(
    save_checkpoint: Callable[..., Path],
    llama_config: Callable[..., dict[str, Any]],
    llama_tensors: Callable[..., Tensors],
    tmp_path: Path,
) -> Tensors:
    """The initial weights that the generator gives from the seed."""
    template = Checkpoint(save_checkpoint("template", llama_tensors(0), llama_config()))
    made = regenerate(template, "torch", SEED, tmp_path / "start")
    return {name: made.read(name) for name in made.tensors}


@pytest.fixture
def origin(
    save_checkpoint: Callable[..., Path],
    llama_config: Callable[..., dict[str, Any]],
    open_pair: Callable[..., Pair],
    judged: Callable[..., Evidence],
) -> Test:
    """The evidence of initialization.origin on two sets of tensors."""

    def run(ours: Tensors, theirs: Tensors, initial: InitialWeights | None = GENERATED, cases: int = 1) -> Evidence:
        pair = open_pair(*(save_checkpoint(n, t, llama_config()) for n, t in (("ours", ours), ("theirs", theirs))))
        pair.initial = initial
        return judged("initialization.origin", pair, calibrated_cases=cases)

    return run


def trained(tensors: Tensors, seed: int, size: float = 1.0) -> Tensors:
    """With something learned: `size` times what the initial weights spread."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor + size * 0.02 * torch.randn(tensor.shape, generator=generator) for name, tensor in tensors.items()
    }


def test_a_claim_without_initial_weights_is_not_applicable(start: Tensors, origin: Test) -> None:
    assert origin(trained(start, 1), trained(start, 2), None).outcome == NOT_APPLICABLE


def test_a_twin_that_learned_apart_supports(start: Tensors, origin: Test) -> None:
    evidence = origin(trained(start, 1), trained(start, 2))
    assert evidence.outcome == SUPPORTS
    assert evidence.details["start"]["z"] > 50
    assert evidence.details["reference_start"]["z"] > 50
    assert set(evidence.details["beyond"]) == {"mlp", "attention", "embedding"}


def test_a_reference_that_began_elsewhere_supports(
    start: Tensors, llama_tensors: Callable[..., Tensors], origin: Test
) -> None:
    assert origin(trained(start, 1), trained(llama_tensors(5), 2)).outcome == SUPPORTS


def test_a_derived_model_is_not_cleared_by_the_seed_of_its_parent(start: Tensors, origin: Test) -> None:
    parent = trained(start, 1)
    evidence = origin(trained(parent, 2, 0.3), parent)
    assert evidence.outcome == INCONCLUSIVE
    assert float(evidence.value or 0) > 0.8


@pytest.mark.parametrize("part", ["mlp", "self_attn", "embed_tokens"])
def test_a_part_that_was_taken_over_is_not_cleared(part: str, start: Tensors, origin: Test) -> None:
    twin, parent = trained(start, 1), trained(start, 2)
    mixed = {name: parent[name] if part in name else tensor for name, tensor in twin.items()}
    assert origin(mixed, parent).outcome == INCONCLUSIVE


def test_a_wrong_seed_leaves_no_trace(start: Tensors, origin: Test) -> None:
    evidence = origin(trained(start, 1), trained(start, 2), InitialWeights("torch", SEED + 1))
    assert evidence.outcome == INCONCLUSIVE
    assert "no trace of the initial weights" in evidence.reason


def test_the_trace_of_the_start_needs_the_level_of_the_whole_claim(start: Tensors, origin: Test) -> None:
    ours, theirs = trained(start, 1, 45.0), trained(start, 2)
    assert origin(ours, theirs).outcome == SUPPORTS
    evidence = origin(ours, theirs, cases=10**12)
    assert evidence.outcome == INCONCLUSIVE, evidence.details["start"]


def test_published_weights_alone_never_pass(start: Tensors, save_checkpoint: Callable[..., Path], origin: Test) -> None:
    """They can be forged: the reference and noise look like the start of both."""
    from checks.claim.model import ModelSource

    published = InitialWeights(checkpoint=ModelSource(name="start", path=str(save_checkpoint("published", start))))
    evidence = origin(trained(start, 1), trained(start, 2), published)
    assert evidence.outcome == INCONCLUSIVE
    assert "can be made up" in evidence.reason


def test_without_equal_shapes_it_stays_open(
    start: Tensors, llama_tensors: Callable[..., Tensors], origin: Test
) -> None:
    evidence = origin(trained(start, 1), llama_tensors(3, hidden_size=32, head_dim=8, intermediate_size=80))
    assert evidence.outcome == INCONCLUSIVE
    assert evidence.value is None
