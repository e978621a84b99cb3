"""The fingerprints of a checkpoint's tensors, taken from the pass that reads them for other reasons."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from typing import TYPE_CHECKING

from checks.checkpoint.checkpoint import Checkpoint
from checks.pair.fingerprints import (
    Fingerprint,
    Fingerprints,
    picked_fingerprint,
    read_fingerprint,
    settled,
    wanted_positions,
)
from checks.pair.ledger import Ledger

if TYPE_CHECKING:
    from torch import Tensor

    from checks.checkpoint.index import ByteSource, TensorInfo


class PassedFingerprints:
    """The fingerprints of one side.

    `ledger`: has those that are known, gets the others. `unread`: stored names of tensors that the pass leaves out.
    """

    def __init__(self, checkpoint: Checkpoint, ledger: Ledger[Fingerprint], unread: Set[str]) -> None:
        self._checkpoint = checkpoint
        self._ledger = ledger
        self._wanted = {
            entry.stored_name: name
            for name, entry in checkpoint.tensors.items()
            if (name,) in ledger.missing and entry.is_float and entry.elements and entry.stored_name not in unread
            # Of what belongs to another tensor's values there is no fingerprint.
            if not getattr(entry.role, "companion_of", None)
        }
        self._taken: dict[str, Fingerprint] = {}

    @property
    def wanted(self) -> Set[str]:
        """Stored names of the tensors that the pass must read for this."""
        return self._wanted.keys()

    def source(self, source: ByteSource) -> ByteSource:
        """The source for the pass. Each fingerprint is made by the thread that reads the tensor's last bytes."""
        from checks.streaming.picking import picking

        def done(tensor: TensorInfo, values: Tensor) -> None:
            self._taken[tensor.name] = picked_fingerprint(tensor.shape, values)

        stored = [self._checkpoint.tensors[name].stored for name in self._wanted.values()]
        return picking(source, stored, lambda tensor: wanted_positions(tensor.shape), done)

    def add(self, stored_name: str, reason_of: Callable[[str], str | None]) -> None:
        """The pass is done with a tensor. `reason_of`: why any model could have one, for which all of it is read."""
        if stored_name in self._taken:
            name = self._wanted[stored_name]
            self._ledger.add((name,), settled(self._taken.pop(stored_name), lambda: reason_of(name)))

    def of(self, name: str) -> Fingerprint:
        """The fingerprint of a tensor; KeyError before there is one."""
        return self._ledger.values[name,]

    def tells(self, name: str) -> bool:
        """Does the fingerprint say whether any model could have the tensor?"""
        found = self.of(name)
        return self._checkpoint.tensors[name].is_float and (found.excluded is None or found.ordinary is not None)

    def complete(self, equal: Mapping[str, Fingerprint]) -> Fingerprints:
        """All of them. What the pass could not give is read now: quantised weights, and what it left out. What another
        worker is at is waited for.

        `equal`: of tensors that are known to be equal to one whose fingerprint there is. Raises CheckpointUnavailable.
        """
        with self._ledger.rest():
            for (name,) in sorted(self._ledger.missing):
                found = equal.get(name)
                self._ledger.add((name,), read_fingerprint(self._checkpoint, name) if found is None else found)
        return Fingerprints.of({name: self._ledger.values[name,] for name in self._checkpoint.tensors})
