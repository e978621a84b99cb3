"""T1a for MLPs in other places: layers and experts under other numbers, or weights that are stored in another way."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from checks.checkpoint.canonical import CanonicalModel, Mlp, MlpPlace
from checks.pair.mlp_pairs import PlacePair
from checks.pair.mlp_samples import name_of
from checks.pair.neurons import NeuronGroup, joint_tests, tests_of_matrices, unit_tests

if TYPE_CHECKING:
    from torch import Tensor

    from checks.statistics.units import UnitTests

# Layer, category and expert of an MLP that was tested in its own place.
TestedPlace = tuple[int, str, int | None]
CATEGORIES = {"dense": "mlp", "shared": "shared expert", "routed": "routed expert"}


@dataclass(frozen=True)
class MappedUnits:
    """The permutation tests of mapped MLPs, and the elements of all of the candidate's MLPs.

    `reason`: why no MLP could be mapped, else None.
    """

    groups: tuple[NeuronGroup, ...]
    elements: int
    reason: str | None = None


def mapped_units(
    candidate: CanonicalModel,
    reference: CanonicalModel,
    mapped: Sequence[PlacePair],
    tested: Collection[TestedPlace] = (),
) -> MappedUnits:
    """The unit permutation test of each mapped pair of MLPs of equal shape that was not `tested` in its own place.

    `mapped` must not depend on the numbering of the reference's units: given the map, every renumbering of them is then
    as likely as before, and the test is as exact as that of MLPs in place. `pair_mlps` is of that kind. It does depend
    on the candidate's numbering: of its neurons some are taken by number to look for partners (`block_similarity` takes
    those of the side that holds fewer, and of the reference's MLPs more are sampled).
    Each MLP of either side is used once, in the first pair that has it, of a layer the most similar one: experts that
    stem from one MLP are no further observations of it.
    Matrices are taken from the canonical form: fused, stacked and quantised ones as well, norms not folded.
    Reads at most the mapped MLPs, one pair at a time. Raises CheckpointUnavailable.
    """
    elements = sum(place.elements for layer in candidate.layers for place in candidate.mlps(layer))
    groups = []
    used: tuple[set[MlpPlace], set[MlpPlace]] = (set(), set())
    for ours, theirs in mapped:
        if _shape(ours) != _shape(theirs) or ours in used[0] or theirs in used[1]:
            continue
        used[0].add(ours)
        used[1].add(theirs)
        if ours.key == theirs.key and (ours.layer, CATEGORIES[ours.kind], ours.expert) in tested:
            continue
        test, gate = tests_of_matrices(_by_kind(candidate.mlp(ours)), _by_kind(reference.mlp(theirs)))
        module = f"{_shown(ours)} = {_shown(theirs)}"
        category = CATEGORIES[ours.kind]
        groups.append(NeuronGroup(module, ours.layer, category, ours.expert, ours.elements, test, gate))
    return MappedUnits(tuple(groups), elements)


def with_mapped(
    in_place: UnitTests | None, mapped: MappedUnits, groups: Sequence[NeuronGroup] = ()
) -> UnitTests | None:
    """The tests of MLPs in place and of mapped ones as one set; None if none could be made.

    `groups`: those in place. An MLP that was tested both ways covers its elements once.
    """
    if in_place is None:
        return unit_tests(mapped.groups, mapped.elements)
    others = unit_tests(mapped.groups, mapped.elements)
    if others is None:
        return in_place
    elements = in_place.elements or mapped.elements
    covered = {_place(group) for group in groups if group.test.z is not None}
    more = {_place(group): group.elements for group in mapped.groups if group.test.z is not None}
    tested = in_place.coverage * elements + sum(size for place, size in more.items() if place not in covered)
    return replace(
        in_place,
        mapped=joint_tests(mapped.groups),
        single=(*in_place.single, *others.single),
        coverage=min(1.0, tested / elements) if elements else 0.0,
    )


def _place(group: NeuronGroup) -> TestedPlace:
    return group.layer, group.category, group.expert


def _by_kind(mlp: Mlp) -> dict[str, Tensor]:
    matrices = {"up": mlp.up, "down": mlp.down}
    return matrices if mlp.gate is None else {**matrices, "gate": mlp.gate}


def _shape(place: MlpPlace) -> tuple[int, int, bool]:
    """Hidden units, elements and gate: equal where all matrices have equal shapes."""
    return place.units, place.elements, place.has_gate


def _shown(place: MlpPlace) -> str:
    return f"layer {place.layer} ({name_of(place)})"
