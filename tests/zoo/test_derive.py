"""Derivations that make another network: shapes, and what is kept of the parents."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.zoo import derive
from tests.zoo.weights import EMBEDDING, HEAD, Weights

Make = Callable[..., Weights]
UP = "model.layers.{}.mlp.up_proj.weight"


def test_rounding_leaves_few_values_and_is_close(tiny_weights: Make) -> None:
    weights = tiny_weights("llama")
    rounded = derive.round_weights(weights, bits=4, group=32)
    row, before = rounded.tensors[UP.format(0)][0], weights.tensors[UP.format(0)][0]
    assert len(torch.unique(row)) <= 15
    assert torch.nn.functional.cosine_similarity(row, before, dim=0) > 0.98
    assert torch.equal(rounded.tensors[EMBEDDING], weights.tensors[EMBEDDING])


def test_pruning_by_magnitude_zeroes_the_smallest(tiny_weights: Make) -> None:
    weights = tiny_weights("llama")
    before, after = weights.tensors[UP.format(1)], derive.prune_magnitude(weights, 0.5).tensors[UP.format(1)]
    assert (after == 0).float().mean() == pytest.approx(0.5, abs=0.01)
    assert before[after == 0].abs().max() <= before[after != 0].abs().min()


def test_neurons_are_pruned_together_and_in_order(tiny_weights: Make) -> None:
    weights = tiny_weights("llama")
    pruned = derive.prune_neurons(weights, keep=0.5)
    assert pruned.config["intermediate_size"] == 24
    rows = [int((weights.tensors[UP.format(0)] == row).all(1).nonzero()) for row in pruned.tensors[UP.format(0)]]
    assert rows == sorted(rows)
    down = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(pruned.tensors[down], weights.tensors[down][:, rows])


def test_up_scaling_repeats_layers(tiny_weights: Make) -> None:
    weights = tiny_weights("llama")
    scaled = derive.select_layers(weights, [0, 1, 1, 2])
    assert scaled.config["num_hidden_layers"] == 4
    origins = [(0, 0), (1, 1), (2, 1), (3, 2)]
    assert all(torch.equal(scaled.tensors[UP.format(new)], weights.tensors[UP.format(old)]) for new, old in origins)


def test_joined_halves_come_from_both(tiny_weights: Make) -> None:
    first, second = (tiny_weights("llama", seed=seed, num_hidden_layers=4) for seed in (1, 2))
    joined = derive.join_halves(first, second)
    sources = [first, first, second, second]
    for layer, source in enumerate(sources):
        assert torch.equal(joined.tensors[UP.format(layer)], source.tensors[UP.format(layer)])
    assert torch.equal(joined.tensors[EMBEDDING], first.tensors[EMBEDDING])
    assert torch.equal(joined.tensors[HEAD], second.tensors[HEAD])


def test_grafted_layers_are_the_donors_and_nothing_else_is(tiny_weights: Make) -> None:
    weights, donor = (tiny_weights("llama", seed=seed) for seed in (1, 2))
    grafted = derive.graft_layers(weights, donor, layers=[1])
    assert grafted.config == weights.config
    assert set(grafted.tensors) == set(weights.tensors)
    for name, tensor in grafted.tensors.items():
        source = donor if name.startswith("model.layers.1.") else weights
        assert torch.equal(tensor, source.tensors[name]), name


def test_merges_lie_between_their_parents(tiny_weights: Make) -> None:
    first, second = (tiny_weights("llama", seed=seed) for seed in (1, 2))
    one, two = (weights.tensors[UP.format(0)].flatten() for weights in (first, second))
    mean = derive.merge_linear(first, second).tensors[UP.format(0)].flatten()
    arc = derive.merge_slerp(first, second).tensors[UP.format(0)].flatten()
    assert torch.allclose(mean, (one + two) / 2)
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(arc, one, dim=0) == pytest.approx(float(cosine(arc, two, dim=0)), abs=0.05)
    assert float(arc.norm()) == pytest.approx(float(one.norm()), rel=0.05)  # a mean would be shorter by a third
    same = derive.merge_slerp(first, first)
    assert all(torch.allclose(tensor, first.tensors[name]) for name, tensor in same.tensors.items())


def test_partitioned_experts_share_out_the_neurons(tiny_weights: Make) -> None:
    weights = tiny_weights("llama")
    upcycled = derive.upcycle_partitioned(weights, seed=0, experts=4, chosen=2)
    parts = [upcycled.tensors[f"model.layers.0.block_sparse_moe.experts.{expert}.w3.weight"] for expert in range(4)]
    found = torch.cat(parts)
    assert torch.equal(found[:, 0].sort().values, weights.tensors[UP.format(0)][:, 0].sort().values)
    with pytest.raises(ValueError, match="cannot be divided"):
        derive.upcycle_partitioned(weights, seed=0, experts=5, chosen=2)


def test_only_what_is_asked_for_is_kept(tiny_weights: Make) -> None:
    weights = tiny_weights("llama")

    def kept(**options: object) -> set[str]:
        changed = derive.keep_only(weights, seed=0, **options)  # type: ignore[arg-type]
        return {name for name, tensor in weights.tensors.items() if torch.equal(tensor, changed.tensors[name])}

    assert kept(embeddings=True) == {EMBEDDING, HEAD}
    assert kept(layers=[1]) == {name for name in weights.tensors if name.startswith("model.layers.1.")}


def test_a_new_vocabulary_leaves_the_layers(tiny_weights: Make) -> None:
    weights = tiny_weights("llama")
    changed = derive.replace_vocabulary(weights, seed=0, size=70)
    assert changed.tensors[EMBEDDING].shape == changed.tensors[HEAD].shape == (70, 32)
    assert changed.config["vocab_size"] == 70
    assert torch.equal(changed.tensors[UP.format(2)], weights.tensors[UP.format(2)])


def test_shuffling_keeps_the_values_and_nothing_else(tiny_weights: Make) -> None:
    weights = tiny_weights("llama")
    before, after = weights.tensors[UP.format(0)], derive.shuffle(weights, seed=0).tensors[UP.format(0)]
    assert torch.equal(before.flatten().sort().values, after.flatten().sort().values)
    assert abs(float(torch.corrcoef(torch.stack([before.flatten(), after.flatten()]))[0, 1])) < 0.15


def test_noise_is_as_large_as_asked_for(tiny_weights: Make) -> None:
    weights = tiny_weights("llama")
    noisy = derive.add_noise(weights, seed=0, scale=1.0)
    difference = noisy.tensors[EMBEDDING] - weights.tensors[EMBEDDING]
    assert float(difference.std() / weights.tensors[EMBEDDING].std()) == pytest.approx(1, abs=0.05)


def test_initial_weights_follow_from_names_shapes_and_seed(tiny_weights: Make) -> None:
    """Anyone can draw them again: one generator, sorted names, matrices normal with deviation 0.02."""
    weights = tiny_weights("qwen2")
    fresh = derive.fresh_like(weights, seed=9)
    generator = torch.Generator().manual_seed(9)
    for name in sorted(weights.tensors):
        shape = weights.tensors[name].shape
        if name.endswith("bias"):
            expected = torch.zeros(shape)
        elif "norm" in name:
            expected = torch.ones(shape)
        else:
            expected = 0.02 * torch.randn(shape, generator=generator)
        assert torch.equal(fresh.tensors[name], expected), name
