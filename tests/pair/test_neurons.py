"""Which hidden units of two checkpoints are tested against each other."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checks.checkpoint.checkpoint import Checkpoint
from checks.pair.neurons import NeuronGroup, joint_tests, neuron_groups, unit_tests
from checks.statistics.units import UnitTest, combine, critical_z, unit_permutation_test
from tests.pair.random_tensors import Tensors, mixtral, noisy, normal

Llama = Callable[..., Tensors]
Save = Callable[..., Path]


def test_every_mlp_of_equal_shape_is_one_group(llama_tensors: Llama, save_checkpoint: Save) -> None:
    ours = Checkpoint(save_checkpoint("ours", llama_tensors(1)))
    theirs = Checkpoint(save_checkpoint("theirs", noisy(llama_tensors(1), 3.0)))
    groups = neuron_groups(ours, theirs)
    assert [(group.layer, group.category, group.expert) for group in groups] == [(n, "mlp", None) for n in range(3)]
    assert all(group.test.units == 176 for group in groups)
    assert all((group.test.z or 0) > 10 for group in groups)


def test_experts_are_compared_by_index(save_checkpoint: Save) -> None:
    ours, theirs = mixtral(1), mixtral(2, experts=5)
    for kind in ("w1", "w2", "w3"):
        name = f"model.layers.1.block_sparse_moe.experts.2.{kind}.weight"
        ours[name] = theirs[name] + 0.02 * normal(7, *theirs[name].shape)
    groups = neuron_groups(Checkpoint(save_checkpoint("a", ours)), Checkpoint(save_checkpoint("b", theirs)))
    assert len(groups) == 6
    scores = {(group.layer, group.expert): abs(group.test.z or 0) for group in groups}
    assert scores.pop((1, 2)) > 10
    assert max(scores.values()) < 5
    assert {group.category for group in groups} == {"routed expert"}


def test_mlps_of_other_shapes_or_without_numbers_are_not_tested(llama_tensors: Llama, save_checkpoint: Save) -> None:
    ours = Checkpoint(save_checkpoint("ours", llama_tensors(1)))
    assert neuron_groups(ours, Checkpoint(save_checkpoint("wide", llama_tensors(1, intermediate_size=180)))) == []
    nameless = {f"tensor{number}": tensor for number, tensor in enumerate(llama_tensors(1).values())}
    unnumbered = Checkpoint(save_checkpoint("nameless", nameless))
    assert neuron_groups(unnumbered, unnumbered) == []


def test_nonfinite_mlp_has_no_score_and_says_why(llama_tensors: Llama, save_checkpoint: Save) -> None:
    broken = llama_tensors(1)
    broken["model.layers.1.mlp.down_proj.weight"][0, 0] = math.nan
    groups = neuron_groups(
        Checkpoint(save_checkpoint("ours", broken)), Checkpoint(save_checkpoint("theirs", llama_tensors(1)))
    )
    assert [group.test.z is None for group in groups] == [False, True, False]
    assert "non-finite" in str(groups[1].test.reason)


def test_mlps_of_two_towers_with_the_same_layer_numbers_are_all_tested(
    llama_tensors: Llama, save_checkpoint: Save
) -> None:
    """A text decoder beside a vision tower, or beside the prediction block mtp.layers.0 of K-EXAONE."""
    text = llama_tensors(1)
    tower = {
        name.replace("model.layers", "visual.blocks"): tensor
        for name, tensor in llama_tensors(2, intermediate_size=80).items()
        if "mlp" in name
    }
    ours = Checkpoint(save_checkpoint("ours", text | tower))
    theirs = Checkpoint(save_checkpoint("theirs", noisy(text, 1.0) | tower))
    assert sorted(group.test.units for group in neuron_groups(ours, theirs)) == [80] * 3 + [176] * 3
    text_only = Checkpoint(save_checkpoint("text", noisy(text, 1.0)))
    assert [group.test.units for group in neuron_groups(ours, text_only)] == [176] * 3


@pytest.mark.parametrize("leaf", ["weight_scale_inv", "lora_B.weight"])
def test_scales_and_adapters_of_a_matrix_are_not_taken_for_it(
    leaf: str, llama_tensors: Llama, save_checkpoint: Save
) -> None:
    """FP8 checkpoints keep a matrix of block scales beside each weight."""
    tensors = llama_tensors(1)
    scales = {
        name.replace("weight", leaf): 1 + normal(number, *(size // 8 for size in tensor.shape)).abs()
        for number, (name, tensor) in enumerate(tensors.items())
        if ".mlp." in name
    }
    packed = {name: t.to(torch.float8_e4m3fn) if ".mlp." in name else t for name, t in tensors.items()}
    for ours, units in ((tensors, [176] * 3), (packed, [])):
        checkpoint = Checkpoint(save_checkpoint("ours" + str(len(units)), ours | scales))
        assert [group.test.units for group in neuron_groups(checkpoint, checkpoint)] == units


@given(layers=st.integers(1, 60), score=st.floats(20, 60))
def test_detectable_effect_falls_with_the_number_of_layers(layers: int, score: float) -> None:
    one, many = combine([UnitTest(0.0, 0.0, score, 8)]), combine([UnitTest(0.0, 0.0, score, 8)] * layers)
    assert one is not None
    assert many is not None
    critical = critical_z(1e-6, 1)
    assert many.detectable_effect(critical) == pytest.approx(one.detectable_effect(critical) / math.sqrt(layers))


def routed(layer: int, expert: int | None, test: UnitTest) -> NeuronGroup:
    category = "mlp" if expert is None else "routed expert"
    return NeuronGroup(f"layers.{layer}.{expert}", layer, category, expert, 1, test, None)


def test_experts_of_two_models_made_from_dense_ones_count_once() -> None:
    """Each expert is a slightly changed copy of its model's dense MLP, so that all scores of a layer are the same."""
    scores = []
    for draw in range(200):
        groups = []
        for layer in range(2):
            ours, theirs = normal(4 * draw + layer, 20, 6), normal(4 * draw + layer + 100_002, 20, 6)
            for expert in range(8):
                views = [base + 0.1 * normal(expert + 50 * side, 20, 6) for side, base in enumerate((ours, theirs))]
                groups.append(routed(layer, expert, unit_permutation_test(views[:1], views[1:])))
        (joint,) = joint_tests(groups)
        assert joint.tests == 2
        scores.append(joint.z)
    assert 0.8 < torch.tensor(scores).std() < 1.2


def test_dense_and_shared_mlps_count_each_and_experts_once_a_layer() -> None:
    dense, one, other = UnitTest(1.0, 0.1, 10.0, 8), UnitTest(2.0, 0.1, 20.0, 8), UnitTest(4.0, 0.2, 20.0, 8)
    groups = [routed(0, None, dense), routed(1, None, dense), routed(1, 0, one), routed(1, 1, other), routed(2, 0, one)]
    (joint,) = joint_tests(groups)
    assert joint.tests == 4
    assert joint.z == pytest.approx((1 + 1 + 3 + 2) / 2)
    assert joint.z == pytest.approx(joint.effect * joint.total_scale / 2)
    tests = unit_tests(groups, 5)
    assert tests is not None
    assert len(tests.single) == 5
    assert tests.coverage == 1
