"""What the planned part of two checkpoints says of their tensors and MLPs, layer by layer.

Every planned byte is read once for the estimates, and MLPs that are read whole once more, for their tests.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from checks.checkpoint.checkpoint import Checkpoint, TensorEntry
from checks.checkpoint.index import equal_shards
from checks.pair import robust_cosines
from checks.pair.ledger import Item, LayerStore, Ledger, on_device
from checks.pair.matching import MlpPair, layer_label, mlp_pairs
from checks.pair.measurement import identities_of
from checks.pair.neurons import NeuronGroup, group_from_json, neuron_group, read_matrices, tests_as_json
from checks.pair.robust_cosines import PairedElements, telling_pairs
from checks.statistics.sampling import CosineEstimate
from checks.streaming.read_plan import ReadPlan, TensorRead, estimates, slice_name, slice_pairs, sliced

if TYPE_CHECKING:
    from checks.statistics.elementwise import ElementwiseSums
    from checks.statistics.magnitude import RobustCosine
    from checks.streaming.stream import TensorResult

# What is kept in a store; another version is measured again.
VERSIONS = {"estimates": "4", "neurons of the planned part": "2"}
_WEIGHTS = frozenset({"attention", "mlp", "output", "router", "routed expert", "shared expert"})


@dataclass(frozen=True)
class PartlyRead:
    """What the read part says of a pair of tensors.

    `sums`: of what was read. `ordinary`: why any model could have both, as far as they were read. `robust`: of a few
    pairs, see `telling_pairs`.
    """

    estimate: CosineEstimate
    sums: ElementwiseSums
    ordinary: str | None = None
    robust: RobustCosine | None = None


@dataclass(frozen=True)
class PartMeasurements:
    """What the read part of a pair says. `neurons`: of the MLPs that are read whole; None if not asked for.

    `identical`: some tensors of equal bytes, which published digests of their shards tell; there may be more.
    """

    tensors: Mapping[tuple[str, str], PartlyRead]  # by the candidate's and the reference's name
    neurons: tuple[NeuronGroup, ...] | None
    identical: tuple[tuple[str, str], ...] = ()


def measure_part(
    candidate: Checkpoint,
    reference: Checkpoint,
    plan: ReadPlan,
    device: str = "cpu",
    with_neurons: bool = True,
    store: LayerStore | None = None,
) -> PartMeasurements:
    """Estimate the cosines of tensors of equal role, and test the neurons of the MLPs that are read whole.

    Only planned bytes are read. `store`: layers that are there are not read again. Raises CheckpointUnavailable.
    """
    identities = identities_of(store, candidate, reference)
    reading = on_device(f"{plan.request.mode} {plan.digest}", device)

    def require_unchanged() -> None:
        candidate.require_unchanged()
        reference.require_unchanged()

    def key(statistic: str) -> tuple[str, str, str, str]:
        return (*identities, statistic, VERSIONS[statistic])

    with store.exclusive((*identities, "pass", reading)) if store is not None else nullcontext():
        tensors: Ledger[PartlyRead] = Ledger(
            store,
            key("estimates"),
            _tensors_by_layer(candidate, reference, plan),
            _as_json,
            _from_json,
            reading,
            require_unchanged,
        )
        _measure_tensors(candidate, reference, plan, device, tensors)
        identical = _published_equal(candidate, reference, plan, tensors)
        if not with_neurons:
            return PartMeasurements(_ordered(tensors), None, identical)
        mlps: dict[Item, MlpPair] = {
            (mlp.module, mlp.theirs["up"].name): mlp for mlp in mlp_pairs(candidate, reference) if mlp.fits
        }
        read = {
            item: mlp
            for item, mlp in mlps.items()
            if all(plan.candidate.is_whole(entry.stored_name) for entry in mlp.ours.values())
            and all(plan.reference.is_whole(entry.stored_name) for entry in mlp.theirs.values())
        }
        layers: dict[str, list[Item]] = defaultdict(list)
        for item, mlp in read.items():
            layers[layer_label(mlp.ours["up"])].append(item)
        neurons: Ledger[NeuronGroup] = Ledger(
            store,
            key("neurons of the planned part"),
            layers,
            tests_as_json,
            lambda item, stored: group_from_json(read[item], stored),
            reading,
            require_unchanged,
        )
        missing = neurons.missing
        wanted = [mlp for item, mlp in read.items() if item in missing]
        for mlp, ours, theirs in read_matrices(candidate, reference, wanted, device):
            neurons.add((mlp.module, mlp.theirs["up"].name), neuron_group(mlp, ours, theirs))
        return PartMeasurements(_ordered(tensors), tuple(neurons.values[item] for item in read), identical)


def _tensors_by_layer(candidate: Checkpoint, reference: Checkpoint, plan: ReadPlan) -> Mapping[str, list[Item]]:
    """The pairs that are compared, by layer, in the order of the candidate's names."""
    names = {entry.stored_name: name for name, entry in reference.tensors.items()}
    layers: dict[str, list[Item]] = defaultdict(list)
    for name, entry in candidate.tensors.items():
        if (compared := plan.compared.get(entry.stored_name)) is not None:
            layers[layer_label(entry)].append((name, names[compared.reference]))
    return layers


def _measure_tensors(
    candidate: Checkpoint, reference: Checkpoint, plan: ReadPlan, device: str, ledger: Ledger[PartlyRead]
) -> None:
    """Read the missing layers, one after the other, so that a killed run loses one at most."""
    from checks.statistics.elementwise import concatenate

    layers: dict[str, list[Item]] = defaultdict(list)
    for item in sorted(ledger.missing):
        layers[layer_label(candidate.tensors[item[0]])].append(item)
    names = [(name, other) for items in _tensors_by_layer(candidate, reference, plan).values() for name, other in items]
    telling = telling_pairs(candidate, names)
    for items in layers.values():
        stored = {item: candidate.tensors[item[0]].stored_name for item in items}
        elements = PairedElements({pair: slice_pairs(plan, [stored[pair]]) for pair in telling & stored.keys()})
        results = _read(candidate, reference, plan, items, device, elements)
        found = estimates(plan, results.values(), list(stored.values()))
        for item, name in stored.items():
            pieces = [results[piece] for piece, _ in slice_pairs(plan, [name])]
            reason = _ordinary(candidate, reference, item, plan.compared[name].read, pieces[0])
            sums = concatenate(piece.sums for piece in pieces if piece.sums is not None)
            robust = elements.robust_cosine((item[0], item[1])) if reason is None else None
            ledger.add(item, PartlyRead(found[name], sums, reason, robust))


def _read(
    candidate: Checkpoint,
    reference: Checkpoint,
    plan: ReadPlan,
    items: Collection[Item],
    device: str,
    elements: PairedElements,
) -> dict[str | None, TensorResult]:
    """The results of the pieces of these tensors, by the candidate's names of the pieces."""
    from checks.statistics.ordinary import head_elements
    from checks.streaming.stream import stream_pair

    pairs = [(candidate.tensors[name].stored_name, reference.tensors[other].stored_name) for name, other in items]
    reads = [{pair[side]: plan.compared[pair[0]].read for pair in pairs} for side in (0, 1)]
    first = {_first_piece(name, read) for side in reads for name, read in side.items()}
    ours, theirs = sliced(candidate.index, reads[0]), sliced(reference.index, reads[1])
    results = stream_pair(
        ours,
        theirs,
        (elements.source(0, ours, candidate.source), elements.source(1, theirs, reference.source)),
        slice_pairs(plan, [name for name, _ in pairs]),
        hashing=False,
        head=lambda piece: head_elements(piece.shape) if piece.name in first else 0,
        device=device,
    )
    return {result.candidate: result for result in results}


def _first_piece(name: str, read: TensorRead) -> str:
    return name if read.whole else slice_name(name, *read.ranges()[0])


def _ordinary(
    candidate: Checkpoint, reference: Checkpoint, names: Item, read: TensorRead, first: TensorResult
) -> str | None:
    """Why could any model have both tensors? Of one that is read in part its beginning has to tell."""
    from checks.statistics.ordinary import may_be_ordinary, ordinary_reason

    entries = candidate.tensors[names[0]], reference.tensors[names[1]]
    if first.heads is None or not _begins(read):
        return None
    seems_equal = first.sums is not None and first.sums.equal == first.sums.n
    # A block of wide rows is too short a beginning. What its role makes a weight is then compared: a copy may not hide.
    if_unseen = seems_equal and (read.whole or not any(_is_weight(entry) for entry in entries))
    for head, entry in zip(first.heads, entries, strict=True):
        is_less_than_a_row = 0 < head.numel() < min(entry.elements, entry.shape[-1] if entry.shape else 1)
        shape = tuple(head.shape) if is_less_than_a_row else entry.shape
        if not (may_be_ordinary(head, shape, if_unseen=if_unseen) or (is_less_than_a_row and if_unseen)):
            return None
    if not read.whole:
        return "begins as a tensor does that any model could have; the rest was not read"
    sides = zip((candidate, reference), entries, strict=True)
    reasons = [ordinary_reason(side.read(entry.name)) for side, entry in sides]
    return reasons[0] if all(reasons) else None


def _published_equal(
    candidate: Checkpoint, reference: Checkpoint, plan: ReadPlan, tensors: Ledger[PartlyRead]
) -> tuple[tuple[str, str], ...]:
    """Tensors in shards of equal published digest that no other model has, as far as what was read of them tells.

    Counted are weights by role whose beginning was looked at, and of which nothing that was read differs.
    """
    published = equal_shards(candidate.index, reference.index)
    found = []
    for (name, other), one in _ordered(tensors).items():
        entry = candidate.tensors[name]
        is_published = entry.stored_name in published and reference.tensors[other].stored_name == entry.stored_name
        is_seen = one.sums.n > 0 and one.sums.equal == one.sums.n and _begins(plan.compared[entry.stored_name].read)
        if is_published and is_seen and one.ordinary is None and _is_weight(entry):
            found.append((name, other))
    return tuple(found)


def _begins(read: TensorRead) -> bool:
    return read.whole or read.ranges()[0][0] == 0


def _is_weight(entry: TensorEntry) -> bool:
    """Is it a matrix of weights by its role? Tables of positions, masks and whatever has no role may be none."""
    return entry.role.category in _WEIGHTS or getattr(entry.role, "part", None) == "embedding"


def _ordered(ledger: Ledger[PartlyRead]) -> dict[tuple[str, str], PartlyRead]:
    return {(item[0], item[1]): ledger.values[item] for item in sorted(ledger.values)}


def _as_json(one: PartlyRead) -> dict[str, Any]:
    return {
        "estimate": asdict(one.estimate),
        "sums": one.sums.as_json(),
        "ordinary": one.ordinary,
        "robust": robust_cosines.as_json(one.robust),
    }


def _from_json(_: Item, stored: Any) -> PartlyRead:
    from checks.statistics.elementwise import ElementwiseSums

    reason = stored["ordinary"]
    return PartlyRead(
        CosineEstimate(**stored["estimate"]),
        ElementwiseSums.from_json(stored["sums"]),
        None if reason is None else str(reason),
        robust_cosines.from_json(stored["robust"]),
    )
