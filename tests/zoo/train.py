"""Training of the zoo's models: float32 on one CPU thread, the same weights from every run on one machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from tests.zoo.ancestry import Training

VALIDATION_WINDOWS = 128


def windows(stream: Tensor, batch: tuple[int, int], seed: int) -> Iterator[Tensor]:
    """Endless random windows of a token stream, the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    count, length = batch
    while True:
        starts = torch.randint(len(stream) - length + 1, (count, 1), generator=generator)
        yield stream[starts + torch.arange(length)]


def rate_at(step: int, training: Training) -> float:
    """Linear warm-up over a twentieth of the steps, then a cosine to a tenth of the peak; steps count from 1."""
    warmup = max(1, training.steps // 20)
    if step <= warmup:
        return training.rate * step / warmup
    progress = (step - warmup) / max(1, training.steps - warmup)
    return training.rate * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


@torch.no_grad()
def validation_loss(model: Any, held_out: Tensor, batch: tuple[int, int]) -> float:
    """Mean loss in nats per token over evenly spread windows of the held-out text."""
    count, length = batch
    if len(held_out) < length:
        raise ValueError(f"{len(held_out)} held-out tokens, at least {length} are needed: use more of the text")
    whole = held_out[: len(held_out) // length * length].view(-1, length)
    chosen = whole[:: max(1, len(whole) // VALIDATION_WINDOWS)][:VALIDATION_WINDOWS]
    model.train(False)
    losses = [_text_loss(model, part).item() * len(part) for part in torch.split(chosen, count)]
    return sum(losses) / len(chosen)


def _text_loss(model: Any, ids: Tensor) -> Tensor:
    """Cross-entropy of the next token, without a mixture's auxiliary loss."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def _training_loss(model: Any, ids: Tensor, teacher: Any | None) -> Tensor:
    """The model's own loss on a batch, or its divergence from the teacher's predictions."""
    if teacher is None:
        loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
        return loss
    with torch.no_grad():
        target = functional.log_softmax(teacher(input_ids=ids, use_cache=False).logits, dim=-1).flatten(0, 1)
    student = functional.log_softmax(model(input_ids=ids, use_cache=False).logits, dim=-1).flatten(0, 1)
    return functional.kl_div(student, target, reduction="batchmean", log_target=True)


def train(
    model: Any,
    stream: Tensor,
    training: Training,
    order: int,
    teacher: Any | None = None,
    at_step: Callable[[int, Any], None] | None = None,
) -> list[tuple[int, float]]:
    """Train a transformers model in place; returns (step, loss before the update) for every hundredth part.

    `order` seeds the choice of windows; `at_step` is called after every update.
    """
    if training.lora:
        add_low_rank(model, training.lora, order)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=training.rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    log = []
    model.train()
    for step, ids in zip(range(1, training.steps + 1), windows(stream, training.batch, order), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, training)
        loss = _training_loss(model, ids, teacher)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        if step == 1 or step == training.steps or step % max(1, training.steps // 100) == 0:
            log.append((step, round(loss.item(), 4)))
        if at_step:
            at_step(step, model)
    if training.lora:
        merge_low_rank(model)
    return log


class LowRank(nn.Module):
    """W + B·A with B [rows, rank] zero at the start (Hu et al. 2021, arXiv 2106.09685)."""

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.a = nn.Parameter(torch.randn(rank, columns, generator=generator) / columns**0.5)
        self.b = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with the update added."""
        return weight + self.b @ self.a


def add_low_rank(model: Any, rank: int, seed: int) -> None:
    """Freeze the model and give every linear layer but the head a trainable update of this rank."""
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            parametrize.register_parametrization(module, "weight", LowRank(module.weight, rank, generator))


def merge_low_rank(model: Any) -> None:
    """Add the updates to the weights for good."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
