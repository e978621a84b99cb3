"""The candidate on its own, as the checks that need no reference see it."""

from __future__ import annotations

from collections.abc import Callable

from checks.checkpoint.hub_access import HubAccess
from checks.checkpoint.model import Model
from checks.claim.behavior import Behavior
from checks.claim.model import ModelSource
from checks.claim.training import Training


class Candidate(Model):
    """The model that a claim is about, with what the claim says of its training and the names of its panel."""

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
        reads_all: bool = True,
    ) -> None:
        super().__init__(source, component, prefixes, hub)
        self.training = training
        self.panel = panel
        self.references = references
        self.disclosed = disclosed
        self.behavior = behavior
        self.device = device
        self.offline = offline
        self.reads_all = reads_all
