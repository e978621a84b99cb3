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
from checks.pair.origin import FEWEST_ROWS, Origin, origin

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


def beyond(found: Origin, *groups: str) -> float:
    """The size of the largest effect beyond the initial weights."""
    largest = found.largest_beyond(*(groups or ("mlp", "matrix", "embedding")))
    assert largest is not None
    assert largest.beyond is not None
    return abs(largest.beyond)


def weakest(found: Origin) -> tuple[str, float]:
    """The part with the least trace of the initial weights, and its z."""
    assert found.weakest_start is not None
    assert found.weakest_start.start is not None
    return found.weakest_start.name, found.weakest_start.start


def test_a_twin_shares_the_start_and_nothing_beyond(workshop: Workshop) -> None:
    start = workshop.start()
    found = compared(workshop, trained(start, 1), trained(start, 2))
    assert found.regenerated
    assert found.mlps == 3
    assert found.start is not None
    assert found.start.z > 50
    assert found.reference_start is not None
    assert found.reference_start.z > 50
    assert {one.group for one in found.blocks} == {"mlp", "matrix", "embedding"}
    assert len(found.blocks) == 3 * (1 + 4) + 2
    assert weakest(found)[1] > 5
    assert found.unmeasured == ()
    assert beyond(found, "mlp") < 0.1
    assert beyond(found) < 0.25, "matrices of 16 and 32 rows"


def test_a_derived_model_shares_what_was_learned(workshop: Workshop) -> None:
    parent = trained(workshop.start(), 1)
    found = compared(workshop, trained(parent, 2, 0.3), parent)
    assert min(one.beyond or 0.0 for one in found.blocks) > 0.8


@pytest.mark.parametrize(
    ("taken", "group"),
    [
        ("layers.1.mlp", "mlp"),
        ("layers.2.self_attn.k_proj", "matrix"),
        ("layers.0.self_attn.o_proj", "matrix"),
        ("embed_tokens", "embedding"),
        ("lm_head", "embedding"),
    ],
)
def test_one_part_that_was_taken_over_is_not_lost_among_the_others(taken: str, group: str, workshop: Workshop) -> None:
    start = workshop.start()
    twin, parent = trained(start, 1), trained(start, 2)
    grafted = {name: trained({name: parent[name]}, 3, 0.02)[name] if taken in name else twin[name] for name in twin}
    found = compared(workshop, grafted, parent)
    assert beyond(found, group) > 0.99
    assert beyond(found, *({"mlp", "matrix", "embedding"} - {group})) < 0.3


@pytest.mark.parametrize("how", ["another place", "another order"])
def test_a_part_that_was_taken_over_in_disguise_shows_no_trace_of_the_start(how: str, workshop: Workshop) -> None:
    """What it shares with the reference stands elsewhere, so nothing is seen where the start would be."""
    start = workshop.start()
    twin, parent = trained(start, 1), trained(start, 2)
    if how == "another place":
        taken = {
            name.replace("layers.2.mlp", "layers.1.mlp"): t for name, t in parent.items() if "layers.2.mlp" in name
        }
    else:
        order = torch.randperm(parent["model.layers.1.mlp.up_proj.weight"].shape[0])
        taken = {name: parent[name] for name in parent if "layers.1.mlp" in name}
        taken = {name: t[:, order] if "down" in name else t[order] for name, t in taken.items()}
    assert len(taken) == 3
    found = compared(workshop, {**twin, **taken}, parent)
    assert beyond(found, "mlp") < 0.1
    name, z = weakest(found)
    assert name == "layer 1 MLP"
    assert abs(z) < 5


def test_parts_that_the_reference_lacks_are_named(workshop: Workshop) -> None:
    start = workshop.start()
    shorter = {name: tensor for name, tensor in trained(start, 2).items() if "layers.2." not in name}
    theirs = workshop.store("theirs", shorter, num_hidden_layers=2)
    found = origin(STATED, workshop.store("ours", trained(start, 1)), theirs, opened)
    assert found.unmeasured == ("layer 2 MLP", *(f"layer 2 {part}" for part in "koqv"))
    assert weakest(found)[1] > 5


def test_a_matrix_of_few_rows_is_not_asked_where_it_began(
    save_checkpoint: Callable[..., Path],
    llama_config: Callable[..., dict[str, Any]],
    llama_tensors: Callable[..., Tensors],
    tmp_path: Path,
) -> None:
    shape = {"num_key_value_heads": 1, "head_dim": FEWEST_ROWS // 2}
    workshop = Workshop(save_checkpoint, llama_config(**shape), llama_tensors(0, **shape), tmp_path)
    start = workshop.start()
    found = compared(workshop, trained(start, 1), trained(start, 2))
    assert {one.name for one in found.blocks if one.name.startswith("layer 0")} == {
        "layer 0 MLP",
        "layer 0 q",
        "layer 0 o",
    }


def test_a_seed_that_is_not_that_of_the_candidate_leaves_no_trace(workshop: Workshop) -> None:
    start = workshop.start()
    found = compared(workshop, trained(start, 1), trained(start, 2), InitialWeights("torch", SEED + 1))
    assert found.start is not None
    assert abs(found.start.z) < 5
    assert beyond(found, "mlp") > 0.3


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
    assert found.start is not None
    assert found.start.z > 50
    assert found.reference_start is None
    assert len(found.unmeasured) == len(found.blocks)
    assert found.largest_beyond("mlp", "matrix", "embedding") is None


def test_values_that_are_no_numbers_show_nothing(workshop: Workshop) -> None:
    start = workshop.start()
    ours, theirs = trained(start, 1), trained(start, 2)
    ours["model.layers.1.mlp.up_proj.weight"][3, 3] = torch.nan
    theirs["model.layers.1.self_attn.q_proj.weight"][3, 3] = torch.nan
    found = compared(workshop, ours, theirs)
    assert found.mlps == 2
    assert found.unmeasured == ("layer 1 MLP", "layer 1 q")
    assert found.weakest_start is not None
    assert (found.weakest_start.name, found.weakest_start.start) == ("layer 1 MLP", None)


def source(workshop: Workshop, name: str) -> ModelSource:
    return ModelSource(name=name, path=str(workshop._directory / name))
