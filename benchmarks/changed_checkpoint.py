"""A model of the zoo with other weights than it is stored with, in memory: what renumbering or noise makes of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from checks.checkpoint.checkpoint import Checkpoint

if TYPE_CHECKING:
    from torch import Tensor

    from checks.checkpoint.checkpoint import TensorEntry
    from checks.checkpoint.roles import RoleAssignment
    from tests.zoo.weights import Weights


class ChangedCheckpoint:
    """Names, roles and shapes of a stored checkpoint with the given weights, as `CanonicalModel` reads them."""

    def __init__(self, stored: Checkpoint, weights: Weights) -> None:
        self._stored = stored
        self._weights = weights

    @property
    def where(self) -> str:
        """Where the original lies."""
        return f"{self._stored.where}, changed"

    @property
    def config(self) -> Mapping[str, Any]:
        """The original's configuration."""
        return self._stored.config

    @property
    def roles(self) -> RoleAssignment:
        """What each tensor is."""
        return self._stored.roles

    @property
    def tensors(self) -> Mapping[str, TensorEntry]:
        """What each tensor looks like."""
        return self._stored.tensors

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The changed weights of one tensor, or some of its rows."""
        tensor = self._weights.tensors[self._stored.tensors[name].stored_name]
        return tensor if rows is None else tensor[rows]
