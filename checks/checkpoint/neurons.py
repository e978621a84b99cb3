"""The hidden units of both models' MLPs, lined up for the exact permutation test."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from checks.checkpoint.checkpoint import Checkpoint, TensorEntry
from checks.checkpoint.errors import CheckpointUnavailable

if TYPE_CHECKING:
    from torch import Tensor

    from checks.statistics.units import UnitTest, UnitTests

# The matrices of one MLP, by kind (gate, up, down).
Matrices = dict[str, TensorEntry]


@dataclass(frozen=True)
class NeuronGroup:
    """The permutation tests of the hidden units of one MLP (of one expert).

    `test` uses all views; `gate` the gate's alone, whose sign is not free: negating up and down together leaves the
    function unchanged and would hide a copy from the test of all views.
    """

    module: str
    layer: int
    category: str
    expert: int | None
    elements: int
    test: UnitTest
    gate: UnitTest | None


def neuron_groups(candidate: Checkpoint, reference: Checkpoint, device: str = "cpu") -> list[NeuronGroup]:
    """The unit permutation test (T1a) of each MLP that both sides have with equal shapes.

    MLPs are paired by module name; one whose name the reference lacks by layer, category and expert, if that is
    unambiguous. Raises CheckpointUnavailable for an MLP whose own matrices do not fit each other.
    """
    ours, theirs = _mlps(candidate), _mlps(reference)
    groups = []
    for module, others in _paired(ours, theirs).items():
        matrices = ours[module]
        if matrices.keys() != others.keys() or any(matrices[kind].shape != others[kind].shape for kind in matrices):
            continue
        groups.append(_test(module, candidate, matrices, reference, others, device))
    return groups


def unit_tests(candidate: Checkpoint, groups: Sequence[NeuronGroup]) -> UnitTests | None:
    """The tests of all MLPs of a pair together; None when none of them could be tested."""
    from checks.statistics.units import UnitTests, combine

    joint = [combine(group.test for group in groups), combine(group.gate for group in groups if group.gate)]
    defined = tuple(one for one in joint if one is not None)
    if not defined:
        return None
    single = [
        (f"{group.module} ({views})", test)
        for group in groups
        for views, test in (("all views", group.test), ("gate", group.gate))
        if test is not None and test.z is not None
    ]
    total = sum(entry.weights for entry in candidate.tensors.values() if entry.role.kind is not None)
    tested = sum(group.elements for group in groups if group.test.z is not None)
    return UnitTests(defined, tuple(single), tested / total if total else 0.0)


def _test(
    module: str, candidate: Checkpoint, ours: Matrices, reference: Checkpoint, theirs: Matrices, device: str
) -> NeuronGroup:
    from checks.statistics.units import UnitTest, unit_permutation_test

    units = ours["up"].shape[0]
    if ours["down"].shape[1] != units or ("gate" in ours and ours["gate"].shape[0] != units):
        raise CheckpointUnavailable(
            f"{candidate.directory}: the matrices of {module!r} disagree about their hidden units "
            f"({', '.join(f'{kind} {list(entry.shape)}' for kind, entry in sorted(ours.items()))}); "
            "the checkpoint does not fit its own names"
        )
    # Down comes before gate, so that the gate's views are read with the others and tested again without them.
    kinds = sorted(ours)
    views_a = [_units_first(candidate, ours[kind], kind, device) for kind in kinds]
    views_b = [_units_first(reference, theirs[kind], kind, device) for kind in kinds]
    role = ours["up"].role
    if all(bool(view.isfinite().all()) for view in (*views_a, *views_b)):
        test = unit_permutation_test(views_a, views_b)
        at = kinds.index("gate") if "gate" in kinds else None
        gate = None if at is None else unit_permutation_test([views_a[at]], [views_b[at]])
    else:
        test, gate = UnitTest(None, None, None, units, "its matrices hold non-finite values"), None
    elements = sum(entry.elements for entry in ours.values())
    return NeuronGroup(module, role.layer or 0, role.category, role.expert, elements, test, gate)


def _mlps(checkpoint: Checkpoint) -> dict[str, Matrices]:
    """Every MLP with up and down matrices, by the name of its module."""
    modules: dict[str, Matrices] = defaultdict(dict)
    for entry in checkpoint.tensors.values():
        if entry.role.kind is not None and entry.role.layer is not None and len(entry.shape) == 2 and entry.is_float:
            modules[_module(entry.name)][entry.role.kind] = entry
    return {module: matrices for module, matrices in modules.items() if {"up", "down"} <= matrices.keys()}


def _module(name: str) -> str:
    """`model.layers.0.mlp` of `model.layers.0.mlp.up_proj.weight`."""
    return name.removesuffix(".weight").rpartition(".")[0]


def _paired(ours: dict[str, Matrices], theirs: dict[str, Matrices]) -> dict[str, Matrices]:
    """The reference's MLP for each of the candidate's: by module name, else by an unambiguous layer and expert."""
    by_place: dict[tuple[int | None, str, int | None], list[Matrices]] = defaultdict(list)
    for module, matrices in theirs.items():
        if module not in ours:
            role = matrices["up"].role
            by_place[role.layer, role.category, role.expert].append(matrices)
    paired = {}
    for module, matrices in ours.items():
        role = matrices["up"].role
        places = by_place.get((role.layer, role.category, role.expert), [])
        if module in theirs:
            paired[module] = theirs[module]
        elif len(places) == 1:
            paired[module] = places[0]
    return paired


def _units_first(checkpoint: Checkpoint, entry: TensorEntry, kind: str, device: str) -> Tensor:
    """An MLP matrix with its hidden units as rows."""
    matrix = checkpoint.read(entry.name).to(device)
    return matrix.T if kind == "down" else matrix
