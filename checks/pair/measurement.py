"""What the weights of a pair are measured for, all in one pass: each byte is read once, whatever asks for it.

A LayerSweep takes from the same pass what other checks want of whole layers.

Read again are only: tensors that any model could have, as far as their beginnings tell, unless the beginning is all
(tables and masks; trained weights are not among them); tensors equal to one of another name, of which the beginning
tells mostly; MLPs whose matrices lie so far apart that holding them would take more than HELD_MEMORY; and quantised
weights, if fingerprints are asked for, which are those of the values that they stand for.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from checks.checkpoint.checkpoint import Checkpoint
from checks.checkpoint.identity import identity_of
from checks.checkpoint.index import CheckpointIndex, TensorInfo, equal_shards
from checks.pair import fingerprints, robust_cosines
from checks.pair.equal_tensors import equal_tensors, why_ordinary
from checks.pair.fingerprints import Fingerprint, Fingerprints
from checks.pair.hashes import hash_missing
from checks.pair.held_mlps import HeldMlps
from checks.pair.ledger import FULL, Item, LayerStore, Ledger, on_device
from checks.pair.matching import MlpPair, layer_label, mlp_pairs, tensor_pairs
from checks.pair.neurons import NeuronGroup, group_from_json, neuron_group, read_matrices, tests_as_json
from checks.pair.passed_fingerprints import PassedFingerprints
from checks.pair.robust_cosines import PairedElements, telling_pairs

if TYPE_CHECKING:
    from checks.pair.layer_sweep import LayerSweep
    from checks.statistics.elementwise import ElementwiseSums
    from checks.statistics.magnitude import RobustCosine
    from checks.streaming.stream import TensorResult

Value = TypeVar("Value")

# What is kept in a store; another version is measured again.
VERSIONS = {"sha256": "1", "elementwise": "3", "neurons": "2", "fingerprints": "2", "equal tensors": "2"}


@dataclass(frozen=True)
class PairedTensor:
    """What the pass found out about a pair of tensors. `ordinary`: why any model could have both; they have no sums.

    `sums` is also None for tensors in shards of equal published SHA-256: they are equal, and nothing was read of them.
    `robust`: of a few pairs, see `telling_pairs`.
    """

    sums: ElementwiseSums | None
    ordinary: str | None = None
    robust: RobustCosine | None = None


@dataclass(frozen=True)
class Measurements:
    """What was measured of a pair, in the order of the candidate's names."""

    tensors: Mapping[tuple[str, str], PairedTensor]  # by the candidate's and the reference's name
    identical: tuple[tuple[str, str], ...]  # tensors of equal bytes, under any names
    ordinary: Mapping[str, str]  # tensors of the candidate that any model could have: name → reason
    neurons: tuple[NeuronGroup, ...] | None  # None if they were not asked for
    fingerprints: tuple[Fingerprints, Fingerprints] | None  # of all tensors of both sides; None if not asked for


def measure(
    candidate: Checkpoint,
    reference: Checkpoint,
    device: str = "cpu",
    with_neurons: bool = True,
    store: LayerStore | None = None,
    with_fingerprints: bool = False,
    sweep: LayerSweep | None = None,
) -> Measurements:
    """Hash all tensors of both checkpoints, compare those of equal role, and test the neurons of their MLPs.

    The checkpoints remember the hashes. `with_neurons`: False keeps no matrix in memory. `with_fingerprints`: also take
    those of all tensors. `store`: layers that are there are not read again, and each layer goes there once it is
    measured. `sweep`: gets the layers that are read. Raises CheckpointUnavailable, also if a file was changed or
    replaced before what it holds could be kept.
    """
    identities = identities_of(store, candidate, reference)
    # Whoever waits for another worker's pass over the same pair finds in the store what that put there.
    # Of one side, which others may be comparing with something else, it measures what no other worker is at.
    with store.exclusive((*identities, "pass")) if store is not None else nullcontext(), ExitStack() as claims:
        how = (device, with_neurons, with_fingerprints, store, sweep, claims)
        found = _Measurement((candidate, reference), identities, *how).run()
    for side in (candidate, reference):
        side.require_unchanged()
    return found


def identities_of(store: LayerStore | None, candidate: Checkpoint, reference: Checkpoint) -> tuple[str, str]:
    """What both are called in a store; nothing without one."""
    if store is None:
        return "", ""
    ours, theirs = (identity_of(side.index, side.prefix, side.config) for side in (candidate, reference))
    return ours, theirs


class _Measurement:
    def __init__(
        self,
        sides: tuple[Checkpoint, Checkpoint],
        identities: tuple[str, str],
        device: str,
        with_neurons: bool,
        with_fingerprints: bool,
        store: LayerStore | None,
        sweep: LayerSweep | None,
        claims: ExitStack,
    ) -> None:
        candidate, reference = self._sides = sides
        self._sweep = sweep
        self._device = device
        self._with_neurons = with_neurons
        self._store = store
        self._claims = claims
        self._identities = identities
        self._names = [{entry.stored_name: name for name, entry in side.tensors.items()} for side in self._sides]
        self._indexes = [_of_component(side) for side in self._sides]
        # Tensors that are equal for certain, by the names in both indexes.
        self._published = equal_shards(*self._indexes)
        self._hashes = [self._hash_ledger(side) for side in (0, 1)]
        self._prints = [self._passed_fingerprints(side) for side in (0, 1)] if with_fingerprints else []
        pairs = tensor_pairs(candidate, reference)
        self._paired = [(name, pairs[name]) for name in candidate.tensors if name in pairs]
        self._tensors: Ledger[PairedTensor] = self._ledger(
            "elementwise",
            _by_layer(candidate, {pair: pair[0] for pair in self._paired}),
            _paired_tensor_as_json,
            _read_paired_tensor,
        )
        self._telling = telling_pairs(candidate, self._paired)
        mlps = [mlp for mlp in mlp_pairs(candidate, reference) if mlp.fits] if with_neurons else []
        self._mlps: dict[Item, MlpPair] = {(mlp.module, mlp.theirs["up"].name): mlp for mlp in mlps}
        self._neurons: Ledger[NeuronGroup] = self._ledger(
            "neurons",
            _by_layer(candidate, {item: mlp.ours["up"].name for item, mlp in self._mlps.items()}),
            tests_as_json,
            lambda item, stored: group_from_json(self._mlps[item], stored),
        )
        self._held = HeldMlps(candidate, self._mlps, self._neurons)
        self._reasons: dict[tuple[int, str], str | None] = {}  # of tensors that were read again as a whole

    def run(self) -> Measurements:
        """Measure what is not in the store."""
        partner = {item[0]: item[1] for item in self._tensors.missing}
        later = self._held.plan(partner, self._published)
        self._stream(partner)
        self._claims.close()
        for mlp, ours, theirs in read_matrices(*self._sides, later, self._device):
            self._neurons.add((mlp.module, mlp.theirs["up"].name), neuron_group(mlp, ours, theirs))
        for side, hashes in zip(self._sides, self._hashes, strict=True):
            with hashes.rest():
                hash_missing(side, hashes, needless=self._published)
        digests = [{name: digest for (name,), digest in hashes.values.items()} for hashes in self._hashes]
        for checkpoint, known in zip(self._sides, digests, strict=True):
            checkpoint._sha256.update(known)
        tensors = {(ours, theirs): self._tensors.values[ours, theirs] for ours, theirs in self._paired}
        prints = self._complete_fingerprints()
        ordinary = {name: one.ordinary for (name, _), one in tensors.items() if one.ordinary is not None}
        identical = []
        equal = [pair for pair in equal_tensors(self._sides, digests, self._published) if pair[0] not in ordinary]
        looked = self._looked_at([pair for pair in equal if pair not in tensors or tensors[pair].sums is None])
        for pair in equal:
            if (reason := looked.get(pair)) is None:
                identical.append(pair)
            else:
                ordinary[pair[0]] = reason
        neurons = tuple(self._neurons.values[item] for item in self._mlps) if self._with_neurons else None
        return Measurements(tensors, tuple(identical), ordinary, neurons, prints)

    # What there is to measure

    def _ledger(
        self,
        statistic: str,
        layers: Mapping[str, Iterable[Item]],
        write: Callable[[Value], Any],
        read: Callable[[Item, Any], Value],
    ) -> Ledger[Value]:
        """A statistic of the pair, computed on the device."""
        key, reading = (*self._identities, statistic, VERSIONS[statistic]), on_device(FULL, self._device)
        return Ledger(self._store, key, layers, write, read, reading, self._require_unchanged)

    def _require_unchanged(self) -> None:
        for side in self._sides:
            side.require_unchanged()

    def _side_ledger(
        self, side: int, statistic: str, write: Callable[[Value], Any], read: Callable[[Any], Value]
    ) -> Ledger[Value]:
        """A statistic of the tensors of one side, whatever it is compared with."""
        checkpoint, key = self._sides[side], (self._identities[side], "", statistic, VERSIONS[statistic])
        layers = _by_layer(checkpoint, {(name,): name for name in checkpoint.tensors})
        return Ledger(
            self._store,
            key,
            layers,
            write,
            lambda _, stored: read(stored),
            require_unchanged=checkpoint.require_unchanged,
        )

    def _hash_ledger(self, side: int) -> Ledger[str]:
        hashes: Ledger[str] = self._side_ledger(side, "sha256", str, str)
        for (name,) in sorted(hashes.missing):
            if name in self._sides[side]._sha256:
                hashes.add((name,), self._sides[side]._sha256[name])
        self._claims.enter_context(hashes.claimed())
        return hashes

    def _passed_fingerprints(self, side: int) -> PassedFingerprints:
        ledger: Ledger[Fingerprint] = self._side_ledger(
            side, "fingerprints", fingerprints.as_json, fingerprints.from_json
        )
        self._claims.enter_context(ledger.claimed())
        return PassedFingerprints(self._sides[side], ledger, self._published)

    # The pass

    def _stream(self, partner: Mapping[str, str]) -> None:
        from checks.statistics.ordinary import head_elements
        from checks.streaming.stream import stream_pair

        candidate, reference = self._sides
        unhashed = [hashes.missing for hashes in self._hashes]
        pairs = []
        for name, other in partner.items():
            stored = candidate.tensors[name].stored_name, reference.tensors[other].stored_name
            if stored[0] == stored[1] and stored[0] in self._published:
                self._tensors.add((name, other), PairedTensor(None))
            else:
                pairs.append(stored)
        known = [
            {stored for stored, name in names.items() if (name,) not in missing or stored in self._published}
            for names, missing in zip(self._names, unhashed, strict=True)
        ]
        elements, sources = self._elements(pairs), [candidate.source, reference.source]
        for side in (0, 1):
            sources[side] = elements.source(side, self._indexes[side], sources[side])
            if self._prints:
                sources[side] = self._prints[side].source(sources[side])
                known[side] -= self._prints[side].wanted
            if self._sweep is not None:
                streamed = {name[side] for name in pairs} | (self._indexes[side].tensors.keys() - known[side])
                sources[side] = self._sweep.source(side, sources[side], streamed)
        results = stream_pair(
            self._indexes[0],
            self._indexes[1],
            (sources[0], sources[1]),
            pairs,
            hashed=(known[0], known[1]),
            head=lambda tensor: head_elements(tensor.shape),
            keep={candidate.tensors[name].stored_name for name in self._held.tensors},
            device=self._device,
        )
        unmeasured = self._tensors.missing
        for result in results:
            for side, tensor, digest in (
                (0, result.candidate, result.candidate_sha256),
                (1, result.reference, result.reference_sha256),
            ):
                if tensor is not None and digest is not None and (self._names[side][tensor],) in unhashed[side]:
                    self._hashes[side].add((self._names[side][tensor],), digest)
                if tensor is not None and self._prints:
                    self._prints[side].add(tensor, partial(self._reason_of_all, side))
            if result.candidate is not None and result.reference is not None:
                pair = self._names[0][result.candidate], self._names[1][result.reference]
                if pair in unmeasured:
                    self._tensors.add(pair, self._paired_tensor(*pair, result, elements.robust_cosine(pair)))
                if result.whole:
                    self._held.take(pair[0], *result.whole)

    def _elements(self, streamed: list[tuple[str, str]]) -> PairedElements:
        """What takes elements for the robust cosines that are missing."""
        names = {stored: (self._names[0][stored[0]], self._names[1][stored[1]]) for stored in streamed}
        wanted = self._telling & self._tensors.missing
        return PairedElements({pair: [stored] for stored, pair in names.items() if pair in wanted})

    def _reason_of_all(self, side: int, name: str) -> str | None:
        """Why could any model have this tensor? Reads all of it, once."""
        from checks.statistics.ordinary import ordinary_reason

        if (side, name) not in self._reasons:
            self._reasons[side, name] = ordinary_reason(self._sides[side].read(name))
        return self._reasons[side, name]

    def _paired_tensor(self, name: str, other: str, result: TensorResult, robust: RobustCosine | None) -> PairedTensor:
        """The sums of a pair; or why any model could have both, for which the whole of them is looked at."""
        from checks.statistics.ordinary import may_be_ordinary, ordinary_reason

        sums = result.sums
        assert sums is not None
        assert result.heads is not None
        entries = self._sides[0].tensors[name], self._sides[1].tensors[other]
        # Of what seems to be equal it must be certain: it might become evidence.
        seems_equal = sums.equal == sums.n
        if all(
            may_be_ordinary(head, entry.shape, if_unseen=seems_equal)
            for head, entry in zip(result.heads, entries, strict=True)
        ):
            reasons = [
                ordinary_reason(head.reshape(entry.shape))
                if len(head) == entry.elements
                else self._reason_of_all(side, entry.name)
                for side, (head, entry) in enumerate(zip(result.heads, entries, strict=True))
            ]
            if all(reasons):
                return PairedTensor(None, reasons[0])
        return PairedTensor(sums, robust=robust)

    def _complete_fingerprints(self) -> tuple[Fingerprints, Fingerprints] | None:
        if not self._prints:
            return None
        ours = self._prints[0].complete({})
        equal = {self._names[1][stored]: self._names[0][stored] for stored in self._published}
        return ours, self._prints[1].complete({name: self._prints[0].of(other) for name, other in equal.items()})

    def _looked_at(self, equal: list[tuple[str, str]]) -> Mapping[Item, str | None]:
        """Why any model could have them, for tensors of which the pass did not tell."""
        ledger: Ledger[str | None] = self._ledger(
            "equal tensors", {"all": equal}, lambda reason: reason, lambda _, stored: stored and str(stored)
        )
        for name, other in sorted(ledger.missing):
            prints = self._prints[0] if self._prints and self._prints[0].tells(name) else None
            reason = prints.of(name).ordinary if prints else why_ordinary(self._sides[0], name)
            ledger.add((name, other), reason)
        return ledger.values


def _of_component(checkpoint: Checkpoint) -> CheckpointIndex:
    """The index of one component's tensors."""
    tensors: dict[str, TensorInfo] = {entry.stored_name: entry.stored for entry in checkpoint.tensors.values()}
    return replace(checkpoint.index, tensors=tensors)


def _by_layer(checkpoint: Checkpoint, items: Mapping[Item, str]) -> Mapping[str, list[Item]]:
    """Items by layer, where each belongs to a tensor of the checkpoint."""
    layers: dict[str, list[Item]] = defaultdict(list)
    for item, name in items.items():
        layers[layer_label(checkpoint.tensors[name])].append(item)
    return layers


def _paired_tensor_as_json(one: PairedTensor) -> dict[str, Any]:
    sums = one.sums.as_json() if one.sums else None
    return {"sums": sums, "ordinary": one.ordinary, "robust": robust_cosines.as_json(one.robust)}


def _read_paired_tensor(_: Item, stored: Any) -> PairedTensor:
    from checks.statistics.elementwise import ElementwiseSums

    sums = None if stored["sums"] is None else ElementwiseSums.from_json(stored["sums"])
    reason = stored["ordinary"]
    return PairedTensor(sums, None if reason is None else str(reason), robust_cosines.from_json(stored["robust"]))
