"""Initial weights made again from a generator and a seed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from checks.checkpoint import initial
from checks.checkpoint.checkpoint import Checkpoint
from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.initial import equal_bits, regenerate

Tensors = dict[str, torch.Tensor]
Candidate = Callable[..., Checkpoint]


@pytest.fixture
def candidate(
    save_checkpoint: Callable[..., Path],
    llama_config: Callable[..., dict[str, Any]],
    llama_tensors: Callable[..., Tensors],
) -> Candidate:
    """A small Llama; `changes` of its configuration, `extra` tensors."""

    def make(extra: Tensors | None = None, dtype: torch.dtype = torch.float32, **changes: Any) -> Checkpoint:
        shape = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8, **changes}
        tensors = llama_tensors(1, dtype, **shape) | (extra or {})
        return Checkpoint(save_checkpoint("candidate", tensors, llama_config(**shape)))

    return make


def values(checkpoint: Checkpoint) -> Tensors:
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


@pytest.mark.parametrize("generator", ["torch", "transformers"])
def test_one_seed_gives_the_same_bits_and_another_gives_others(
    generator: str, candidate: Candidate, tmp_path: Path
) -> None:
    model = candidate()
    one, again, other = (
        regenerate(model, generator, seed, tmp_path / name) for seed, name in ((5, "one"), (5, "again"), (6, "other"))
    )
    total = len(model.tensors)
    assert equal_bits(one, again) == (total, total)
    # Norms begin at one whatever the seed.
    assert equal_bits(one, other) == (sum("norm" in name for name in model.tensors), total)
    assert {entry.shape for entry in one.tensors.values()} == {entry.shape for entry in model.tensors.values()}


def test_torch_draws_by_sorted_name_with_the_stated_deviation(candidate: Candidate, tmp_path: Path) -> None:
    """Written out once more, as a claimant would do it."""
    made = values(regenerate(candidate(initializer_range=0.1), "torch", 11, tmp_path / "made"))
    generator = torch.Generator().manual_seed(11)
    for name in sorted(made):
        if "norm" in name:
            assert bool((made[name] == 1).all())
        else:
            assert torch.equal(made[name], 0.1 * torch.randn(made[name].shape, generator=generator))


def test_biases_begin_at_zero(candidate: Candidate, tmp_path: Path) -> None:
    bias = "model.layers.0.self_attn.q_proj.bias"
    made = regenerate(candidate({bias: torch.randn(32)}), "torch", 1, tmp_path / "made")
    assert bool((made.read(bias) == 0).all())


def test_transformers_draws_what_its_users_draw(candidate: Candidate, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    model = candidate()
    made = values(regenerate(model, "transformers", 3, tmp_path / "made"))
    torch.manual_seed(3)
    drawn = AutoModelForCausalLM.from_config(LlamaConfig(**{**model.config, "model_type": "llama"})).state_dict()
    assert made.keys() == drawn.keys()
    assert all(torch.equal(made[name], drawn[name].float()) for name in made)


def test_the_random_state_of_the_process_stays_as_it_was(candidate: Candidate, tmp_path: Path) -> None:
    state = torch.random.get_rng_state()
    regenerate(candidate(), "transformers", 3, tmp_path / "made")
    assert torch.equal(state, torch.random.get_rng_state())


def test_published_weights_may_have_fewer_bits_than_were_drawn(candidate: Candidate, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    made = regenerate(candidate(), "torch", 5, tmp_path / "made")
    published = {name: tensor.bfloat16() for name, tensor in values(made).items()}
    (tmp_path / "published").mkdir()
    save_file(published, tmp_path / "published" / "model.safetensors")
    total = len(made.tensors)
    assert equal_bits(made, Checkpoint(tmp_path / "published")) == (total, total)
    name = "model.layers.1.mlp.up_proj.weight"
    published[name] = published[name].clone()
    published[name][0, 0] += 1
    published.pop("model.norm.weight")
    (tmp_path / "other").mkdir()
    save_file(published, tmp_path / "other" / "model.safetensors")
    assert equal_bits(made, Checkpoint(tmp_path / "other")) == (total - 2, total)


@pytest.mark.parametrize(
    ("generator", "seed", "words"),
    [("numpy", 1, "unknown generator"), ("torch", -1, "seed"), ("torch", 2**32, "seed")],
)
def test_what_cannot_be_made_again_is_unavailable(
    generator: str, seed: int, words: str, candidate: Candidate, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointUnavailable, match=words):
        regenerate(candidate(), generator, seed, tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_a_configuration_that_does_not_fit_is_unavailable(candidate: Candidate, tmp_path: Path) -> None:
    for changes, words in (
        ({"extra": {"model.layers.0.extra.weight": torch.randn(4, 4)}}, "have no tensor"),
        ({"model_type": "no such type"}, "cannot build"),
    ):
        with pytest.raises(CheckpointUnavailable, match=words):
            regenerate(candidate(**changes), "transformers", 1, tmp_path / "made")
    model = candidate()
    config = json.loads((tmp_path / "candidate" / "config.json").read_text()) | {"intermediate_size": 40}
    (tmp_path / "candidate" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointUnavailable, match="does not fit the weights"):
        regenerate(Checkpoint(tmp_path / "candidate"), "transformers", 1, tmp_path / "made")
    assert model.tensors


def test_a_model_too_large_for_the_memory_is_unavailable(
    candidate: Candidate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(initial, "LARGEST_BYTES", 1000)
    with pytest.raises(CheckpointUnavailable, match="publish them"):
        regenerate(candidate(), "torch", 1, tmp_path / "made")
