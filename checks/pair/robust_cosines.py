"""Robust companions of the cosine, for tensors of equal name and shape."""

from __future__ import annotations

from typing import TYPE_CHECKING

from checks.checkpoint.checkpoint import Checkpoint

if TYPE_CHECKING:
    from checks.statistics.magnitude import RobustCosine

# Tensors that are read, spread over the candidate; and positions of each.
TENSORS = 48
POSITIONS = 65_536


def robust_cosines(candidate: Checkpoint, reference: Checkpoint, seed: int = 0) -> dict[str, RobustCosine]:
    """Rank correlation and winsorised cosine of at most 48 tensors that both have, by name.

    Only tensors of plain floats whose index has no meaning of its own (which share structure between any two models).
    Raises CheckpointUnavailable when one of them cannot be read.
    """
    from checks.statistics.magnitude import robust_cosine
    from checks.statistics.positions import sample_positions

    names = [
        name
        for name, entry in candidate.tensors.items()
        if (other := reference.tensors.get(name)) is not None
        and entry.shape == other.shape
        and entry.is_float
        and other.is_float
        and not entry.role.index_has_meaning
    ]
    chosen = [names[number] for number in sample_positions(len(names), TENSORS, seed).tolist()]
    return {name: robust_cosine(candidate.read(name), reference.read(name), POSITIONS, seed) for name in chosen}
