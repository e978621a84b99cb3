from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from checks.checkpoint.canonical import CanonicalModel
from checks.checkpoint.checkpoint import Checkpoint
from checks.checkpoint.errors import CheckpointUnavailable
from checks.pair.embedding_rows import compare_tables

EXAMPLES = Path(__file__).parents[2] / "examples/checkpoints"
ALL = (list(range(1024)), list(range(1024)))


def example(name: str) -> CanonicalModel:
    return CanonicalModel(Checkpoint(EXAMPLES / name))


def test_derived_and_independent_models() -> None:
    derived = compare_tables(example("derived"), example("base"), ALL)
    assert [one.table for one in derived] == ["embedding", "head"]
    for one in derived:
        assert one.rows.cosine > 0.95
        assert one.rows.channel_z > 15
        assert one.rows.aligned_cosine > 0.95
        assert one.centroids.cosine > 0.8
        assert one.centroids.z > 5
    apart = compare_tables(example("independent"), example("base"), ALL)
    for one in apart:
        assert abs(one.rows.cosine) < 0.1
        assert abs(one.rows.channel_z) < 4
        assert one.rows.aligned_cosine < 0.8
        assert one.centroids.z < 4.5
        # Row lengths follow the frequency of the tokens in any model.
        assert one.moments.norm_correlation > 0.9


def test_shared_tokens_under_other_ids(tmp_path: Path) -> None:
    """The copy's vocabulary is in another order; rows are paired by the ids of equal tokens."""
    order = torch.randperm(1024, generator=torch.Generator().manual_seed(1))
    tensors = load_file(EXAMPLES / "base/model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][order].contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((EXAMPLES / "base/config.json").read_text())
    moved = CanonicalModel(Checkpoint(tmp_path))
    same = compare_tables(moved, example("base"), (list(range(1024)), order.tolist()))
    assert [one.rows.cosine for one in same] == pytest.approx([1, 1])
    wrong = compare_tables(moved, example("base"), ALL)
    assert abs(wrong[0].rows.cosine) < 0.1


def test_ids_beyond_the_table_and_non_finite_rows(tmp_path: Path) -> None:
    base = example("base")
    with pytest.raises(CheckpointUnavailable, match="no row for token 1024"):
        compare_tables(base, base, ([0, 1024], [0, 1]))
    tensors = load_file(EXAMPLES / "base/model.safetensors")
    tensors["lm_head.weight"][3] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((EXAMPLES / "base/config.json").read_text())
    with pytest.raises(CheckpointUnavailable, match="head holds non-finite"):
        compare_tables(CanonicalModel(Checkpoint(tmp_path)), base, ALL)
