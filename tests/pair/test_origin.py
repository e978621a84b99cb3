"""Initial weights beside a candidate and a reference, read from files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from checks.checkpoint.checkpoint import Checkpoint
from checks.checkpoint.initial import regenerate
from checks.claim.initial import InitialWeights
from checks.claim.model import ModelSource
from checks.pair.origin import Origin, origin

Tensors = dict[str, torch.Tensor]
SEED = 21
STATED = InitialWeights("torch", SEED)


def opened(source: ModelSource) -> Checkpoint:
    assert source.path is not None
    return Checkpoint(Path(source.path))


class Workshop:
    """Makes checkpoints in a directory."""

    def __init__(self, save: Callable[..., Path], config: dict[str, Any], template: Tensors, directory: Path) -> None:
        self._save, self._config, self._directory = save, config, directory
        self._template = template

    def store(self, name: str, tensors: Tensors, **config: Any) -> Checkpoint:
        """These tensors as a checkpoint."""
        return Checkpoint(self._save(name, tensors, {**self._config, **config}))

    def start(self, seed: int = SEED) -> Tensors:
        """The initial weights that the generator gives."""
        made = regenerate(self.store("template", self._template), "torch", seed, self._directory / f"start{seed}")
        return {name: made.read(name) for name in made.tensors}


@pytest.fixture
def workshop(
    save_checkpoint: Callable[..., Path],
    llama_config: Callable[..., dict[str, Any]],
    llama_tensors: Callable[..., Tensors],
    tmp_path: Path,
) -> Workshop:
    return Workshop(save_checkpoint, llama_config(), llama_tensors(0), tmp_path)


def trained(tensors: Tensors, seed: int, size: float = 1.0) -> Tensors:
    """With something learned: `size` times what the initial weights spread."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: tensor + size * 0.02 * torch.randn(tensor.shape, generator=generator) for name, tensor in tensors.items()
    }


def compared(workshop: Workshop, ours: Tensors, theirs: Tensors, stated: InitialWeights = STATED) -> Origin:
    return origin(stated, workshop.store("ours", ours), workshop.store("theirs", theirs), opened)


def test_a_twin_shares_the_start_and_nothing_beyond(workshop: Workshop) -> None:
    start = workshop.start()
    found = compared(workshop, trained(start, 1), trained(start, 2))
    assert found.regenerated
    assert found.mlps == 3
    assert found.start is not None
    assert found.start.z > 50
    assert found.reference_start is not None
    assert found.reference_start.z > 50
    assert set(found.beyond) == {"mlp", "attention", "embedding"}
    assert found.beyond_by_size is not None
    assert found.beyond_by_size < 0.05


def test_a_derived_model_shares_what_was_learned(workshop: Workshop) -> None:
    parent = trained(workshop.start(), 1)
    found = compared(workshop, trained(parent, 2, 0.3), parent)
    assert found.beyond_by_size is not None
    assert found.beyond_by_size > 0.8
    assert min(test.effect for test in found.beyond.values()) > 0.8


@pytest.mark.parametrize(("part", "group"), [("mlp", "mlp"), ("self_attn", "attention"), ("embed_tokens", "embedding")])
def test_one_part_that_was_taken_over_is_seen(part: str, group: str, workshop: Workshop) -> None:
    start = workshop.start()
    twin, parent = trained(start, 1), trained(start, 2)
    taken = {name: parent[name] if part in name else tensor for name, tensor in twin.items()}
    found = compared(workshop, taken, parent)
    effects = {name: abs(test.effect) for name, test in found.beyond.items()}
    assert effects.pop(group) > 0.4
    assert max(effects.values()) < 0.1


def test_a_seed_that_is_not_that_of_the_candidate_leaves_no_trace(workshop: Workshop) -> None:
    start = workshop.start()
    found = compared(workshop, trained(start, 1), trained(start, 2), InitialWeights("torch", SEED + 1))
    assert found.start is not None
    assert abs(found.start.z) < 5
    assert found.beyond_by_size is not None
    assert found.beyond_by_size > 0.3


def test_published_weights_alone_are_not_made_again(workshop: Workshop) -> None:
    start = workshop.start()
    workshop.store("published", start)
    stated = InitialWeights(checkpoint=source(workshop, "published"))
    found = compared(workshop, trained(start, 1), trained(start, 2), stated)
    assert not found.regenerated
    assert "can be made up" in found.reason
    assert found.start is not None
    assert found.start.z > 50


def test_published_weights_must_be_those_of_the_seed(workshop: Workshop) -> None:
    start = workshop.start()
    workshop.store("same", start)
    workshop.store("other", {**start, "lm_head.weight": start["lm_head.weight"] + 1e-3})
    twins = trained(start, 1), trained(start, 2)
    same = compared(workshop, *twins, InitialWeights("torch", SEED, source(workshop, "same")))
    assert same.regenerated
    other = compared(workshop, *twins, InitialWeights("torch", SEED, source(workshop, "other")))
    assert not other.regenerated
    assert f"only {len(start) - 1} of {len(start)} tensors" in other.reason


def test_steps_leave_the_start_one_after_the_other(workshop: Workshop) -> None:
    start = workshop.start()
    for number, size in enumerate((0.5, 1.0, 3.0)):
        workshop.store(f"step{number}", trained(start, 1, size))
    steps = tuple(source(workshop, f"step{number}") for number in range(3))
    found = compared(workshop, trained(start, 1, 4.0), trained(start, 2), InitialWeights("torch", SEED, steps=steps))
    effects = [effect for effect in found.steps.values() if effect is not None]
    assert len(effects) == 3
    assert effects == sorted(effects, reverse=True)
    assert effects[0] > 0.8


def test_a_reference_of_other_shape_has_nothing_to_compare(
    workshop: Workshop, llama_tensors: Callable[..., Tensors]
) -> None:
    other = {"hidden_size": 32, "head_dim": 8, "intermediate_size": 80, "vocab_size": 128}
    theirs = workshop.store("theirs", llama_tensors(3, **other), **other)
    found = origin(STATED, workshop.store("ours", trained(workshop.start(), 1)), theirs, opened)
    assert (found.start, found.beyond, found.beyond_by_size, found.mlps) == (None, {}, None, 0)


def test_values_that_are_no_numbers_are_left_out(workshop: Workshop) -> None:
    start = workshop.start()
    ours, theirs = trained(start, 1), trained(start, 2)
    ours["model.layers.1.mlp.up_proj.weight"][3, 3] = torch.nan
    ours["model.layers.1.self_attn.q_proj.weight"][3, 3] = torch.nan
    found = compared(workshop, ours, theirs)
    assert found.mlps == 2
    assert found.beyond_by_size is not None
    assert found.beyond_by_size < 0.05


def source(workshop: Workshop, name: str) -> ModelSource:
    return ModelSource(name=name, path=str(workshop._directory / name))
