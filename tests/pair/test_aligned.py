from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from checks.checkpoint.errors import CheckpointUnavailable
from checks.pair.aligned import align
from checks.pair.mlp_pairs import map_layers
from checks.pair.mlp_samples import sample_mlps
from tests.pair.example_models import ALL, example, save, weights
from tests.zoo import symmetry
from tests.zoo.weights import Weights


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda one: one, "identity"),
        (lambda one: symmetry.permute_residual(one, 1), "permutation"),
        (lambda one: symmetry.flip_residual_signs(one, 1), "sign flips"),
        (lambda one: symmetry.rotate_residual(one, 1), "rotation"),
    ],
)
def test_alignment_of_a_derived_model(change: Callable[[Weights], Weights], kind: str, tmp_path: Path) -> None:
    model = save(tmp_path / "changed", change(weights("derived")))
    mapped = map_layers(*sample_mlps(model, example("base")))
    found = align(model, example("base"), ALL, mapped)
    assert found.readers.level > 0.8
    assert found.readers.z > 4
    assert found.writers.level > 0.8
    assert found.transform.kind == kind
    assert (found.awm > 0.9) == (kind != "rotation")


def test_alignment_of_independent_models() -> None:
    found = align(example("independent"), example("base"), ALL, {i: i for i in range(4)})
    assert abs(found.readers.level) < 0.15
    assert abs(found.readers.z) < 3
    assert found.readers.plain_mean < 0.2
    assert found.transform.kind == "none"
    assert found.awm < 0.1
    assert found.awm_layers == 4
    assert align(example("independent"), example("base"), ([1] * 10, [1] * 10), {0: 0}) is None
    unmapped = align(example("independent"), example("base"), ALL, {})
    assert unmapped.readers.level is unmapped.awm is None
    assert unmapped.transform.kind == "none"


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="same tokens"):
        align(example("base"), example("base"), ([1, 2], [1]), {})
    changed = weights("base").copy()
    changed.tensors["model.embed_tokens.weight"] = torch.full((1024, 128), math.inf)
    with pytest.raises(CheckpointUnavailable, match="embedding"):
        align(save(tmp_path / "endless", changed), example("base"), ALL, {0: 0})
