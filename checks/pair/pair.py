"""Candidate and reference side by side: what every check of the pair shares."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from checks.checkpoint.canonical import CanonicalModel
from checks.checkpoint.checkpoint import Checkpoint
from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.model import Model
from checks.checkpoint.parts import MLP_PARTS
from checks.checkpoint.roles import Role, TensorRole
from checks.pair.comparison import Comparison, compare, compare_part
from checks.pair.kept import is_kept, measured
from checks.pair.layer_sweep import LayerSweep, Visitor
from checks.pair.matching import mlp_pairs
from checks.pair.neurons import NeuronGroup, neuron_groups, require_fit, unit_tests
from checks.pair.reading import Reading, WholeLayers, plan_of
from checks.pair.shared_tokens import SharedTokens, shared_tokens_of
from checks.streaming.planned_source import NotPlanned
from checks.streaming.read_plan import FULL, ReadPlan, SideRead

if TYPE_CHECKING:
    from checks.claim.initial import InitialWeights
    from checks.pair.ledger import LayerStore
    from checks.statistics.units import UnitTests

Measured = TypeVar("Measured")


class Pair:
    """A candidate and a reference, or one component of both. Statistics are computed once and shared.

    `tests_neurons`: does any check ask for `neurons` or `units`? Then one pass over the weights serves these too.
    `takes_fingerprints`: does any look for tensors under other names? Then the same pass takes what that needs.
    `layer_visitors`: gives those who want something of every layer: what they ask for is there once a layer was read.
    `store`: keeps what was measured, layer by layer. `initial`: what the claim says of the initial weights.
    `reading`: how much is read. What is not planned is not read by any check: whoever asks for it gets NotPlanned.
    """

    def __init__(
        self,
        candidate: Model,
        reference: Model,
        device: Callable[[], str] = lambda: "cpu",
        claimed_prefixes: tuple[str, ...] = ("",),
        *,
        tests_neurons: bool = True,
        takes_fingerprints: bool = False,
        layer_visitors: Callable[[Pair], Sequence[Visitor]] = lambda _: (),
        store: LayerStore | None = None,
        initial: InitialWeights | None = None,
        reading: Reading = Reading(FULL),  # noqa: B008 - frozen
    ) -> None:
        self.candidate = candidate
        self.reference = reference
        self._claimed_prefixes = claimed_prefixes
        self._device = device
        self._tests_neurons = tests_neurons
        self._takes_fingerprints = takes_fingerprints
        self._layer_visitors = layer_visitors
        self._is_sweep_made = False
        self._untaken_sweep: LayerSweep | None = None
        self._store = store
        self.initial = initial
        self._reading = reading
        self._failures: dict[str, tuple[type[CheckpointUnavailable], str]] = {}
        self._measured: dict[Callable[[Pair], Any], Any] = {}

    @property
    def plan(self) -> ReadPlan | None:
        """What is read; None for everything. Raises CheckpointUnavailable, the same way every time."""
        return self._same_failure("plan", lambda: self._plan)

    @property
    def is_sampled(self) -> bool:
        """Are the weights read in part? Raises CheckpointUnavailable."""
        return self.plan is not None

    def read(self) -> dict[str, Any]:
        """What was read, for the record: digests, sizes, and what of the candidate no component of the claim names.

        Of weights that are read in full the one pass gives the digests. Raises CheckpointUnavailable.
        """
        models = self.candidate.checkpoint, self.reference.checkpoint
        if self.plan is None and not all(_unread_digests(one) is not None for one in models):
            self.comparison()
        planned: dict[str, Any] = {"mode": FULL} if self.plan is None else self.plan.as_evidence()
        sides: dict[str, Any] = {
            **planned,
            **{
                side: {
                    "name": model.name,
                    "prefix": model.checkpoint.prefix,
                    "tensors": len(model.checkpoint.tensors),
                    "elements": model.checkpoint.parameters,
                    "roles": model.checkpoint.roles.summary(),
                    **model.checkpoint.provenance,
                    **_digests(model.checkpoint, self.is_sampled),
                    **({} if self.plan is None else {"read": planned[side]}),
                }
                for side, model in (("candidate", self.candidate), ("reference", self.reference))
            },
        }
        sides["candidate"]["outside_components"] = self.candidate.checkpoint.share_outside(self._claimed_prefixes)
        return sides

    def elementwise(self) -> Comparison:
        """Sums, hashes and equal tensors of the pair, from all bytes.

        Raises CheckpointUnavailable, the same way every time: NotPlanned if the weights are read in part.
        """
        if self.plan is not None:
            raise NotPlanned(
                f"{self.candidate.checkpoint.where} and {self.reference.checkpoint.where}: this needs all of both "
                f"models, and --read {self.plan.request.mode} reads a part; read all with --read full"
            )
        return self.comparison()

    def equal_bytes(self) -> Comparison:
        """A comparison whose `identical` tells: by all bytes, or which tensors published digests show to be equal.

        Raises CheckpointUnavailable: NotPlanned if the weights are read in part and no digest shows any.
        """
        return self.comparison() if self.is_sampled and self.comparison().identical else self.elementwise()

    def comparison(self) -> Comparison:
        """Cosines of the pair, estimated where the weights are read in part. See Comparison.is_sampled.

        Raises CheckpointUnavailable, the same way every time.
        """
        return self._same_failure("comparison", lambda: self._comparison)

    @cached_property
    def canonical(self) -> tuple[CanonicalModel, CanonicalModel]:
        """Candidate and reference in canonical form, on the device: of weights that are read in part, the layers and
        experts that are read whole. Raises CheckpointUnavailable.
        """
        ours, theirs = self.candidate.checkpoint, self.reference.checkpoint
        if self.plan is None:
            return CanonicalModel(ours, self._device()), CanonicalModel(theirs, self._device())
        return (
            CanonicalModel(WholeLayers(ours, self.plan.candidate), self._device()),
            CanonicalModel(WholeLayers(theirs, self.plan.reference), self._device()),
        )

    @property
    def device(self) -> str:
        """The torch device of this worker."""
        return self._device()

    def once(self, measure: Callable[[Pair], Measured]) -> Measured:
        """What `measure` finds of this pair: measured when first asked for, then shared by all checks.

        Results that are marked as `kept` come from the store if it has them.
        """
        if measure not in self._measured:
            # From here on nothing is read but what is planned.
            _ = self.plan
            self._sweep_layers()
            self._measured[measure] = measured(self, measure, self._store)
        found: Measured = self._measured[measure]
        return found

    def is_known(self, measure: Callable[[Pair], Any]) -> bool:
        """Was this measured, by this run or by one that shares the store? Raises CheckpointUnavailable."""
        return measure in self._measured or is_kept(self, measure, self._store)

    @cached_property
    def tokens(self) -> SharedTokens:
        """Tokens that both vocabularies have; of weights that are read in part, those whose rows are read.

        Raises CheckpointUnavailable.
        """
        return self._shared_tokens if self.plan is None else self._shared_tokens.as_read(self.plan)

    def neurons(self) -> tuple[NeuronGroup, ...]:
        """The unit permutation tests of every MLP of equal shape that is read whole. Raises CheckpointUnavailable."""
        require_fit(self.candidate.checkpoint, mlp_pairs(self.candidate.checkpoint, self.reference.checkpoint))
        neurons = self.comparison().neurons
        return self._neuron_groups if neurons is None else neurons

    def units(self) -> UnitTests | None:
        """The permutation tests of all MLPs together; None when no MLP of equal shape can be tested.

        Coverage is the share of all the candidate's MLPs, those in fused and stacked tensors too; where layers are read
        that may support, of the MLPs of these layers.
        """
        read = self.plan.candidate if self.plan is not None and self.plan.may_support else None
        tests = unit_tests(self.neurons(), _mlp_weights(self.candidate.checkpoint, read))
        return None if tests is None else replace(tests, coverage=min(1.0, tests.coverage))

    @cached_property
    def _plan(self) -> ReadPlan | None:
        ours, theirs = self.candidate.checkpoint, self.reference.checkpoint
        plan = plan_of(ours, theirs, self._reading.request(ours, theirs), self._token_ids)
        if plan is not None:
            ours.read_only(plan.candidate.reads)
            theirs.read_only(plan.reference.reads)
        return plan

    @cached_property
    def _shared_tokens(self) -> SharedTokens:
        return shared_tokens_of(self.candidate, self.reference)

    def _token_ids(self) -> tuple[Sequence[int], Sequence[int]]:
        """For the plan: without a tokenizer that can be read no rows are; who asks for `tokens` hears why."""
        try:
            return self._shared_tokens.ids
        except CheckpointUnavailable:
            return (), ()

    @cached_property
    def _comparison(self) -> Comparison:
        ours, theirs, plan = self.candidate.checkpoint, self.reference.checkpoint, self.plan
        how: dict[str, Any] = {"with_neurons": self._tests_neurons, "store": self._store}
        if plan is not None:
            return compare_part(ours, theirs, plan, self._device(), **how)
        sweep = self._taken_sweep()
        found = compare(ours, theirs, self._device(), **how, with_fingerprints=self._takes_fingerprints, sweep=sweep)
        if sweep is not None:
            sweep.finish()
        return found

    @cached_property
    def _neuron_groups(self) -> tuple[NeuronGroup, ...]:
        ours, theirs, plan = self.candidate.checkpoint, self.reference.checkpoint, self.plan
        if plan is not None:
            part = compare_part(ours, theirs, plan, self._device(), with_neurons=True, store=self._store)
            return part.neurons or ()
        return tuple(neuron_groups(ours, theirs, self._device()))

    def close(self) -> None:
        """Let go of what was held and measured: the next pair needs the memory."""
        for model in (self.candidate, self.reference):
            model.release()
        self._measured.clear()
        self.__dict__.pop("canonical", None)

    def _sweep_layers(self) -> None:
        """Let all visitors see every layer before the first of them is asked: in the one pass, where there is one."""
        if self._sweep is None:
            return
        if self.plan is None:
            # Whoever needs the comparison hears why there is none.
            with suppress(CheckpointUnavailable):
                self.comparison()
        elif (sweep := self._taken_sweep()) is not None:
            sweep.finish()

    @property
    def _sweep(self) -> LayerSweep | None:
        """The sweep over all layers, until somebody takes it; None if nobody wants any, and while it is made."""
        if not self._is_sweep_made:
            self._is_sweep_made = True
            try:
                visitors = self._layer_visitors(self)
                sides = self.candidate.checkpoint, self.reference.checkpoint
                self._untaken_sweep = LayerSweep(sides, self.canonical, visitors) if visitors else None
            except CheckpointUnavailable:
                pass  # whoever wants the layers hears why there are none
        return self._untaken_sweep

    def _taken_sweep(self) -> LayerSweep | None:
        """The sweep, for the one who makes it: it is made once."""
        sweep, self._untaken_sweep = self._sweep, None
        return sweep

    def _same_failure(self, name: str, get: Callable[[], Measured]) -> Measured:
        """What `get` returns; once it failed, the same failure, without trying again."""
        if name in self._failures:
            kind, text = self._failures[name]
            raise kind(text)
        try:
            return get()
        except CheckpointUnavailable as error:
            # Without its traceback, which holds on to all that the failed attempt had in memory.
            self._failures[name] = type(error), str(error)
            raise


def _mlp_weights(checkpoint: Checkpoint, side: SideRead | None) -> int:
    """Elements of the MLPs' matrices, however they are stored; of a `side` those of layers and experts read whole.

    By the roles of the tensors and by the canonical form: the larger, since either may know less than there is.
    """
    by_role = 0
    for entry in checkpoint.tensors.values():
        if not _holds_mlps(entry.role):
            continue
        if side is None:
            by_role += entry.weights
        elif (read := side.reads.get(entry.stored_name)) is not None:
            by_role += entry.weights if read.whole else sum(stop - start for start, stop in read.runs)
    try:
        model = CanonicalModel(checkpoint if side is None else WholeLayers(checkpoint, side))
        places = [place for layer in model.layers for place in model.mlps(layer)]
    except CheckpointUnavailable:
        return by_role
    is_read = [
        side is None or place.expert is None or place.expert in side.experts.get(place.layer, ()) for place in places
    ]
    return max(by_role, sum(place.elements for place, read in zip(places, is_read, strict=True) if read))


def _holds_mlps(role: Role) -> bool:
    """Does a tensor hold matrices of MLPs: one as it stands, fused ones, or those of all experts?"""
    if role.kind is not None or not isinstance(role, TensorRole):
        return role.kind is not None
    return role.companion_of is None and not MLP_PARTS.isdisjoint((role.part, *role.layout.fused))


def _digests(checkpoint: Checkpoint, is_sampled: bool) -> dict[str, Any]:
    """What tells which weights were read: one digest of all tensors; or those that the hub publishes of the shards, if
    not all tensors were read. Raises CheckpointUnavailable.
    """
    published = _unread_digests(checkpoint)
    if published:
        return {"sha256": None, "shards": published}
    return {"sha256": None if is_sampled else checkpoint.digest()}


def _unread_digests(checkpoint: Checkpoint) -> dict[str, str] | None:
    """Digests that the hub publishes of the shards that were not read in full; None if it lacks one."""
    unread = {entry.stored.shard for name, entry in checkpoint.tensors.items() if name not in checkpoint._sha256}
    published = {name: checkpoint.index.shards[name].published_sha256 for name in sorted(unread)}
    known = {name: digest for name, digest in published.items() if digest}
    return known if len(known) == len(published) else None
