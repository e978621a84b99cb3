"""What a claim says, after reading: plain frozen data that every worker builds alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from checks.catalog.architecture import Architecture
from checks.claim.training import Training

if TYPE_CHECKING:
    from checks.claim.behavior import Behavior
    from checks.claim.initial import InitialWeights


@dataclass(frozen=True)
class ModelSource:
    """One model of a claim: its name in cases, where its weights are, and what is known without them.

    Two sources are equal when they would read the same weights and are known to have the same architecture, so that
    equal references of different claims share a stream and different ones with the same name never do.
    """

    name: str
    catalog_key: str | None = None
    path: str | None = None
    repo: str | None = None
    revision: str | None = None
    prefix: str | None = None
    architectures: Mapping[str, Architecture] = field(default_factory=lambda: MappingProxyType({}), hash=False)

    @property
    def where(self) -> str:
        """Where the weights are, for people."""
        if self.path:
            return self.path
        return f"{self.repo}@{self.revision}" if self.revision else str(self.repo)

    def architecture(self, component: str | None) -> Architecture | None:
        """The architecture of a component. A text-only model is its own "text"; without components the text decides."""
        if component in (None, "text", "model"):
            return self.architectures.get("text") or self.architectures.get("model")
        return self.architectures.get(str(component))


@dataclass(frozen=True)
class Reference:
    """A model of the panel, and why it is there."""

    source: ModelSource
    prefixes: tuple[str, ...] = ("",)
    nearest: bool = False  # added as one of the catalogue's nearest architectures, not named by the claim
    line: int = 1


@dataclass(frozen=True)
class Component:
    """A part of the candidate with its panel; `name` is None when the claim has no components."""

    name: str | None
    prefixes: tuple[str, ...]
    panel: tuple[Reference, ...]
    disclosed: frozenset[str] = frozenset()
    line: int = 1

    @property
    def label(self) -> str:
        """The component's name for people."""
        return self.name or "model"


@dataclass(frozen=True)
class ThresholdOverride:
    """Bands that one claim sets for one check, with the claim's reason."""

    check: str
    values: Mapping[str, float]
    reason: str
    line: int


@dataclass(frozen=True)
class Claim:
    """One claim file, checked and with every model resolved to a source."""

    path: Path
    name: str
    statement: str
    claimant: str | None
    source: str | None
    model: ModelSource
    components: tuple[Component, ...]
    only: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    overrides: Mapping[str, ThresholdOverride] = field(default_factory=lambda: MappingProxyType({}))
    training: Training = field(default_factory=Training)
    initial: InitialWeights | None = None
    behavior: Behavior | None = None
    line: int = 1

    def component(self, name: str | None) -> Component:
        """The component called `name`."""
        return next(component for component in self.components if component.name == name)

    def reference(self, component: str | None, name: str) -> Reference:
        """The reference `name` of a component's panel."""
        return next(one for one in self.component(component).panel if one.source.name == name)
