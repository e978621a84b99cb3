"""How much of a pair is read: what the user asked for, the plan that follows, and what is left of a model under it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from checks.checkpoint.checkpoint import Checkpoint, TensorEntry
from checks.checkpoint.template import RoleAssignment
from checks.pair.matching import tensor_pairs
from checks.pair.shared_tokens import token_tables
from checks.streaming.planned_source import NotPlanned
from checks.streaming.read_plan import FULL, MODES, SCREEN, ReadPlan, ReadRequest, SideRead
from checks.streaming.sampling import Side, plan_reads
from checks.streaming.token_rows import TokenTables

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Reading:
    """`--read`, `--budget` and `--seed`. `mode`: None reads what lies on this disk in full, and screens what does not.

    `budget`: bytes of both models of a pair together; None for the mode's own, see ReadRequest. Raises ValueError for
    modes and budgets that there are not.
    """

    mode: str | None = None
    budget: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        ReadRequest(MODES[0] if self.mode is None else self.mode, self.budget, self.seed)

    def request(self, candidate: Checkpoint, reference: Checkpoint) -> ReadRequest:
        """What is asked for of two opened checkpoints; a snapshot in the local hub cache lies on this disk."""
        is_local = candidate.directory is not None and reference.directory is not None
        default = FULL if is_local else SCREEN
        budget = self.budget
        if self.mode is None and is_local:
            budget = None  # a budget is for what is fetched; whoever limits a full reading says so
        return ReadRequest(self.mode or default, budget, self.seed)


def plan_of(
    candidate: Checkpoint,
    reference: Checkpoint,
    request: ReadRequest,
    token_ids: Callable[[], tuple[Sequence[int], Sequence[int]]] = lambda: ((), ()),
) -> ReadPlan | None:
    """What is read of a pair; None for everything. Raises BudgetTooSmall, a CheckpointUnavailable.

    `token_ids`: gives the ids of tokens that both vocabularies share; asked when rows of them could be read.
    """
    if request.mode == FULL and request.budget is None:
        return None
    sides = [
        Side(side.index, {entry.stored_name: entry.role for entry in side.tensors.values()})
        for side in (candidate, reference)
    ]
    pairs = [
        (candidate.tensors[name].stored_name, reference.tensors[other].stored_name)
        for name, other in tensor_pairs(candidate, reference).items()
    ]
    tables = TokenTables()
    if request.mode != FULL:
        names = token_tables(candidate, reference)
        tables = TokenTables(*names, token_ids() if all(names) else ((), ()))
    plan = plan_reads(sides[0], sides[1], pairs, request, tables)
    return None if request.mode == FULL else plan


class WholeLayers:
    """A checkpoint without the layers and experts that a plan does not read whole: what a canonical form is made of.

    Tensors outside the layers are all there; reading one that is not planned raises NotPlanned.
    """

    def __init__(self, checkpoint: Checkpoint, side: SideRead) -> None:
        self._checkpoint = checkpoint
        layers = frozenset(side.layers)

        def is_there(entry: TensorEntry) -> bool:
            if entry.role.layer is None:
                return True
            read = side.reads.get(entry.stored_name)
            return entry.role.layer in layers and read is not None and (read.whole or bool(read.runs))

        self.tensors: Mapping[str, TensorEntry] = {
            name: entry for name, entry in checkpoint.tensors.items() if is_there(entry)
        }
        if not layers:
            raise NotPlanned(
                f"{checkpoint.where}: this run reads no numbered layer whole; read more with a larger --budget, or all "
                "with --read full"
            )

    @property
    def where(self) -> str:
        """Where the checkpoint lies, for people."""
        return self._checkpoint.where

    @property
    def config(self) -> Mapping[str, Any]:
        """Its config.json."""
        return self._checkpoint.config

    @property
    def roles(self) -> RoleAssignment:
        """The roles of all tensors."""
        return self._checkpoint.roles

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """One tensor, or the rows of it. Raises NotPlanned, or CheckpointUnavailable."""
        return self._checkpoint.read(name, rows)
