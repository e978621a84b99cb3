"""Robust companions of the cosine: of some tensors elements at the same positions of both sides, from the pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from checks.checkpoint.checkpoint import Checkpoint

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    from checks.checkpoint.index import ByteSource, CheckpointIndex, TensorInfo
    from checks.statistics.magnitude import RobustCosine

# Pairs of tensors, spread over the candidate; and positions of each, at which a rank correlation scatters by .011.
TENSORS = 48
POSITIONS = 8192
SEED = 0


def telling_pairs(candidate: Checkpoint, pairs: Iterable[tuple[str, str]]) -> set[tuple[str, str]]:
    """At most 48 of these pairs of tensors: of those whose index has no meaning of its own, which any two models share.

    They depend on nothing but the pairs.
    """
    from checks.statistics.positions import sample_positions

    usable = [pair for pair in pairs if not candidate.tensors[pair[0]].role.index_has_meaning]
    return {usable[number] for number in sample_positions(len(usable), TENSORS, SEED).tolist()}


class PairedElements:
    """Elements at the same positions of both sides, of pairs that a pass compares.

    `pieces`: for each pair that is asked for the names of what the pass reads of it, in both indexes.
    """

    def __init__(self, pieces: Mapping[tuple[str, str], Sequence[tuple[str, str]]]) -> None:
        self._pieces = pieces
        self._counts = [
            {names[side]: -(-POSITIONS // len(found)) for found in pieces.values() for names in found}
            for side in (0, 1)
        ]
        self._taken: list[dict[str, Tensor]] = [{}, {}]
        self._empty: list[set[str]] = [set(), set()]

    def source(self, side: int, index: CheckpointIndex, source: ByteSource) -> ByteSource:
        """The source of one side, 0 the candidate's, for the pass."""
        from checks.streaming.picking import picking

        counts, taken = self._counts[side], self._taken[side]

        def positions(tensor: TensorInfo) -> npt.NDArray[np.int64]:
            from checks.statistics.positions import sample_positions

            found: npt.NDArray[np.int64] = sample_positions(tensor.elements, counts[tensor.name], SEED).numpy()
            return found

        def done(tensor: TensorInfo, values: Tensor) -> None:
            taken[tensor.name] = values

        wanted = [index.tensors[name] for name in counts]
        self._empty[side] = {tensor.name for tensor in wanted if not tensor.elements}
        return picking(source, wanted, positions, done)

    def robust_cosine(self, pair: tuple[str, str]) -> RobustCosine | None:
        """Rank correlation and winsorised cosine of a pair that the pass is done with; None if it was not asked for.

        Raises ValueError for a piece of which the pass did not read all.
        """
        import torch

        from checks.statistics.magnitude import robust_cosine

        sides: list[list[Tensor]] = [[], []]
        for names in self._pieces.get(pair, ()):
            for values, taken, empty, name in zip(sides, self._taken, self._empty, names, strict=True):
                if name in taken:
                    values.append(taken.pop(name).double())
                elif name not in empty:
                    raise ValueError(f"{name} did not go through the pass as a whole: its elements are not known")
        if not all(sides):
            return None
        ours, theirs = (torch.cat(side) for side in sides)
        return robust_cosine(ours, theirs, len(ours), SEED)


def as_json(found: RobustCosine | None) -> dict[str, Any] | None:
    """For a file."""
    return None if found is None else asdict(found)


def from_json(stored: Mapping[str, Any] | None) -> RobustCosine | None:
    """What `as_json` wrote. Raises TypeError for anything else."""
    from checks.statistics.magnitude import RobustCosine

    return None if stored is None else RobustCosine(**stored)
