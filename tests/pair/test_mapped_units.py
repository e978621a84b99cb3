"""MLPs in other places: found under other numbers and other ways of storing, exact for independent models."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from checks.checkpoint.canonical import CanonicalModel, MlpPlace
from checks.checkpoint.checkpoint import Checkpoint
from checks.evidence.record import CONTRADICTS
from checks.pair import measures
from checks.pair.mapped_units import MappedUnits, mapped_units, with_mapped
from checks.pair.mlp_pairs import pair_mlps
from checks.pair.mlp_samples import sample_mlps
from tests.pair.example_models import example, save, weights
from tests.zoo.weights import Weights


def opened(path: Path) -> CanonicalModel:
    return CanonicalModel(Checkpoint(path))


def renumbered(model: Weights, order: list[int]) -> Weights:
    """Layer k of the result is layer order[k]."""
    moved = {}
    for name, tensor in model.tensors.items():
        if ".layers." not in name:
            moved[name] = tensor
            continue
        before, _, after = name.partition(".layers.")
        layer, _, rest = after.partition(".")
        for place, source in enumerate(order):
            if source == int(layer):
                moved[f"{before}.layers.{place}.{rest}"] = tensor
    return replace(model, tensors=moved)


def measured(candidate: Path, reference: Path) -> MappedUnits:
    ours, theirs = opened(candidate), opened(reference)
    return mapped_units(ours, theirs, pair_mlps(*sample_mlps(ours, theirs)).mapped)


def test_reversed_layers_are_found_by_their_units(
    examples: Path, tmp_path: Path, open_pair: Callable[..., Any], judged: Callable[..., Any]
) -> None:
    original = weights("base")
    order = list(reversed(example("base").layers))
    save(tmp_path / "reversed", renumbered(original, order))
    pair = open_pair(tmp_path / "reversed", examples / "base")
    in_place = pair.units()
    assert abs(in_place.strongest_joint.z) < 6, "layers in place are others"
    evidence = judged("independence.units", pair)
    assert evidence.outcome == CONTRADICTS
    assert "in other places" in evidence.reason
    assert evidence.value > 100


def test_independent_models_are_left_alone(examples: Path) -> None:
    found = measured(examples / "independent", examples / "base")
    assert found.groups
    tests = with_mapped(None, found)
    assert tests is not None
    assert abs(tests.strongest_joint.z) < 4.5
    assert abs(tests.strongest_joint.effect) < 0.02


def test_a_pair_that_was_tested_in_place_is_not_tested_again(examples: Path, open_pair: Callable[..., Any]) -> None:
    pair = open_pair(examples / "derived", examples / "base")
    assert pair.once(measures.mapped_units).groups == ()
    assert pair.once(measures.units) == pair.units()


def test_more_tests_are_counted_and_those_in_place_still_say_how_much_was_covered(
    examples: Path, open_pair: Callable[..., Any]
) -> None:
    pair = open_pair(examples / "independent", examples / "base")
    in_place, mapped = pair.units(), pair.once(measures.mapped_units)
    together = with_mapped(in_place, mapped)
    assert together is not None
    assert together.coverage == in_place.coverage
    assert together.joint == in_place.joint
    assert together.tests == in_place.tests + len(together.mapped) + sum(
        one is not None and one.z is not None for group in mapped.groups for one in (group.test, group.gate)
    )


def test_without_any_mlp_in_place_the_mapped_ones_speak_for_the_whole(examples: Path) -> None:
    found = measured(examples / "base", examples / "base")
    tests = with_mapped(None, found)
    assert tests is not None
    assert tests.mapped == ()
    assert tests.coverage == pytest.approx(1.0)
    assert tests.strongest_joint.effect == pytest.approx(1.0)


def test_nothing_mapped_says_nothing(examples: Path) -> None:
    model = opened(examples / "base")
    found = mapped_units(model, model, ())
    assert found.groups == ()
    assert with_mapped(None, found) is None


def test_other_shapes_are_not_tested(examples: Path) -> None:
    model = opened(examples / "base")
    (place, *_) = model.mlps(0)
    wider = MlpPlace(place.layer, place.kind, place.expert, place.units, place.has_gate, 2 * place.elements)
    assert mapped_units(model, model, [(place, wider)]).groups == ()


def units_renumbered(model: Weights, seed: int) -> Weights:
    """The same model, the units of every MLP in another order."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = dict(model.tensors)
    for layer in example("base").layers:
        start = f"model.layers.{layer}.mlp."
        order = torch.randperm(model.tensors[f"{start}up_proj.weight"].shape[0], generator=generator)
        for kind in ("gate", "up"):
            shuffled[f"{start}{kind}_proj.weight"] = model.tensors[f"{start}{kind}_proj.weight"][order]
        shuffled[f"{start}down_proj.weight"] = model.tensors[f"{start}down_proj.weight"][:, order]
    return replace(model, tensors=shuffled)


@pytest.mark.parametrize("candidate", ["independent", "base"])
@pytest.mark.parametrize("seed", range(3))
def test_the_null_is_exact_given_the_map(examples: Path, tmp_path: Path, candidate: str, seed: int) -> None:
    """The map stays what it is when the reference's units are renumbered, and the score becomes a draw of the null."""
    save(tmp_path / "renumbered", units_renumbered(weights("base"), seed))
    ours, theirs, again = opened(examples / candidate), opened(examples / "base"), opened(tmp_path / "renumbered")
    maps = [pair_mlps(*sample_mlps(ours, model)).mapped for model in (theirs, again)]
    assert maps[0] == maps[1]
    found = mapped_units(ours, again, maps[1])
    assert found.groups
    assert all(abs(group.test.z or math.inf) < 5 for group in found.groups)


def test_every_mlp_is_used_once_in_the_first_pair_that_has_it(examples: Path) -> None:
    """Experts that stem from one MLP are no further observations of it."""
    model = opened(examples / "base")
    (first,), (second,), (third,) = (model.mlps(layer) for layer in range(3))
    pairs = [(first, second), (third, second), (first, third), (second, first)]
    found = mapped_units(model, model, pairs)
    assert [group.module for group in found.groups] == [
        "layer 0 (dense) = layer 1 (dense)",
        "layer 1 (dense) = layer 0 (dense)",
    ]
    # A pair that was tested in place is a pair of its MLPs too.
    found = mapped_units(model, model, [(first, first), (second, first)], [(0, "mlp", None)])
    assert found.groups == ()


def test_a_weight_that_is_not_finite_costs_no_other_mlp(
    tmp_path: Path, open_pair: Callable[..., Any], examples: Path
) -> None:
    broken = dict(weights("base").tensors)
    name = "model.layers.1.mlp.up_proj.weight"
    broken[name] = broken[name].clone()
    broken[name][3, 5] = math.nan
    save(tmp_path / "broken", replace(weights("base"), tensors=broken))
    pair = open_pair(tmp_path / "broken", examples / "base")
    blocks = pair.once(measures.matching_by_anchors).blocks
    assert len(blocks) == len(example("base").layers)
    assert all(block.matching.agreement > 0.9 for block in blocks)
    found = measured(tmp_path / "broken", examples / "base")
    assert [group.test.effect is None for group in found.groups] == [group.layer == 1 for group in found.groups]
    assert with_mapped(None, found) is not None


def test_an_mlp_without_finite_weights_costs_no_other(tmp_path: Path, examples: Path) -> None:
    broken = dict(weights("base").tensors)
    name = "model.layers.2.mlp.gate_proj.weight"
    broken[name] = torch.full_like(broken[name], math.nan)
    ours = save(tmp_path / "broken", replace(weights("base"), tensors=broken))
    samples, _ = sample_mlps(ours, opened(examples / "base"))
    assert [samples.neurons(place).count > 0 for layer in ours.layers for place in ours.mlps(layer)] == [
        layer != 2 for layer in ours.layers
    ]
    found = measured(tmp_path / "broken", examples / "base")
    assert {group.layer for group in found.groups if group.test.effect is not None} >= {*ours.layers} - {2}
