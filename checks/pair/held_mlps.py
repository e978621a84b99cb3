"""MLPs whose matrices are kept as a pass reads them, until all of an MLP are there and its neurons are tested."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import TYPE_CHECKING

from checks.checkpoint.checkpoint import Checkpoint
from checks.pair.ledger import Item, Ledger
from checks.pair.matching import MlpPair
from checks.pair.neurons import NeuronGroup, neuron_group

if TYPE_CHECKING:
    from torch import Tensor

# Bytes of MLP matrices that wait for the others of their MLP, at most; but a single MLP may always be held.
HELD_MEMORY = 2 << 30


class HeldMlps:
    """The MLPs of a pair that wait for their tests. `ledger` gets the tests of those that it misses."""

    def __init__(self, candidate: Checkpoint, mlps: Mapping[Item, MlpPair], ledger: Ledger[NeuronGroup]) -> None:
        self._candidate = candidate
        self._mlps = mlps
        self._ledger = ledger
        self._place: dict[str, tuple[Item, str]] = {}
        self._matrices: dict[Item, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}  # of MLPs that are incomplete

    @property
    def tensors(self) -> Set[str]:
        """The candidate's tensors that are to be held."""
        return self._place.keys()

    def plan(self, partner: dict[str, str], unread: Set[str]) -> list[MlpPair]:
        """Decide which are held. Returns the MLPs to be read afterwards.

        `partner`: the reference's tensor for each of the candidate's that the pass compares; gets those of the MLPs as
        well. `unread`: stored names of tensors that the pass leaves out.
        """
        infos = sorted((one.stored.shard, one.stored.start, name) for name, one in self._candidate.tensors.items())
        order = {name: number for number, (_, _, name) in enumerate(infos)}
        taken = {theirs: ours for ours, theirs in partner.items()}
        missing = self._ledger.missing
        spans = [
            (min(places), max(places), item)
            for item, mlp in self._mlps.items()
            if item in missing and (places := [order[entry.name] for entry in mlp.ours.values()])
        ]
        later = []
        held: list[tuple[int, int]] = []  # the last place and the bytes of the MLPs that are incomplete
        for first, last, item in sorted(spans):
            mlp = self._mlps[item]
            pairs = {entry.name: mlp.theirs[kind].name for kind, entry in mlp.ours.items()}
            held = [(end, size) for end, size in held if end > first]
            fits = not held or sum(size for _, size in held) + mlp.bytes <= HELD_MEMORY
            # A tensor is streamed with one counterpart, or not at all.
            is_free = all(
                partner.get(ours, theirs) == theirs
                and taken.get(theirs, ours) == ours
                and self._candidate.tensors[ours].stored_name not in unread
                for ours, theirs in pairs.items()
            )
            if not (fits and is_free):
                later.append(mlp)
                continue
            held.append((last, mlp.bytes))
            partner |= pairs
            taken |= {theirs: ours for ours, theirs in pairs.items()}
            self._place |= {entry.name: (item, kind) for kind, entry in mlp.ours.items()}
        return later

    def take(self, name: str, ours: Tensor, theirs: Tensor) -> None:
        """A matrix of both sides; with the last one of its MLP the neurons are tested, and all are let go."""
        item, kind = self._place[name]
        mlp = self._mlps[item]
        matrices = self._matrices.setdefault(item, ({}, {}))
        matrices[0][kind], matrices[1][kind] = ours, theirs
        if matrices[0].keys() == mlp.ours.keys():
            self._ledger.add(item, neuron_group(mlp, *self._matrices.pop(item)))
