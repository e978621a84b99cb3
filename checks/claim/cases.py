"""Claim → cases: the same list on every worker and on the controller, from the claim alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from checks.claim.behavior import Behavior
from checks.claim.discovery import Check, discovered_checks
from checks.claim.initial import InitialWeights
from checks.claim.model import Claim, Component, ModelSource, Reference
from checks.claim.training import Training
from checks.evidence.thresholds import threshold


@dataclass(frozen=True)
class CandidateParameter:
    """What a check of the candidate alone reads: the value that pytest caches the fixture by."""

    candidate: ModelSource
    component: str | None
    prefixes: tuple[str, ...]
    training: Training
    panel: frozenset[str]
    references: tuple[Reference, ...] = ()
    disclosed: frozenset[str] = frozenset()
    behavior: Behavior | None = None


@dataclass(frozen=True)
class PairParameter:
    """What a check of a pair reads. Equal pairs of different claims are one stream; different ones never are."""

    candidate: ModelSource
    reference: ModelSource
    component: str | None
    candidate_prefixes: tuple[str, ...]
    reference_prefixes: tuple[str, ...]
    claimed_prefixes: tuple[str, ...]  # of all components of the claim: what lies under none of them is not examined
    initial: InitialWeights | None = None


@dataclass(frozen=True)
class Case:
    """One check on one reference (component, layer): one pytest item."""

    check: str
    component: str | None
    reference: str | None = None
    layer: int | None = None
    line: int = 1

    @property
    def parameters(self) -> str:
        """What stands between the brackets of the id; empty for a check of an undivided candidate."""
        parts = [self.component, self.reference, None if self.layer is None else str(self.layer)]
        return "-".join(part for part in parts if part is not None)

    @property
    def id(self) -> str:
        """`similarity.layer[vision-qwen2_5_vl_32b-12]`: what follows `::` in the node id."""
        return f"{self.check}[{self.parameters}]" if self.parameters else self.check


def selected_checks(claim: Claim) -> list[Check]:
    """The checks that this claim runs, after its `only` and `without`."""
    return [check for check in discovered_checks().values() if _is_selected(check.id, claim)]


def _is_selected(check: str, claim: Claim) -> bool:
    family = check.partition(".")[0]
    chosen = not claim.only or check in claim.only or family in claim.only
    return chosen and check not in claim.without and family not in claim.without


def cases_of_check(claim: Claim, check: Check) -> Iterator[Case]:
    """The cases of one check: component, then reference, then layer of the candidate."""
    for component in claim.components:
        if not check.takes_pair:
            yield Case(check.id, component.name, line=component.line)
            continue
        layers = _layers(claim, component) if check.takes_layer else (None,)
        for reference in component.panel:
            for layer in layers:
                yield Case(check.id, component.name, reference.source.name, layer, line=reference.line)


def expand(claim: Claim) -> list[Case]:
    """Every case of a claim, in report order."""
    return [case for check in selected_checks(claim) for case in cases_of_check(claim, check)]


def calibrated_cases(claim: Claim) -> int:
    """How many cases of the claim decide by a p-value: the family of its multiple-testing correction."""
    return sum(1 for case in expand(claim) if threshold(case.check).calibrated)


def pair_parameter(claim: Claim, component: Component, reference: Reference) -> PairParameter:
    """The fixture parameter of a pair."""
    claimed = tuple(prefix for one in claim.components for prefix in one.prefixes)
    return PairParameter(
        claim.model,
        reference.source,
        component.name,
        component.prefixes,
        reference.prefixes,
        claimed,
        claim.initial,
    )


def candidate_parameter(claim: Claim, component: Component) -> CandidateParameter:
    """The fixture parameter of a candidate."""
    return CandidateParameter(
        claim.model,
        component.name,
        component.prefixes,
        claim.training,
        frozenset(reference.source.name for reference in component.panel),
        component.panel,
        component.disclosed,
        claim.behavior,
    )


def _layers(claim: Claim, component: Component) -> range:
    architecture = claim.model.architecture(component.name)
    count = architecture.num_hidden_layers if architecture else None
    return range(count or 0)
