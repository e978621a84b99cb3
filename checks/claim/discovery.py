"""Which checks exist: every public function of a family module in `checks/` that takes a judge. No registry."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType, ModuleType
from typing import Any

import checks
from checks.evidence.thresholds import families, threshold

CheckFunction = Callable[..., None]


@dataclass(frozen=True)
class Check:
    """One check: its id, its function, and what it is parametrized by."""

    id: str
    function: CheckFunction
    takes_pair: bool
    takes_layer: bool


@cache
def discovered_checks() -> MappingProxyType[str, Check]:
    """All checks by id, families in report order, checks in the order of their module.

    Raises ThresholdError for a check without an entry in thresholds.yaml.
    """
    modules = {info.name: info for info in pkgutil.iter_modules(checks.__path__) if not info.ispkg}
    order = [name for name in families() if name in modules]
    found: dict[str, Check] = {}
    for name in order:
        module = importlib.import_module(f"checks.{name}")
        for check in _checks_of(name, module):
            threshold(check.id)
            found[check.id] = check
    return MappingProxyType(found)


@cache
def check_names() -> tuple[str, ...]:
    """The ids of all checks."""
    return tuple(discovered_checks())


def _checks_of(family: str, module: ModuleType) -> list[Check]:
    result = []
    for name, value in vars(module).items():
        if name.startswith("_") or not inspect.isfunction(value) or value.__module__ != module.__name__:
            continue
        parameters: dict[str, Any] = dict(inspect.signature(value).parameters)
        if "judge" in parameters:
            result.append(Check(f"{family}.{name}", value, "pair" in parameters, "layer" in parameters))
    return result
