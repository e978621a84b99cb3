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


@pytest.mark.parametrize("seed", range(3))
def test_the_null_is_exact_given_the_map(examples: Path, tmp_path: Path, seed: int) -> None:
    """The map stays what it is when the candidate's units are renumbered, and the score becomes a draw of the null."""
    original = weights("base")
    generator = torch.Generator().manual_seed(seed)
    shuffled = dict(original.tensors)
    for layer in example("base").layers:
        start = f"model.layers.{layer}.mlp."
        order = torch.randperm(original.tensors[f"{start}up_proj.weight"].shape[0], generator=generator)
        for kind in ("gate", "up"):
            shuffled[f"{start}{kind}_proj.weight"] = original.tensors[f"{start}{kind}_proj.weight"][order]
        shuffled[f"{start}down_proj.weight"] = original.tensors[f"{start}down_proj.weight"][:, order]
    save(tmp_path / "shuffled", replace(original, tensors=shuffled))
    ours, again, theirs = opened(examples / "base"), opened(tmp_path / "shuffled"), opened(examples / "base")
    maps = [pair_mlps(*sample_mlps(model, theirs)).mapped for model in (ours, again)]
    assert maps[0] == maps[1]
    found = mapped_units(again, theirs, maps[1])
    assert all(abs(group.test.z or math.inf) < 5 for group in found.groups)
