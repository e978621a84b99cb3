"""What a claim says about the training: the block `training` of a claim file, as frozen data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Training:
    """The claimant's figures; None for what the claim does not say.

    parameters: in units; active: what one token uses. tokens: of the whole pre-training. sequence_length: in tokens.
    accelerator, accelerator_count, days, precision: the hardware and how long it was used. peak: dense operations
    per second of one accelerator. log: the file of the training log, its path resolved against the claim file's
    directory.
    """

    total: float | None = None
    active: float | None = None
    tokens: float | None = None
    sequence_length: float | None = None
    accelerator: str | None = None
    accelerator_count: float | None = None
    days: float | None = None
    precision: str | None = None
    peak: float | None = None
    log: str | None = None


def training_from(block: Mapping[str, Any], directory: Path) -> Training:
    """The block `training` of a claim file that fits the schema. Opens no file."""
    parameters, hardware = block.get("parameters", {}), block.get("hardware", {})
    log = block.get("log")
    return Training(
        total=parameters.get("total"),
        active=parameters.get("active"),
        tokens=block.get("tokens"),
        sequence_length=block.get("sequence_length"),
        accelerator=hardware.get("accelerator"),
        accelerator_count=hardware.get("count"),
        days=hardware.get("days"),
        precision=hardware.get("precision"),
        peak=hardware.get("peak"),
        log=None if log is None else str((directory / log).resolve()),
    )
