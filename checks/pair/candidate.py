"""The candidate on its own, as the checks that need no reference see it."""

from __future__ import annotations

from collections.abc import Callable

from checks.checkpoint.hub_access import HubAccess
from checks.checkpoint.model import Model
from checks.claim.behavior import Behavior
from checks.claim.model import ModelSource
from checks.claim.training import Training
from checks.streaming.read_plan import FULL


class Candidate(Model):
    """The model that a claim is about, with what the claim says of its training and the names of its panel.

    `read`: what `--read` says; None where it says nothing.
    """

    def __init__(
        self,
        source: ModelSource,
        component: str | None,
        prefixes: tuple[str, ...],
        training: Training,
        panel: frozenset[str],
        hub: HubAccess | None = None,
        *,
        references: tuple[Model, ...] = (),
        disclosed: frozenset[str] = frozenset(),
        behavior: Behavior | None = None,
        device: Callable[[], str] = lambda: "cpu",
        offline: bool = False,
        read: str | None = FULL,
    ) -> None:
        super().__init__(source, component, prefixes, hub)
        self.training = training
        self.panel = panel
        self.references = references
        self.disclosed = disclosed
        self.behavior = behavior
        self.device = device
        self.offline = offline
        self.read = read

    @property
    def is_read_in_full(self) -> bool:
        """May a check read all of its weights? `--read full` says so; without `--read` those on this disk are."""
        return self.read == FULL or (self.read is None and self.checkpoint.directory is not None)
