"""What the weights of a pair are measured for, all in one pass: each byte is read once, whatever asks for it.

Read again are only: tensors that any model could have, as far as their beginnings tell, unless the beginning is all
(tables and masks; trained weights are not among them); tensors equal to one of another name, of which the beginning
tells mostly; and MLPs whose matrices lie so far apart that holding them would take more than HELD_MEMORY.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from checks.checkpoint.checkpoint import Checkpoint, TensorEntry, torch_dtype
from checks.checkpoint.identity import identity_of
from checks.checkpoint.index import CheckpointIndex, TensorInfo, equal_shards
from checks.pair.ledger import Item, LayerStore, Ledger
from checks.pair.matching import MlpPair, layer_label, mlp_pairs, tensor_pairs
from checks.pair.neurons import NeuronGroup, group_from_json, neuron_group, read_matrices, tests_as_json

if TYPE_CHECKING:
    from torch import Tensor

    from checks.statistics.elementwise import ElementwiseSums
    from checks.streaming.stream import TensorResult

Value = TypeVar("Value")

# Bytes of MLP matrices that wait for the others of their MLP, at most; but a single MLP may always be held.
HELD_MEMORY = 2 << 30

# What is kept in a store; another version is measured again.
VERSIONS = {"sha256": "1", "elementwise": "1", "neurons": "1", "equal tensors": "1"}

# Tensors up to this many elements are read whole where their beginning might do.
SMALL = 1 << 20


@dataclass(frozen=True)
class PairedTensor:
    """What the pass found out about a pair of tensors. `ordinary`: why any model could have both; they have no sums.

    `sums` is also None for tensors in shards of equal published SHA-256: they are equal, and nothing was read of them.
    """

    sums: ElementwiseSums | None
    ordinary: str | None = None


@dataclass(frozen=True)
class Measurements:
    """What was measured of a pair, in the order of the candidate's names."""

    tensors: Mapping[tuple[str, str], PairedTensor]  # by the candidate's and the reference's name
    identical: tuple[tuple[str, str], ...]  # tensors of equal bytes, under any names
    ordinary: Mapping[str, str]  # tensors of the candidate that any model could have: name → reason
    neurons: tuple[NeuronGroup, ...] | None  # None if they were not asked for


def measure(
    candidate: Checkpoint,
    reference: Checkpoint,
    device: str = "cpu",
    with_neurons: bool = True,
    store: LayerStore | None = None,
) -> Measurements:
    """Hash all tensors of both checkpoints, compare those of equal role, and test the neurons of their MLPs.

    The checkpoints remember the hashes. `with_neurons`: False keeps no matrix in memory. `store`: layers that are there
    are not read again, and each layer goes there once it is measured. Raises CheckpointUnavailable.
    """
    if store is None:
        return _Measurement(candidate, reference, device, with_neurons, None, ("", "")).run()
    ours, theirs = (identity_of(side.index, side.prefix, side.config) for side in (candidate, reference))
    # Whoever waits for another worker's pass over the same pair finds in the store what that put there.
    with store.exclusive((ours, theirs, "pass")):
        return _Measurement(candidate, reference, device, with_neurons, store, (ours, theirs)).run()


class _Measurement:
    def __init__(
        self,
        candidate: Checkpoint,
        reference: Checkpoint,
        device: str,
        with_neurons: bool,
        store: LayerStore | None,
        identities: tuple[str, str],
    ) -> None:
        self._sides = (candidate, reference)
        self._device = device
        self._with_neurons = with_neurons
        self._store = store
        self._identities = identities
        self._names = [{entry.stored_name: name for name, entry in side.tensors.items()} for side in self._sides]
        self._indexes = [_of_component(side) for side in self._sides]
        # Tensors that are equal for certain, by the names in both indexes.
        self._published = equal_shards(*self._indexes)
        self._hashes = [self._hash_ledger(side) for side in (0, 1)]
        pairs = tensor_pairs(candidate, reference)
        self._paired = [(name, pairs[name]) for name in candidate.tensors if name in pairs]
        self._tensors: Ledger[PairedTensor] = self._ledger(
            "elementwise",
            _by_layer(candidate, {pair: pair[0] for pair in self._paired}),
            lambda one: {"sums": one.sums.as_json() if one.sums else None, "ordinary": one.ordinary},
            _read_paired_tensor,
        )
        mlps = [mlp for mlp in mlp_pairs(candidate, reference) if mlp.fits] if with_neurons else []
        self._mlps: dict[Item, MlpPair] = {(mlp.module, mlp.theirs["up"].name): mlp for mlp in mlps}
        self._neurons: Ledger[NeuronGroup] = self._ledger(
            "neurons",
            _by_layer(candidate, {item: mlp.ours["up"].name for item, mlp in self._mlps.items()}),
            tests_as_json,
            lambda item, stored: group_from_json(self._mlps[item], stored),
        )
        self._matrices: dict[Item, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}  # of MLPs that are incomplete

    def run(self) -> Measurements:
        """Measure what is not in the store."""
        partner = {item[0]: item[1] for item in self._tensors.missing}
        kept, later = self._plan(partner)
        self._stream(partner, kept)
        for mlp, ours, theirs in read_matrices(*self._sides, later, self._device):
            self._neurons.add((mlp.module, mlp.theirs["up"].name), neuron_group(mlp, ours, theirs))
        for side, hashes in zip(self._sides, self._hashes, strict=True):
            side._sha256.update({name: digest for (name,), digest in hashes.values.items()})
        tensors = {(ours, theirs): self._tensors.values[ours, theirs] for ours, theirs in self._paired}
        ordinary = {name: one.ordinary for (name, _), one in tensors.items() if one.ordinary is not None}
        identical = []
        equal = [pair for pair in self._equal_tensors() if pair[0] not in ordinary]
        looked = self._looked_at([pair for pair in equal if pair not in tensors or tensors[pair].sums is None])
        for pair in equal:
            if (reason := looked.get(pair)) is None:
                identical.append(pair)
            else:
                ordinary[pair[0]] = reason
        neurons = tuple(self._neurons.values[item] for item in self._mlps) if self._with_neurons else None
        return Measurements(tensors, tuple(identical), ordinary, neurons)

    # What there is to measure

    def _ledger(
        self,
        statistic: str,
        layers: Mapping[str, Iterable[Item]],
        write: Callable[[Value], Any],
        read: Callable[[Item, Any], Value],
    ) -> Ledger[Value]:
        return Ledger(self._store, (*self._identities, statistic, VERSIONS[statistic]), layers, write, read)

    def _hash_ledger(self, side: int) -> Ledger[str]:
        """The SHA-256 of the tensors of one side, whatever it is compared with."""
        checkpoint, key = self._sides[side], (self._identities[side], "", "sha256", VERSIONS["sha256"])
        layers = _by_layer(checkpoint, {(name,): name for name in checkpoint.tensors})
        hashes: Ledger[str] = Ledger(self._store, key, layers, str, lambda _, stored: str(stored))
        for (name,) in sorted(hashes.missing):
            if name in checkpoint._sha256:
                hashes.add((name,), checkpoint._sha256[name])
        return hashes

    def _plan(self, partner: dict[str, str]) -> tuple[dict[str, tuple[Item, str]], list[MlpPair]]:
        """Which MLP and kind each tensor that is to be held belongs to; and the MLPs to be read afterwards.

        `partner`: the reference's tensor for each of the candidate's that is compared; gets those of the MLPs as well.
        """
        candidate = self._sides[0]
        infos = sorted((entry.stored.shard, entry.stored.start, name) for name, entry in candidate.tensors.items())
        order = {name: number for number, (_, _, name) in enumerate(infos)}
        taken = {theirs: ours for ours, theirs in partner.items()}
        missing = self._neurons.missing
        spans = [
            (min(places), max(places), item)
            for item, mlp in self._mlps.items()
            if item in missing and (places := [order[entry.name] for entry in mlp.ours.values()])
        ]
        kept: dict[str, tuple[Item, str]] = {}
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
                and candidate.tensors[ours].stored_name not in self._published
                for ours, theirs in pairs.items()
            )
            if not (fits and is_free):
                later.append(mlp)
                continue
            held.append((last, mlp.bytes))
            partner |= pairs
            taken |= {theirs: ours for ours, theirs in pairs.items()}
            kept |= {entry.name: (item, kind) for kind, entry in mlp.ours.items()}
        return kept, later

    # The pass

    def _stream(self, partner: Mapping[str, str], kept: Mapping[str, tuple[Item, str]]) -> None:
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
        results = stream_pair(
            self._indexes[0],
            self._indexes[1],
            (candidate.source, reference.source),
            pairs,
            hashed=(known[0], known[1]),
            head=lambda tensor: head_elements(tensor.shape),
            keep={candidate.tensors[name].stored_name for name in kept},
            skip_identical=False,
            device=self._device,
        )
        unmeasured = self._tensors.missing
        for result in results:
            ours, theirs = result.candidate, result.reference
            if ours is not None and result.candidate_sha256 is not None:
                self._hashes[0].add((self._names[0][ours],), result.candidate_sha256)
            if theirs is not None and result.reference_sha256 is not None:
                self._hashes[1].add((self._names[1][theirs],), result.reference_sha256)
            if ours is not None and theirs is not None:
                pair = self._names[0][ours], self._names[1][theirs]
                if pair in unmeasured:
                    self._tensors.add(pair, self._paired_tensor(*pair, result))
                if result.whole:
                    self._take(*kept[pair[0]], *result.whole)

    def _paired_tensor(self, name: str, other: str, result: TensorResult) -> PairedTensor:
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
                ordinary_reason(head.reshape(entry.shape) if len(head) == entry.elements else side.read(entry.name))
                for side, head, entry in zip(self._sides, result.heads, entries, strict=True)
            ]
            if all(reasons):
                return PairedTensor(None, reasons[0])
        return PairedTensor(sums)

    def _take(self, item: Item, kind: str, ours: Tensor, theirs: Tensor) -> None:
        """A matrix of both sides; with the last one of its MLP the neurons are tested, and all are let go."""
        mlp = self._mlps[item]
        matrices = self._matrices.setdefault(item, ({}, {}))
        matrices[0][kind], matrices[1][kind] = ours, theirs
        if matrices[0].keys() == mlp.ours.keys():
            self._neurons.add(item, neuron_group(mlp, *self._matrices.pop(item)))

    # Equal tensors

    def _equal_tensors(self) -> list[tuple[str, str]]:
        """Tensors of equal bytes and dtype, names and shapes ignored, each of the candidate's with one counterpart."""
        candidate, reference = self._sides
        ours, theirs = (ledger.values for ledger in self._hashes)
        by_hash: dict[tuple[str, str], list[str]] = defaultdict(list)
        for name, entry in reference.tensors.items():
            if (name,) in theirs:
                by_hash[entry.dtype, theirs[name,]].append(name)
        pairs = []
        for name, entry in candidate.tensors.items():
            names = by_hash.get((entry.dtype, ours[name,])) if (name,) in ours else None
            if entry.stored_name in self._published:
                pairs.append((name, self._names[1][entry.stored_name]))
            elif names:
                pairs.append((name, name if name in names else names[0]))
        return pairs

    def _looked_at(self, equal: list[tuple[str, str]]) -> Mapping[Item, str | None]:
        """Why any model could have them, for tensors of which the pass did not tell."""
        ledger: Ledger[str | None] = self._ledger(
            "equal tensors", {"all": equal}, lambda reason: reason, lambda _, stored: stored and str(stored)
        )
        for name, other in sorted(ledger.missing):
            ledger.add((name, other), _reason(self._sides[0], self._sides[0].tensors[name]))
        return ledger.values


def _reason(checkpoint: Checkpoint, entry: TensorEntry) -> str | None:
    """Why could any model have this tensor? Read as far as that takes."""
    import torch

    from checks.statistics.ordinary import head_elements, may_be_ordinary, ordinary_reason

    # 64-bit integers index things (positions, relative windows); packed weights have fewer bits.
    if entry.dtype in ("I64", "U64"):
        return "integer indices"
    info, dtype = entry.stored, torch_dtype(entry.dtype)
    if info.elements > SMALL and info.stop - info.start == info.elements * dtype.itemsize:
        buffer = bytearray(head_elements(info.shape) * dtype.itemsize)
        checkpoint.source.read_into(info.shard, info.start, memoryview(buffer))
        if not may_be_ordinary(torch.frombuffer(buffer, dtype=dtype), info.shape, if_unseen=True):
            return None
    return ordinary_reason(checkpoint.read(entry.name))


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


def _read_paired_tensor(_: Item, stored: Any) -> PairedTensor:
    from checks.statistics.elementwise import ElementwiseSums

    sums = None if stored["sums"] is None else ElementwiseSums.from_json(stored["sums"])
    return PairedTensor(sums, None if stored["ordinary"] is None else str(stored["ordinary"]))
