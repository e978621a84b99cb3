"""What a claim says about asking the model: the block `behavior` of a claim file, as frozen data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Behavior:
    """Where the candidate answers, and what is claimed of its answers; None for what the claim does not say.

    endpoint: an OpenAI-compatible address that ends in /v1. model: the candidate's name there. directory: a checkpoint
    to run here instead, when there is no endpoint. knowledge_cutoff: YYYY, YYYY-MM or YYYY-MM-DD. references: names of
    the panel with the model that answers for each at the endpoint.
    """

    endpoint: str | None = None
    model: str | None = None
    directory: str | None = None
    knowledge_cutoff: str | None = None
    references: tuple[tuple[str, str], ...] = ()

    @property
    def can_be_asked(self) -> bool:
        """Does the claim say where the candidate answers? Without that nothing is run: weights may be too large."""
        return self.endpoint is not None or self.directory is not None


def behavior_from(block: Mapping[str, Any], directory: Path = Path()) -> Behavior:
    """The block `behavior` of a claim file that fits the schema. Opens nothing.

    `model` is a name at the endpoint; without an endpoint it is a checkpoint directory, relative to `directory`.
    """
    endpoint, model = block.get("endpoint"), block.get("model")
    here = None if endpoint is not None or model is None else str((directory / model).resolve())
    return Behavior(
        endpoint=endpoint,
        model=model if endpoint is not None else None,
        directory=here,
        knowledge_cutoff=block.get("knowledge_cutoff"),
        references=tuple(sorted(block.get("references", {}).items())),
    )
