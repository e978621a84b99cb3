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
    assert evidence.details["weakest_start"]["z"] > 8
    assert set(evidence.details["beyond"]) == {"mlp", "matrix", "embedding"}


def test_a_reference_that_began_elsewhere_is_not_excused(
    start: Tensors, llama_tensors: Callable[..., Tensors], origin: Test
) -> None:
    """Nothing is open either: the other checks decide about it."""
    ours, theirs = trained(start, 1), trained(llama_tensors(5), 2)
    evidence = origin(ours, theirs)
    assert evidence.outcome == NOT_APPLICABLE
    assert "began elsewhere" in evidence.reason
    merged = {name: 0.7 * tensor + 0.3 * theirs[name] for name, tensor in ours.items()}
    assert origin(merged, theirs).outcome == NOT_APPLICABLE


@pytest.mark.parametrize("elsewhere", [True, False])
def test_a_layer_that_was_taken_over_is_not_excused(
    elsewhere: bool, start: Tensors, llama_tensors: Callable[..., Tensors], origin: Test
) -> None:
    twin, parent = trained(start, 1), trained(llama_tensors(5) if elsewhere else start, 2)
    copied = trained(parent, 3, 0.02)
    grafted = {name: copied[name] if "layers.1." in name else tensor for name, tensor in twin.items()}
    evidence = origin(grafted, parent)
    assert evidence.outcome == INCONCLUSIVE
    assert float(evidence.value or 0) > 0.9
    expected = "no trace of the initial weights in the candidate's layer 1" if elsewhere else "between the bounds"
    assert expected in evidence.reason


def test_a_merge_with_the_reference_is_not_excused(start: Tensors, origin: Test) -> None:
    twin, parent = trained(start, 1), trained(start, 2)
    merged = {name: 0.8 * tensor + 0.2 * parent[name] for name, tensor in twin.items()}
    assert origin(merged, parent).outcome == INCONCLUSIVE


def test_a_layer_at_another_place_is_not_excused(start: Tensors, origin: Test) -> None:
    twin, parent = trained(start, 1), trained(start, 2)
    moved = {n.replace("layers.2.", "layers.1."): t for n, t in parent.items() if "layers.2." in n}
    evidence = origin({**twin, **moved}, parent)
    assert evidence.outcome == INCONCLUSIVE
    assert "no trace of the initial weights in the candidate's layer 1" in evidence.reason


def test_a_layer_that_the_reference_lacks_keeps_it_open(
    start: Tensors, save_checkpoint: Callable[..., Path], origin: Test
) -> None:
    shorter = {name: tensor for name, tensor in trained(start, 2).items() if "layers.2." not in name}
    evidence = origin(trained(start, 1), shorter)
    assert evidence.outcome == INCONCLUSIVE
    assert "no counterpart of layer 2 MLP" in evidence.reason


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
    ours, theirs = trained(start, 1, 4.0), trained(start, 2)
    assert origin(ours, theirs).outcome != INCONCLUSIVE
    evidence = origin(ours, theirs, cases=10**15)
    assert evidence.outcome == INCONCLUSIVE, evidence.details["weakest_start"]
    assert "no trace" in evidence.reason


def test_published_weights_alone_never_pass(start: Tensors, save_checkpoint: Callable[..., Path], origin: Test) -> None:
    """They can be forged: the reference and noise look like the start of both."""
    from checks.claim.model import ModelSource

    published = InitialWeights(checkpoint=ModelSource(name="start", path=str(save_checkpoint("published", start))))
    evidence = origin(trained(start, 1), trained(start, 2), published)
    assert evidence.outcome == INCONCLUSIVE
    assert "can be made up" in evidence.reason


def test_a_reference_of_other_shape_did_not_begin_there(
    start: Tensors, llama_tensors: Callable[..., Tensors], origin: Test
) -> None:
    evidence = origin(trained(start, 1), llama_tensors(3, hidden_size=32, head_dim=8, intermediate_size=80))
    assert evidence.outcome == NOT_APPLICABLE
    assert evidence.value is None
    assert evidence.details["start"]["z"] > 50
