"""Changes that must keep the function of a network keep it, and do change the weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.zoo import derive, symmetry
from tests.zoo.weights import EMBEDDING, Weights, write_weights

Make = Callable[..., Weights]
Logits = Callable[[Weights], torch.Tensor]
EVERYWHERE = [
    symmetry.permute_neurons,
    symmetry.negate_neurons,
    symmetry.rescale_neurons,
    symmetry.rescale_norms,
    symmetry.rescale_values,
    symmetry.permute_heads,
    symmetry.permute_residual,
    symmetry.flip_residual_signs,
    symmetry.rotate_residual,
]
CASES = [(shape, change) for shape in ("llama", "qwen2", "mixtral") for change in EVERYWHERE]
CASES.append(("mixtral", symmetry.permute_experts))


@pytest.fixture
def logits(tmp_path: Path) -> Logits:
    """Computes the logits of weights on fixed tokens, through a stored checkpoint as any reader would open it."""

    def run(weights: Weights) -> torch.Tensor:
        write_weights(weights, tmp_path, torch.float32)
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        ids = torch.randint(weights.config["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            found: torch.Tensor = model(input_ids=ids, use_cache=False).logits
        return found

    return run


@pytest.mark.parametrize(("shape", "change"), CASES, ids=lambda value: getattr(value, "__name__", value))
def test_function_is_kept(tiny_weights: Make, logits: Logits, shape: str, change: Callable[..., Weights]) -> None:
    weights = tiny_weights(shape)
    changed = change(weights, seed=3)
    assert any(not torch.equal(tensor, changed.tensors[name]) for name, tensor in weights.tensors.items())
    assert torch.allclose(logits(weights), logits(changed), atol=2e-5, rtol=1e-4)


def test_several_changes_in_a_row_keep_the_function(tiny_weights: Make, logits: Logits) -> None:
    weights = tiny_weights("qwen2")
    changes = [functools.partial(change, seed=number) for number, change in enumerate(EVERYWHERE)]
    changed = functools.reduce(lambda so_far, change: change(so_far), changes, weights)
    assert torch.allclose(logits(weights), logits(changed), atol=1e-4, rtol=1e-3)


def test_a_rotation_without_folding_would_not_keep_the_function(tiny_weights: Make, logits: Logits) -> None:
    """The comparison of logits can fail."""
    weights = tiny_weights("llama")
    rotation = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0))).Q
    difference = logits(weights) - logits(symmetry.change_basis(weights, rotation))
    assert difference.abs().max() > 0.1


def test_rotation_leaves_ones_as_norms_and_an_untied_head(tiny_weights: Make) -> None:
    rotated = symmetry.rotate_residual(tiny_weights("qwen2"), seed=0)
    norms = [tensor for name, tensor in rotated.tensors.items() if name.endswith("norm.weight")]
    assert len(norms) == 7
    assert all(bool((norm == 1).all()) for norm in norms)
    assert "lm_head.weight" in rotated.tensors
    assert rotated.config["tie_word_embeddings"] is False


def test_permutations_are_exact(tiny_weights: Make) -> None:
    """Every value is found again, bit for bit."""
    weights = tiny_weights("mixtral")
    for change in (symmetry.permute_neurons, symmetry.permute_heads, symmetry.permute_residual):
        changed = change(weights, seed=5)
        for name, tensor in weights.tensors.items():
            assert torch.equal(tensor.flatten().sort().values, changed.tensors[name].flatten().sort().values), name


def test_the_weights_given_stay_as_they_are(tiny_weights: Make) -> None:
    weights = tiny_weights("llama")
    before = {name: tensor.clone() for name, tensor in weights.tensors.items()}
    for change in EVERYWHERE:
        change(weights, seed=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights.tensors.items())
    assert set(weights.tensors) == set(before)


def test_copied_experts_compute_what_the_dense_model_did(tiny_weights: Make, logits: Logits) -> None:
    weights = tiny_weights("llama")
    upcycled = derive.upcycle_copied(weights, seed=0, experts=4, chosen=2)
    assert torch.allclose(logits(weights), logits(upcycled), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", ["llama", "qwen2"])
def test_repeating_no_layer_keeps_the_function(tiny_weights: Make, logits: Logits, shape: str) -> None:
    weights = tiny_weights(shape)
    same, dropped = (derive.select_layers(weights, layers) for layers in ([0, 1, 2], [0, 2]))
    assert torch.equal(logits(weights), logits(same))
    assert not torch.allclose(logits(weights), logits(dropped), atol=1e-2)
    assert torch.equal(same.tensors[EMBEDDING], weights.tensors[EMBEDDING])
