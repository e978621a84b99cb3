"""The example models, disguised copies of them, and how to open such copies."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from checks.checkpoint.canonical import CanonicalModel
from checks.checkpoint.checkpoint import Checkpoint
from checks.statistics.units import critical_z
from tests.zoo import symmetry
from tests.zoo.weights import Weights, read_weights, write_weights

EXAMPLES = Path(__file__).parents[2] / "examples/checkpoints"
ALL = (list(range(1024)), list(range(1024)))
CRITICAL = critical_z(1e-3, 1000)


@cache
def example(name: str) -> CanonicalModel:
    """An example model, opened."""
    return CanonicalModel(Checkpoint(EXAMPLES / name))


@cache
def weights(name: str) -> Weights:
    """The weights of an example model."""
    return read_weights(EXAMPLES / name)


def save(directory: Path, changed: Weights) -> CanonicalModel:
    """Weights written as a checkpoint, and opened."""
    directory.mkdir()
    write_weights(changed, directory)
    return CanonicalModel(Checkpoint(directory))


def hidden(name: str) -> Weights:
    """An example model with everything renumbered, negated, rescaled and rotated that can be."""
    changed = symmetry.permute_neurons(weights(name), 1)
    changed = symmetry.negate_neurons(symmetry.permute_heads(changed, 2), 3)
    return symmetry.rescale_neurons(symmetry.rotate_residual(changed, 4), 5)
