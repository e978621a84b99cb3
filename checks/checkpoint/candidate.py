"""The candidate on its own, as the checks that need no reference see it."""

from __future__ import annotations

from checks.checkpoint.hub_access import HubAccess
from checks.checkpoint.model import Model
from checks.claim.model import ModelSource


class Candidate(Model):
    """The model that a claim is about, with the parameter counts that the claim states and the names of its panel."""

    def __init__(
        self,
        source: ModelSource,
        component: str | None,
        prefixes: tuple[str, ...],
        stated_total: float | None,
        stated_active: float | None,
        panel: frozenset[str],
        hub: HubAccess | None = None,
    ) -> None:
        super().__init__(source, component, prefixes, hub)
        self.stated_total = stated_total
        self.stated_active = stated_active
        self.panel = panel
