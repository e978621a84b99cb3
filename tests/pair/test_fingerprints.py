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
from checks.pair.fingerprints import NamelessComparison, fingerprints

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
