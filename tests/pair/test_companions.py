"""What stands beside a cosine: distances, zero vectors, robust correlations, from the same reading."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from checks.checkpoint.checkpoint import Checkpoint
from checks.pair import robust_cosines
from checks.pair.companions import companions
from checks.pair.comparison import compare, compare_part
from checks.pair.reading import plan_of
from checks.statistics.magnitude import robust_cosine
from checks.streaming.read_plan import ReadRequest
from tests.pair.counting import opened
from tests.pair.random_tensors import noisy, normal

Tensors = dict[str, torch.Tensor]
Llama = Callable[..., Tensors]
Save = Callable[..., Path]
UP = "model.layers.0.mlp.up_proj.weight"


def test_derived_and_independent_models(examples: Path) -> None:
    base, derived, independent = (Checkpoint(examples / name) for name in ("base", "derived", "independent"))
    near, far = (companions(compare(one, base)) for one in (derived, independent))
    assert near["robust"]["tensors"] == far["robust"]["tensors"] == 39
    assert near["robust"]["median_spearman"] > 0.9 < near["robust"]["median_winsorized"]
    assert abs(far["robust"]["median_spearman"]) < 0.05
    assert near["distances"]["mlp"]["relative"] < 0.5
    assert far["distances"]["mlp"]["relative"] == pytest.approx(1, abs=0.05)
    assert far["distances"]["mlp"]["norm_ratio"] == pytest.approx(1, abs=0.2)
    assert near["zero_vectors"] == far["zero_vectors"] == {}


def test_distances_are_those_of_the_category_as_one_vector(llama_tensors: Llama, save_checkpoint: Save) -> None:
    ours, theirs = llama_tensors(1), {name: 2 * tensor for name, tensor in llama_tensors(2).items()}
    found = companions(compare(*(Checkpoint(save_checkpoint(f"{n}", one)) for n, one in enumerate((ours, theirs)))))
    a, b = (torch.cat([one[name].flatten().double() for name in one if "mlp" in name]) for one in (ours, theirs))
    assert found["distances"]["mlp"] == {
        "l2": pytest.approx(float((a - b).norm())),
        "relative": pytest.approx(float((a - b).norm()) / math.hypot(float(a.norm()), float(b.norm()))),
        "norm_ratio": pytest.approx(float(a.norm() / b.norm())),
    }


def test_zero_vectors_are_named(llama_tensors: Llama, save_checkpoint: Save) -> None:
    ours, theirs = llama_tensors(1), llama_tensors(2)
    ours[UP] = torch.zeros_like(ours[UP])
    theirs["model.norm.weight"] = torch.zeros(64)
    for tensors in (ours, theirs):
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(176, 64)
    comparison = compare(*(Checkpoint(save_checkpoint(f"{n}", one)) for n, one in enumerate((ours, theirs))))
    found = companions(comparison)
    assert found["zero_vectors"] == {UP: "candidate", "model.norm.weight": "reference"}
    assert found["robust"]["undefined"] == {UP: "a is zero", "model.norm.weight": "b is zero"}
    assert "model.layers.1.mlp.up_proj.weight" in comparison.ordinary


def test_outliers_move_the_cosine_alone(llama_tensors: Llama, save_checkpoint: Save) -> None:
    ours, theirs = llama_tensors(1), llama_tensors(2)
    ours[UP][3, 5] = theirs[UP][3, 5] = 1e3
    found = companions(compare(*(Checkpoint(save_checkpoint(f"{n}", one)) for n, one in enumerate((ours, theirs)))))
    first = found["robust"]["farthest_from_the_cosine"][0]
    assert (first["name"], first["cosine"]) == (UP, pytest.approx(1, abs=1e-2))
    assert abs(first["spearman"]) < 0.1 > abs(first["winsorized"])


def test_the_same_elements_as_from_whole_tensors(save_checkpoint: Save) -> None:
    """Whatever the dtypes; large tensors are sampled."""
    a, b = normal(1, 200, 300), normal(1, 200, 300) + normal(2, 200, 300)
    ours, theirs = (
        Checkpoint(save_checkpoint(f"{number}", {"w": one})) for number, one in enumerate((a.bfloat16(), b))
    )
    (found,) = compare(ours, theirs).compared
    assert found.robust == robust_cosine(a.bfloat16(), b, robust_cosines.POSITIONS, robust_cosines.SEED)
    assert found.robust is not None
    assert found.robust.positions == robust_cosines.POSITIONS


def test_few_of_many_tensors_spread_over_the_model(
    llama_tensors: Llama, save_checkpoint: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(robust_cosines, "TENSORS", 6)
    ours, theirs = (Checkpoint(save_checkpoint(f"{seed}", llama_tensors(seed))) for seed in (1, 2))
    names = [one.entry.name for one in compare(ours, theirs).compared if one.robust is not None]
    assert len(names) == 6
    assert len({name.split(".")[2] for name in names if ".layers." in name}) == 3


def test_a_copy_with_wide_rows_is_not_set_aside(llama_tensors: Llama, save_checkpoint: Save) -> None:
    """The first block of a tensor may hold no row, which tells little of what any model could have."""
    changes = {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 512, "vocab_size": 8192}
    base = llama_tensors(1, **changes)
    ours, theirs = (Checkpoint(save_checkpoint(name, base)) for name in ("ours", "theirs"))
    plan = plan_of(ours, theirs, ReadRequest("sample", 3_000_000, 0))
    assert plan is not None
    comparison = compare_part(ours, theirs, plan)
    assert not [name for name in comparison.ordinary if "proj" in name]
    assert comparison.mean().cosine == pytest.approx(1)


def test_of_a_part_only_what_is_planned_is_read(llama_tensors: Llama, save_checkpoint: Save) -> None:
    """And from pieces all over a tensor."""
    changes = {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 512, "vocab_size": 8192}
    base = llama_tensors(1, **changes)
    paths = [save_checkpoint("ours", noisy(base, 1.0)), save_checkpoint("theirs", base)]
    (ours, our_source), (theirs, their_source) = map(opened, paths)
    plan = plan_of(ours, theirs, ReadRequest("sample", 3_000_000, 0))
    assert plan is not None
    comparison = compare_part(ours, theirs, plan)
    assert our_source.read + their_source.read <= plan.bytes
    found = companions(comparison)
    partly = [one for one in comparison.compared if one.estimate is not None and not one.estimate.is_complete]
    assert partly
    for one in partly:
        assert one.drawn is not None
        assert one.drawn.n < one.entry.elements
        assert one.robust is not None
        assert one.robust.spearman == pytest.approx(math.sqrt(0.5), abs=0.15)
        # The last pieces are shorter than the others.
        assert robust_cosines.POSITIONS / 4 < one.robust.positions < 1.1 * robust_cosines.POSITIONS
    assert found["robust"]["tensors"] == len(comparison.compared)
    # Of a with noise as large as itself.
    assert found["distances"]["embedding"]["norm_ratio"] == pytest.approx(math.sqrt(2), abs=0.1)
