from __future__ import annotations

import math
from pathlib import Path

import torch

from checks.checkpoint.canonical import CanonicalModel
from checks.pair.anchored_matching import match_by_anchors
from checks.pair.mlp_pairs import map_layers, pair_mlps
from checks.pair.mlp_samples import MlpSamples, name_of, sample_mlps, spread
from checks.pair.probed_matching import match_by_tokens
from tests.pair.counting import opened
from tests.pair.example_models import ALL, example, save, weights
from tests.zoo import derive, symmetry
from tests.zoo.weights import write_weights


def test_repeated_layers_are_mapped_and_kept_out_of_the_null(tmp_path: Path) -> None:
    deeper = symmetry.rotate_residual(derive.select_layers(weights("derived"), [0, 1, 2, 1, 2, 3]), 2)
    pairing = pair_mlps(*sample_mlps(save(tmp_path / "deeper", deeper), example("base")))
    assert list(pairing.layer_map.values()) == [0, 1, 2, 1, 2, 3]
    assert pairing.copies == (((1, 3), (2, 4)), ())
    together = {(one.layer, other.layer) for one, other in pairing.mismatched}
    assert not together & {(1, 1), (3, 1), (2, 2), (4, 2)}
    assert len(together) == 16
    assert pairing.searched == 24


def test_some_layers_and_a_given_map() -> None:
    samples = sample_mlps(example("derived"), example("base"), layers=((1, 2), (0, 1, 2)))
    assert map_layers(*samples) == {1: 1, 2: 2}
    pairing = pair_mlps(*samples, {1: 0, 2: 2, 3: 3})
    assert [(one.layer, other.layer) for one, other in pairing.mapped] == [(1, 0), (2, 2)]
    assert pairing.searched == 2
    nothing = sample_mlps(example("derived"), example("base"), layers=((), (0,)))
    assert map_layers(*nothing) == {}
    assert pair_mlps(*nothing).mapped == ()
    for test in (match_by_anchors(*nothing), match_by_tokens(*nothing, ALL)):
        assert "no pair of MLPs" in test.abstains_because


def test_many_experts_are_sampled_on_the_side_of_the_candidate(tmp_path: Path) -> None:
    mixture = save(tmp_path / "mixture", derive.upcycle_partitioned(weights("base"), 1, 32, 2))
    pairing = pair_mlps(*sample_mlps(mixture, mixture))
    assert len(pairing.mapped) == 16
    assert all(one == other for one, other in pairing.mapped)
    # 4 x 4 layers, and 16 of 32 experts against all in each
    assert pairing.searched == 16 + 4 * 16 * 32


def test_samples_are_kept_within_bounds() -> None:
    one = 3 * 352 * 128 * 4
    samples = MlpSamples(example("base"), 512, kept_bytes=2 * one)
    places = [samples.places[layer][0] for layer in samples.places]
    first = samples.neurons(places[0])
    assert samples.neurons(places[0]) is first
    for place in places[1:]:
        samples.neurons(place)
    again = samples.neurons(places[0])
    assert again is not first
    assert torch.equal(again.fixed, first.fixed)
    assert MlpSamples(example("base"), 100).neurons(places[0]).count == 100
    assert list(MlpSamples(example("base"), 100, layers=(1, 2)).places) == [1, 2]
    assert name_of(places[0]) == "dense"
    assert spread([1, 2, 3, 4, 5], 3) == [1, 3, 5]
    assert spread([1, 2], 3) == [1, 2]


def test_a_neuron_that_is_not_finite_is_left_out(tmp_path: Path) -> None:
    changed = weights("base").copy()
    name = "model.layers.1.mlp.up_proj.weight"
    changed.tensors[name] = changed.tensors[name].clone()
    changed.tensors[name][0, 0] = math.nan
    ours, theirs = sample_mlps(save(tmp_path / "broken", changed), example("base"))
    assert pair_mlps(ours, theirs).layer_map == {layer: layer for layer in example("base").layers}
    assert ours.neurons(ours.places[1][0]).count == theirs.neurons(theirs.places[1][0]).count - 1


def test_each_mlp_is_read_once_though_few_are_kept(tmp_path: Path) -> None:
    """Of a layer of 192 experts a second reading would cost 17 GB."""
    write_weights(derive.upcycle_partitioned(weights("base"), 1, 32, 2), tmp_path)
    (ours, our_source), (theirs, their_source) = opened(tmp_path), opened(tmp_path)
    samples = [
        MlpSamples(CanonicalModel(one), 512, layers=(1,), kept_bytes=4 * 3 * 11 * 128 * 4) for one in (ours, theirs)
    ]
    pairing = pair_mlps(samples[0], samples[1], {1: 1})
    assert len(pairing.mapped) == 16
    assert all(one == other for one, other in pairing.mapped)
    experts = [name for name in theirs.tensors if ".layers.1." in name and ".experts." in name]
    assert len(experts) == 3 * 32
    assert {their_source.times(theirs, name) for name in experts} == {1}
    times = [our_source.times(ours, name) for name in experts]
    assert sorted(times) == [0] * 3 * 16 + [1] * 3 * 16


def test_a_single_mlp_on_either_side_needs_no_search() -> None:
    pairing = pair_mlps(*sample_mlps(example("derived"), example("base")), {0: 0, 1: 1})
    assert [(one.layer, other.layer) for one, other in pairing.mapped] == [(0, 0), (1, 1)]
    assert pairing.searched == 2


def test_layers_whose_neurons_all_vanish_have_no_pair(tmp_path: Path) -> None:
    changed = weights("base").copy()
    name = "model.layers.1.mlp.up_proj.weight"
    changed.tensors[name] = torch.zeros_like(changed.tensors[name])
    ours, theirs = sample_mlps(save(tmp_path / "empty", changed), example("base"))
    pairing = pair_mlps(ours, theirs, {layer: layer for layer in theirs.places})
    assert 1 not in {one.layer for one, _ in pairing.mapped}
    assert len(pairing.mapped) == len(theirs.places) - 1
