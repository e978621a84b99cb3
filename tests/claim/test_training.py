"""The block `training` of a claim."""

from __future__ import annotations

from pathlib import Path

from checks.claim.training import Training, training_from


def test_nothing_stated_is_nothing_known() -> None:
    assert training_from({}, Path("/claims")) == Training()
    assert training_from({"hardware": {}, "parameters": {}}, Path("/claims")) == Training()


def test_every_figure_of_the_block_is_kept(tmp_path: Path) -> None:
    block = {
        "parameters": {"total": 102.6e9, "active": 12e9},
        "tokens": 19.7e12,
        "sequence_length": 65536,
        "hardware": {"accelerator": "B200", "count": 480, "days": 66, "precision": "bf16"},
        "log": "logs/solar.jsonl",
    }
    assert training_from(block, tmp_path) == Training(
        total=102.6e9,
        active=12e9,
        tokens=19.7e12,
        sequence_length=65536,
        accelerator="B200",
        accelerator_count=480,
        days=66,
        precision="bf16",
        log=str(tmp_path.resolve() / "logs" / "solar.jsonl"),
    )
