"""What a claim says about the initial weights: the block `initial` of a claim file, as frozen data."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checks.claim.model import ModelSource

_REPO = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*)(?:@([A-Za-z0-9._/-]+))?")


@dataclass(frozen=True)
class InitialWeights:
    """Where training began. `generator` and `seed` make the weights again; `checkpoint` is where they were published.

    `steps`: checkpoints of the training, in order.
    """

    generator: str | None = None
    seed: int | None = None
    checkpoint: ModelSource | None = None
    steps: tuple[ModelSource, ...] = ()


def initial_from(block: Mapping[str, Any], directory: Path) -> InitialWeights:
    """The block `initial` of a claim file that fits the schema. Opens no file but looks whether paths exist.

    Raises ValueError for text that is neither a directory beside the claim nor a repository.
    """
    checkpoint = block.get("checkpoint")
    return InitialWeights(
        generator=block.get("generator"),
        seed=block.get("seed"),
        checkpoint=None if checkpoint is None else source_of(checkpoint, "initial", directory),
        steps=tuple(
            source_of(text, f"step_{number}", directory) for number, text in enumerate(block.get("steps", ()), start=1)
        ),
    )


def source_of(text: str, name: str, directory: Path) -> ModelSource:
    """The model at a path (relative to `directory`) or in a repository, `org/name` or `org/name@revision`.

    Raises ValueError for text that is neither.
    """
    path = directory / text
    if path.is_dir():
        return ModelSource(name=name, path=str(path.resolve()))
    repo = _REPO.fullmatch(text)
    if repo is None:
        raise ValueError(f"no directory {text!r} beside the claim, and no repository org/name or org/name@revision")
    return ModelSource(name=name, repo=repo[1], revision=repo[2])
