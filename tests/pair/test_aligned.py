from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from checks.checkpoint.canonical import CanonicalModel
from checks.checkpoint.checkpoint import Checkpoint
from checks.checkpoint.errors import CheckpointUnavailable
from checks.evidence.record import CONTRADICTS, SUPPORTS, Evidence
from checks.pair import measures
from checks.pair.aligned import Aligned, align_in, common_frame
from checks.pair.mlp_pairs import map_layers
from checks.pair.mlp_samples import sample_mlps
from checks.pair.pair import Pair
from tests.pair.example_models import ALL, EXAMPLES, example, save, weights
from tests.zoo import symmetry
from tests.zoo.weights import EMBEDDING, Weights

Open = Callable[[Path, Path], Pair]
Judged = Callable[[str, Pair], Evidence]
Ids = tuple[list[int], list[int]]


def align(candidate: CanonicalModel, reference: CanonicalModel, ids: Ids, layer_map: dict[int, int]) -> Aligned | None:
    frame = common_frame(candidate, reference, ids)
    return None if frame is None else align_in(frame, layer_map)


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


@pytest.fixture
def evidence(
    tmp_path: Path, open_pair: Open, judged: Judged, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Evidence]:
    """The evidence of independence.alignment on changed weights beside the base; layers are mapped by number."""
    monkeypatch.setattr(measures, "alignment", lambda pair: align(*pair.canonical, ALL, {i: i for i in range(4)}))

    def find(changed: Weights) -> Evidence:
        save(tmp_path / "changed", changed)
        shutil.copy(EXAMPLES / "base" / "tokenizer.json", tmp_path / "changed")
        return judged("independence.alignment", open_pair(tmp_path / "changed", EXAMPLES / "base"))

    return find


def test_the_transform_is_named_where_layers_were_inherited(evidence: Callable[[Weights], Evidence]) -> None:
    found = evidence(symmetry.rotate_residual(weights("derived"), 1))
    assert found.outcome == CONTRADICTS
    assert found.details["transform"] == "rotation"


def test_no_transform_is_named_for_independent_layers(evidence: Callable[[Weights], Evidence], tmp_path: Path) -> None:
    """A rotation takes one embedding to the other, and no layer reads what its counterpart reads."""
    student = weights("independent").copy()
    student.tensors[EMBEDDING] = symmetry.rotate_residual(weights("base"), 1).tensors[EMBEDDING]
    found = evidence(student)
    aligned = align(CanonicalModel(Checkpoint(tmp_path / "changed")), example("base"), ALL, {0: 0})
    assert aligned.transform.kind == "rotation"
    assert found.outcome == SUPPORTS
    assert found.details["transform"] is None


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="same tokens"):
        align(example("base"), example("base"), ([1, 2], [1]), {})
    changed = weights("base").copy()
    changed.tensors["model.embed_tokens.weight"] = torch.full((1024, 128), math.inf)
    with pytest.raises(CheckpointUnavailable, match="embedding"):
        align(save(tmp_path / "endless", changed), example("base"), ALL, {0: 0})
