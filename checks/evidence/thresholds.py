"""The thresholds of the suite, read from thresholds.yaml, and how a claim may override them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

THRESHOLDS_FILE = Path(__file__).with_name("thresholds.yaml")

# Fields that a claim may override, and the direction in which each makes a contradiction harder or a pass easier.
LOOSENS_WHEN_RAISED = frozenset({"supports_below", "contradicts_from", "minimum_effect", "minimum_single_effect"})
LOOSENS_WHEN_LOWERED = frozenset({"coverage_from", "alpha"})

STRENGTHS = ("decisive", "supporting", "suspicion")


class ThresholdError(Exception):
    """thresholds.yaml, or an override of it, is not usable."""


@dataclass(frozen=True)
class Band:
    """A documented reading of the values from `lower` on, up to the next band."""

    lower: float
    means: str


@dataclass(frozen=True)
class Threshold:
    """What one check decides by; the fields are explained at the top of thresholds.yaml."""

    check: str
    strength: str
    unit: str
    documented: str
    reason: str
    supports_below: float | None = None
    yields_below: float | None = None
    two_sided: bool = False
    contradicts_from: float | None = None
    coverage_from: float | None = None
    alpha: float | None = None
    supports_p_from: float | None = None
    minimum_effect: float | None = None
    minimum_single_effect: float | None = None
    detectable_effect_at_most: float | None = None
    embedding_below: float | None = None
    nearest: int | None = None
    distance_at_most: float | None = None
    carries_support: bool = False
    shared_seed_trips: bool = False
    withstands: tuple[str, ...] = ()
    bands: tuple[Band, ...] = ()

    @property
    def family(self) -> str:
        """The module of the check."""
        return self.check.partition(".")[0]

    @property
    def calibrated(self) -> bool:
        """Does the check decide by a p-value, at a level that the whole claim shares?"""
        return self.alpha is not None

    def band(self, value: float | None) -> str | None:
        """The documented reading of `value`, or None where the documents give none."""
        if value is None:
            return None
        size = abs(value) if self.two_sided else value
        return next((band.means for band in self.bands if size >= band.lower), None)

    def overridden(self, values: Mapping[str, float]) -> Threshold:
        """This threshold with a claim's own values. Raises ThresholdError for a field that the check does not use."""
        for name in values:
            if getattr(self, name, None) is None:
                usable = sorted(
                    one for one in LOOSENS_WHEN_RAISED | LOOSENS_WHEN_LOWERED if getattr(self, one) is not None
                )
                raise ThresholdError(f"{self.check} has no {name!r}; it has {', '.join(usable)}")
        # The override is data from a claim file, whose schema has checked names and types.
        changes: dict[str, Any] = dict(values)
        return dataclasses.replace(self, **changes)

    def require_order(self) -> None:
        """Raises ThresholdError when a value could support and contradict at once."""
        supports, contradicts = self.supports_below, self.contradicts_from
        if supports is not None and contradicts is not None and supports > contradicts:
            raise ThresholdError(f"{self.check}: supports_below {supports} lies above contradicts_from {contradicts}")

    def loosened_by(self, values: Mapping[str, float]) -> tuple[str, ...]:
        """The fields whose override makes a pass easier or a contradiction harder."""
        loosened = []
        for name, value in sorted(values.items()):
            default = getattr(self, name)
            raised, lowered = value > default, value < default
            if (raised and name in LOOSENS_WHEN_RAISED) or (lowered and name in LOOSENS_WHEN_LOWERED):
                loosened.append(name)
        return tuple(loosened)

    def as_evidence(self) -> dict[str, Any]:
        """The numbers that decide, for the record."""
        names = (
            "supports_below",
            "embedding_below",
            "contradicts_from",
            "coverage_from",
            "alpha",
            "supports_p_from",
            "minimum_effect",
            "minimum_single_effect",
            "detectable_effect_at_most",
        )
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@cache
def _document() -> dict[str, Any]:
    with THRESHOLDS_FILE.open(encoding="utf-8") as file:
        loaded = yaml.load(file, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    if not isinstance(loaded, dict) or set(loaded) != {"families", "checks"}:
        raise ThresholdError(f"{THRESHOLDS_FILE}: expected the keys 'families' and 'checks'")
    return loaded


@cache
def thresholds() -> dict[str, Threshold]:
    """All thresholds, by check, in the order of the file. Raises ThresholdError for an entry that cannot be used."""
    return {check: _threshold(check, dict(entry)) for check, entry in _document()["checks"].items()}


def threshold(check: str) -> Threshold:
    """The threshold of one check. Raises ThresholdError when thresholds.yaml has none."""
    try:
        return thresholds()[check]
    except KeyError:
        raise ThresholdError(
            f"{THRESHOLDS_FILE.name} has no entry for {check!r}; a new check needs one (CONTRIBUTING.md)"
        ) from None


@cache
def families() -> dict[str, dict[str, Any]]:
    """Title and documented rating of each family of checks, in report order."""
    return dict(_document()["families"])


def _threshold(check: str, entry: dict[str, Any]) -> Threshold:
    bands = tuple(Band(lower=float(band["from"]), means=str(band["means"])) for band in entry.pop("bands", ()))
    withstands = tuple(entry.pop("withstands", ()))
    try:
        result = Threshold(check=check, bands=bands, withstands=withstands, **entry)
    except TypeError as error:
        raise ThresholdError(f"{THRESHOLDS_FILE.name}: {check}: {error}") from error
    if result.strength not in STRENGTHS:
        raise ThresholdError(f"{THRESHOLDS_FILE.name}: {check}: strength must be one of {', '.join(STRENGTHS)}")
    if list(bands) != sorted(bands, key=lambda band: -band.lower):
        raise ThresholdError(f"{THRESHOLDS_FILE.name}: {check}: bands must fall from the highest to the lowest")
    return result
