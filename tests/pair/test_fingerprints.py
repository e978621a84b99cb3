from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checks.checkpoint.checkpoint import Checkpoint
from checks.checkpoint.errors import CheckpointUnavailable
from checks.pair.fingerprints import (
    Fingerprint,
    Fingerprints,
    NamelessComparison,
    as_json,
    fingerprints,
    from_json,
    picked_fingerprint,
    read_fingerprint,
    settled,
    wanted_positions,
)
from checks.statistics.ordinary import head_elements, ordinary_reason
from tests.pair.random_tensors import normal

EXAMPLES = Path(__file__).parents[2] / "examples/checkpoints"
ALPHA = math.log(1e-6)


def renamed(directory: Path, name: str) -> Checkpoint:
    """An example as another exporter might write it: other names in another order, matrices transposed, float32."""
    directory.mkdir()
    tensors = load_file(EXAMPLES / name / "model.safetensors")
    keys = sorted(tensors, key=lambda key: hashlib.sha256(key.encode()).digest())
    matrices = {key: value.float() if value.dim() < 2 else value.float().T for key, value in tensors.items()}
    other = {f"net/w{number:03d}": matrices[key].contiguous() for number, key in enumerate(keys)}
    save_file(other, directory / "model.safetensors")
    (directory / "config.json").write_text("{}")
    return Checkpoint(directory)


def test_a_renamed_derived_model_is_found_and_an_independent_one_is_not(tmp_path: Path) -> None:
    base = fingerprints(Checkpoint(EXAMPLES / "base"))
    assert len(base.names) == 39
    assert base.excluded == {}
    derived = NamelessComparison(fingerprints(renamed(tmp_path / "derived", "derived")), base).pairing
    assert derived.log_p < ALPHA
    assert derived.share(ALPHA, 0.5) > 0.99
    assert not derived.unpaired
    apart = NamelessComparison(fingerprints(renamed(tmp_path / "independent", "independent")), base).pairing
    assert apart.log_p > math.log(1e-3)
    assert apart.share(ALPHA, 0.0) == 0


def test_sketches_of_the_same_exporter() -> None:
    base = fingerprints(Checkpoint(EXAMPLES / "base"))
    derived = NamelessComparison(fingerprints(Checkpoint(EXAMPLES / "derived")), base)
    assert all(derived.candidate.names[one.index] == base.names[one.other] for one in derived.matches)
    apart = NamelessComparison(fingerprints(Checkpoint(EXAMPLES / "independent")), base)
    assert apart.sketch_share(0.85, 0.02) == 0
    assert (
        max(one.similarity.jaccard for one in apart.matches)
        < 0.4
        < max(one.similarity.jaccard for one in derived.matches)
    )
    assert NamelessComparison(base, base).sketch_share(0.85, 0.02) == 1


def test_what_is_excluded(tmp_path: Path) -> None:
    tensors = {
        "mask": torch.ones(64, 64).tril(),
        "bias": torch.zeros(300),
        "norm": torch.ones(300),
        "codes": torch.randint(-8, 8, (64, 64), dtype=torch.int8),
        "short": torch.randn(40),
        "weight": torch.randn(64, 64),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({}))
    found = fingerprints(Checkpoint(tmp_path))
    assert found.names == ("weight",)
    assert found.excluded.keys() == tensors.keys() - {"weight"}
    assert all("any model could have it" in found.excluded[name] for name in ("mask", "bias", "norm"))
    empty = NamelessComparison(found, found)
    assert empty.pairing.tests == 1


def test_a_file_that_cannot_be_read_is_no_answer(tmp_path: Path) -> None:
    save_file({"weight": torch.randn(64, 64)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    checkpoint = Checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointUnavailable):
        fingerprints(checkpoint)


# From a part of the elements


def same(one: Fingerprint, other: Fingerprint) -> bool:
    return json.dumps(as_json(one)) == json.dumps(as_json(other)) and one.is_uncertain == other.is_uncertain


def picked(tensor: torch.Tensor) -> Fingerprint:
    shape = tuple(tensor.shape)
    return picked_fingerprint(shape, tensor.reshape(-1)[torch.from_numpy(wanted_positions(shape))])


def from_file(directory: Path, tensor: torch.Tensor) -> Fingerprint:
    save_file({"weight": tensor.contiguous()}, directory / "model.safetensors")
    (directory / "config.json").write_text("{}")
    return read_fingerprint(Checkpoint(directory), "weight")


@pytest.mark.parametrize(
    "shape", [(70,), (300,), (40,), (1, 90, 90), (700, 300), (300, 700), (9, 200, 100), (12, 10, 30, 40), (5,), (1,)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_part_of_the_elements_gives_the_same(shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path) -> None:
    tensor = normal(3, *shape).to(dtype)
    assert same(picked(tensor), from_file(tmp_path, tensor))


def test_few_elements_of_a_large_tensor_are_wanted() -> None:
    """And no more of a wider one."""
    matrix, experts = wanted_positions((11008, 4096)), wanted_positions((64, 7168, 2048))
    assert 65_536 < len(matrix) < 250_000
    assert len(experts) < 700_000
    assert (matrix[1:] > matrix[:-1]).all()


@pytest.mark.parametrize("axis", [0, 1])
def test_a_stack_that_is_a_sequence_along_a_hidden_axis_is_looked_at_as_a_whole(axis: int) -> None:
    steps = torch.arange(1.0, 13.0)
    shapes = [(12, 1, 1, 1), (1, 12, 1, 1)]
    table = steps.reshape(shapes[axis]) * normal(1, *(1 if number == axis else 12 for number in range(2)), 100, 120)
    assert ordinary_reason(table)
    assert head_elements(table.shape) < table.numel()
    found = picked(table)
    assert found.is_uncertain
    assert "any model could have it" in (settled(found, lambda: ordinary_reason(table)).excluded or "")
    trained = picked(normal(2, 12, 12, 100, 120))
    assert not trained.is_uncertain
    assert trained.excluded is None


def test_what_only_begins_like_a_table_keeps_its_fingerprint(tmp_path: Path) -> None:
    begins = torch.cat([torch.outer(torch.arange(600.0), torch.ones(200)), normal(1, 500, 200)])
    found = picked(begins)
    assert found.is_uncertain
    assert same(settled(found, lambda: ordinary_reason(begins)), from_file(tmp_path, begins))


@pytest.mark.parametrize("shape", [(300,), (40, 60), (64, 64), (9, 40, 30), (5,)])
def test_a_file_keeps_every_bit(shape: tuple[int, ...], tmp_path: Path) -> None:
    found = from_file(tmp_path, normal(4, *shape))
    again = from_json(json.loads(json.dumps(as_json(found), allow_nan=False)))
    assert same(found, again)
    both = [NamelessComparison(one, one) for one in (fingerprints(Checkpoint(tmp_path)), _only(again))]
    assert both[0].matches == both[1].matches
    assert both[0].pairing == both[1].pairing


def _only(one: Fingerprint) -> Fingerprints:
    return Fingerprints.of({"weight": one})


@pytest.mark.parametrize(
    "change", [{"sketch": None}, {"sample": {}}, {"sample": {"shape": [3], "pairing": [[9], "AA=="]}}]
)
def test_what_another_wrote_is_no_fingerprint(change: dict[str, object], tmp_path: Path) -> None:
    stored = as_json(from_file(tmp_path, normal(4, 40, 60)))
    with pytest.raises((ValueError, KeyError, TypeError)):
        from_json(stored | change)
