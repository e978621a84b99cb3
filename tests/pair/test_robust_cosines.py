from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from checks.checkpoint.checkpoint import Checkpoint
from checks.pair.robust_cosines import robust_cosines

EXAMPLES = Path(__file__).parents[2] / "examples/checkpoints"


def test_derived_and_independent_models() -> None:
    base = Checkpoint(EXAMPLES / "base")
    derived = robust_cosines(Checkpoint(EXAMPLES / "derived"), base)
    assert len(derived) == 39
    assert min(one.spearman for one in derived.values()) > 0.9
    apart = robust_cosines(Checkpoint(EXAMPLES / "independent"), base)
    assert max(abs(one.spearman) for one in apart.values()) < 0.25
    assert max(abs(one.spearman) for one in apart.values() if one.positions > 10_000) < 0.06


def test_tensors_without_a_counterpart_and_without_a_direction(tmp_path: Path) -> None:
    tensors = load_file(EXAMPLES / "base/model.safetensors")
    tensors["model.norm.weight"] = torch.ones(128)
    tensors["lm_head.weight"] = torch.ones(64, 128)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((EXAMPLES / "base/config.json").read_text())
    found = robust_cosines(Checkpoint(tmp_path), Checkpoint(EXAMPLES / "base"))
    assert "lm_head.weight" not in found
    assert found["model.norm.weight"].reason == "a is constant"
    assert found["model.embed_tokens.weight"].spearman == 1
