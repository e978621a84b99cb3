"""Training is repeatable, learns, and follows the recipe: distillation, low-rank updates, order of the data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.zoo.ancestry import Training
from tests.zoo.train import rate_at, train, validation_loss, windows
from tests.zoo.weights import Weights, write_weights

Open = Callable[..., Any]
STREAM = (torch.arange(4000) * 7 % 96).long()
"""Every token follows from the one before it."""


@pytest.fixture
def network(tiny_weights: Callable[..., Weights], tmp_path: Path) -> Open:
    """Opens a tiny model of a shape, always the same one for a seed."""

    def make(shape: str = "llama", seed: int = 0) -> Any:
        directory = tmp_path / f"{shape}{seed}"
        directory.mkdir(exist_ok=True)
        write_weights(tiny_weights(shape, seed), directory, torch.float32)
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)

    return make


def recipe(**changes: Any) -> Training:
    """A short training."""
    return Training(**{"text": "a", "steps": 30, "rate": 3e-3, "batch": (4, 16), **changes})


@pytest.mark.parametrize("shape", ["llama", "qwen2", "mixtral"])
def test_training_learns_and_repeats_bit_for_bit(network: Open, shape: str) -> None:
    first, second = network(shape), network(shape)
    before = validation_loss(first, STREAM, (4, 16))
    logs = [train(model, STREAM, recipe(), order=1) for model in (first, second)]
    assert validation_loss(first, STREAM, (4, 16)) < before - 0.5
    assert logs[0] == logs[1]
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    assert all(torch.equal(one, two) for one, two in pairs)


def test_another_order_of_the_data_ends_elsewhere(network: Open) -> None:
    first, second = network(), network()
    train(first, STREAM, recipe(steps=3), order=1)
    train(second, STREAM, recipe(steps=3), order=2)
    assert not torch.equal(first.lm_head.weight, second.lm_head.weight)
    assert torch.equal(next(windows(STREAM, (4, 16), 1)), next(windows(STREAM, (4, 16), 1)))


def test_a_low_rank_update_has_that_rank_and_spares_the_embedding(network: Open) -> None:
    before, tuned = network(), network()
    train(tuned, STREAM, recipe(lora=2), order=1)
    names = dict(before.named_parameters())
    assert set(names) == {name for name, _ in tuned.named_parameters()}
    update = tuned.model.layers[1].mlp.up_proj.weight - before.model.layers[1].mlp.up_proj.weight
    assert torch.linalg.matrix_rank(update.detach(), rtol=1e-3) == 2
    assert torch.equal(tuned.model.embed_tokens.weight, before.model.embed_tokens.weight)
    assert torch.equal(tuned.lm_head.weight, before.lm_head.weight)


def test_a_student_comes_nearer_to_its_teacher_and_leaves_it_alone(network: Open) -> None:
    teacher, student = network(seed=1), network(seed=2)
    kept = teacher.lm_head.weight.clone()
    log = train(student, STREAM, recipe(), order=1, teacher=teacher)
    assert log[-1][1] < 0.8 * log[0][1]
    assert torch.equal(teacher.lm_head.weight, kept)


def test_every_step_is_reported(network: Open) -> None:
    seen: list[int] = []
    log = train(network(), STREAM, recipe(steps=5), order=1, at_step=lambda step, _: seen.append(step))
    assert seen == [1, 2, 3, 4, 5]
    assert [step for step, _ in log] == seen


def test_the_rate_rises_and_falls() -> None:
    training = recipe(steps=100)
    rates = [rate_at(step, training) for step in range(1, 101)]
    assert max(rates) == rates[4] == pytest.approx(3e-3)
    assert rates[0] == pytest.approx(3e-3 / 5)
    assert rates[-1] == pytest.approx(3e-4)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert training.tokens == 100 * 64
