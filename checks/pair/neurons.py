"""The hidden units of both models' MLPs, lined up for the exact permutation test."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from checks.checkpoint.checkpoint import Checkpoint
from checks.checkpoint.errors import CheckpointUnavailable
from checks.pair.matching import Matrices, MlpPair, mlp_pairs

if TYPE_CHECKING:
    from torch import Tensor

    from checks.statistics.units import CombinedUnitTest, UnitTest, UnitTests


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
    """The unit permutation test (T1a) of each MLP that both sides have with equal shapes, see `mlp_pairs`.

    Reads the MLPs, one at a time. Raises CheckpointUnavailable for an MLP whose own matrices do not fit each other.
    """
    mlps = mlp_pairs(candidate, reference)
    require_fit(candidate, mlps)
    return [neuron_group(*one) for one in read_matrices(candidate, reference, mlps, device)]


def require_fit(candidate: Checkpoint, mlps: Iterable[MlpPair]) -> None:
    """Raise CheckpointUnavailable for an MLP whose matrices disagree about its hidden units."""
    for mlp in mlps:
        if not mlp.fits:
            raise CheckpointUnavailable(
                f"{candidate.where}: the matrices of {mlp.module!r} disagree about their hidden units "
                f"({', '.join(f'{kind} {list(entry.shape)}' for kind, entry in sorted(mlp.ours.items()))}); "
                "the checkpoint does not fit its own names"
            )


def read_matrices(
    candidate: Checkpoint, reference: Checkpoint, mlps: Iterable[MlpPair], device: str
) -> Iterator[tuple[MlpPair, Mapping[str, Tensor], Mapping[str, Tensor]]]:
    """The matrices of MLPs by kind, on the device, one MLP after the other. Raises CheckpointUnavailable."""
    from checks.streaming.whole_tensors import layer_blocks

    def read(checkpoint: Checkpoint, matrices: Matrices) -> Mapping[str, Tensor]:
        names = [entry.stored_name for entry in matrices.values()]
        (block,) = layer_blocks(checkpoint.index, checkpoint.source, [names], device)
        return {kind: block[entry.stored_name] for kind, entry in matrices.items()}

    for mlp in mlps:
        yield mlp, read(candidate, mlp.ours), read(reference, mlp.theirs)


def neuron_group(mlp: MlpPair, ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> NeuronGroup:
    """The tests of one MLP, whose matrices are given by kind (gate, up, down)."""
    return _group(mlp, *tests_of_matrices(ours, theirs))


def tests_of_matrices(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> tuple[UnitTest, UnitTest | None]:
    """The test of all views of an MLP, and that of the gate alone (None without one), for matrices by kind."""
    from checks.statistics.units import UnitTest, unit_permutation_test

    # Down comes before gate, so that the gate's views are read with the others and tested again without them.
    kinds = sorted(ours)
    views_a, views_b = ([_units_first(side[kind], kind) for kind in kinds] for side in (ours, theirs))
    if all(bool(view.isfinite().all()) for view in (*views_a, *views_b)):
        test = unit_permutation_test(views_a, views_b)
        at = kinds.index("gate") if "gate" in kinds else None
        gate = None if at is None else unit_permutation_test([views_a[at]], [views_b[at]])
    else:
        units = ours["up"].shape[0]
        test, gate = UnitTest(None, None, None, units, "its matrices hold non-finite values"), None
    return test, gate


def joint_tests(groups: Sequence[NeuronGroup]) -> tuple[CombinedUnitTest, ...]:
    """All views of all MLPs as one test, and all gates as another; those of them that could be made.

    Routed experts of a layer may stem from one MLP and count as one observation under the worst correlation. Valid for
    any pair: exact for dense MLPs, conservative for experts, each of which is tested alone as well (`unit_tests`).
    """
    from checks.statistics.units import combine

    joint = (
        combine(_observations((group, group.test) for group in groups)),
        combine(_observations((group, group.gate) for group in groups if group.gate)),
    )
    return tuple(one for one in joint if one is not None)


def unit_tests(groups: Sequence[NeuronGroup], elements: int) -> UnitTests | None:
    """The tests of a pair's MLPs together, `elements` being those of all the candidate's MLPs; None without a test."""
    from checks.statistics.units import UnitTests

    joint = joint_tests(groups)
    if not joint:
        return None
    single = [
        (f"{group.module} ({views})", test)
        for group in groups
        for views, test in (("all views", group.test), ("gate", group.gate))
        if test is not None and test.z is not None
    ]
    tested = sum(group.elements for group in groups if group.test.z is not None)
    return UnitTests(joint, tuple(single), tested / elements if elements else 0.0, elements=elements)


def tests_as_json(group: NeuronGroup) -> dict[str, Any]:
    """The tests of an MLP for a file: floats in hexadecimal, of which no bit is lost."""

    def stored(test: UnitTest | None) -> dict[str, Any] | None:
        if test is None:
            return None
        return {name: value.hex() if isinstance(value, float) else value for name, value in vars(test).items()}

    return {"test": stored(group.test), "gate": stored(group.gate)}


def group_from_json(mlp: MlpPair, stored: Mapping[str, Any]) -> NeuronGroup:
    """The tests that `tests_as_json` wrote of this MLP. Raises ValueError, KeyError or TypeError for anything else."""
    from checks.statistics.units import UnitTest

    def read(one: Mapping[str, Any]) -> UnitTest:
        numbers = (one[name] for name in ("z", "effect", "scale"))
        z, effect, scale = (None if number is None else float.fromhex(number) for number in numbers)
        return UnitTest(z, effect, scale, int(one["units"]), one["reason"])

    return _group(mlp, read(stored["test"]), None if stored["gate"] is None else read(stored["gate"]))


def _observations(tests: Iterable[tuple[NeuronGroup, UnitTest]]) -> list[UnitTest]:
    """The tests of dense and shared MLPs as they are, and one for all routed experts of each layer."""
    from checks.statistics.units import as_one_observation

    alone: list[UnitTest] = []
    layers: dict[int, list[UnitTest]] = {}
    for group, test in tests:
        (alone if group.expert is None else layers.setdefault(group.layer, [])).append(test)
    together = (as_one_observation(experts) for experts in layers.values())
    return alone + [one for one in together if one is not None]


def _group(mlp: MlpPair, test: UnitTest, gate: UnitTest | None) -> NeuronGroup:
    role = mlp.ours["up"].role
    return NeuronGroup(mlp.module, role.layer or 0, role.category, role.expert, mlp.elements, test, gate)


def _units_first(matrix: Tensor, kind: str) -> Tensor:
    """An MLP matrix with its hidden units as rows."""
    return matrix.T if kind == "down" else matrix
