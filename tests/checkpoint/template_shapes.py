"""Shapes of released checkpoints, and what roles must be like, for the tests of templates."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from typing import Any

from checks.checkpoint.roles import CATEGORIES
from checks.checkpoint.template import RoleAssignment, TensorRole
from tests.checkpoint.tiny_models import FIXTURES

Shapes = dict[str, tuple[int, ...]]


#: Shapes of published checkpoints under their released names.
RELEASED: dict[str, Any] = json.loads((FIXTURES / "released.json").read_text())


def released(name: str, **changes: Any) -> tuple[Shapes, dict[str, Any]]:
    shapes = {
        pattern.format(layer=layer, expert=expert): tuple(shape)
        for group in RELEASED[name]["groups"]
        for layer in range(*group.get("layers", [1]))
        for expert in range(group.get("experts", 1))
        for pattern, shape in group["tensors"].items()
    }
    return shapes, {**RELEASED[name]["config"], **changes}


def label(role: TensorRole) -> str:
    """ "routed gate", "q", "v_bias": the part, and for an expert's whose."""
    return f"{role.layout.experts} {role.part}" if role.layout.experts else str(role.part)


def per_layer(roles: Mapping[str, TensorRole], component: str) -> dict[int | None, Counter[str]]:
    layers: dict[int | None, Counter[str]] = defaultdict(Counter)
    for role in roles.values():
        if role.component == component:
            layers[role.layer][label(role)] += 1
    return layers


def check_complete(shapes: Shapes, assigned: RoleAssignment) -> None:
    """Every tensor has a role of its own, and none is missing."""
    assert assigned.inferred_because is None
    assert assigned.unassigned == ()
    assert (assigned.missing, assigned.missing_count, assigned.problems) == ((), 0, {})
    assert assigned.roles.keys() == shapes.keys()
    weights = [one for one in assigned.roles.values() if not one.companion_of]
    places = Counter((one.component, one.layer, label(one), one.expert) for one in weights)
    assert max(places.values()) == 1
    assert {role.category for role in assigned.roles.values()} <= set(CATEGORIES)
