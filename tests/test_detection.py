"""The checks of weights on small trained models of known ancestry: what finds whom, and who stays innocent.

The thresholds were set on other models; nothing is tuned on these.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from checks.catalog.architecture import from_config
from checks.checkpoint.model import Model
from checks.claim.discovery import discovered_checks
from checks.claim.initial import InitialWeights
from checks.claim.model import ModelSource
from checks.claim.training import Training
from checks.evidence.judge import ContradictingEvidence, Judge, JudgeContext
from checks.evidence.record import CONTRADICTS, INCONCLUSIVE, NOT_APPLICABLE, SUPPORTS, Evidence
from checks.evidence.thresholds import threshold
from checks.pair.candidate import Candidate
from checks.pair.pair import Pair

FAMILIES = ("identity", "embedding", "independence")
DECISIVE = [
    check
    for check in discovered_checks()
    if check.partition(".")[0] in FAMILIES and threshold(check).strength == "decisive"
]
# Cases of a claim with a panel of some references, among which the level is divided.
CASES = 20

Findings = Callable[[str], dict[str, Evidence]]


def source(directory: Path) -> ModelSource:
    architectures = from_config(json.loads((directory / "config.json").read_text()))
    return ModelSource(name=directory.name, path=str(directory), architectures=architectures)


def opened(directory: Path) -> Model:
    return Model(source(directory), None, ("",))


def run(check: str, subject: Pair | Candidate) -> Evidence:
    judge = Judge(check, JudgeContext(check, "test", "claim.yaml:1", "reference", False, CASES))
    found = discovered_checks()[check]
    with contextlib.suppress(ContradictingEvidence, pytest.skip.Exception):
        found.function(**{"pair" if found.takes_pair else "candidate": subject}, judge=judge)
    assert judge.evidence is not None
    return judge.evidence


@pytest.fixture(scope="module")
def against_llama(small_zoo: Path) -> Findings:
    """What every decisive check says of a model beside its possible parent; each pair is measured once."""
    known: dict[str, dict[str, Evidence]] = {}

    def find(name: str) -> dict[str, Evidence]:
        if name not in known:
            pair = Pair(opened(small_zoo / name), opened(small_zoo / "llama"))
            known[name] = {check: run(check, pair) for check in DECISIVE}
        return known[name]

    return find


UNITS, CHANNELS, TENSORS = "independence.units", "independence.channels", "independence.tensors"
NEURONS, ANCHORED = "independence.neurons", "independence.anchored"
SHA256, MSE, SKETCH, ROWS = "identity.sha256", "identity.mse", "identity.sketch", "embedding.rows"

# What must find each, and what cannot: the limits that the checks state.
FOUND_BY: dict[str, tuple[set[str], set[str]]] = {
    "llama_fine_tuned": ({UNITS, CHANNELS, TENSORS, NEURONS, ANCHORED, ROWS}, {SHA256}),
    "llama_int4": ({UNITS, CHANNELS, TENSORS, NEURONS, ANCHORED, ROWS, MSE, SKETCH}, set()),
    "llama_neurons_permuted": ({CHANNELS, NEURONS, ANCHORED, ROWS, SHA256}, {UNITS}),
    "llama_rotated_tuned": ({NEURONS, ANCHORED}, {CHANNELS, TENSORS, ROWS, SHA256, MSE, SKETCH}),
    "llama_new_tokenizer_rotated_permuted": (
        {ANCHORED},
        {UNITS, CHANNELS, TENSORS, NEURONS, ROWS, SHA256, MSE, SKETCH},
    ),
    "llama_up_scaled": ({UNITS, CHANNELS, TENSORS, NEURONS, ANCHORED, ROWS}, {SHA256}),
    "llama_upcycled": ({UNITS, CHANNELS, TENSORS, NEURONS, ANCHORED, ROWS}, {SHA256}),
}


@pytest.mark.parametrize("name", FOUND_BY)
def test_a_derived_model_is_found_by_the_checks_that_can(name: str, against_llama: Findings) -> None:
    found = {check for check, evidence in against_llama(name).items() if evidence.outcome == CONTRADICTS}
    finders, blind = FOUND_BY[name]
    assert finders <= found
    assert not found & blind


@pytest.mark.parametrize("name", ["llama_other_data", "llama_shuffled"])
def test_an_innocent_model_is_accused_by_no_decisive_check(name: str, against_llama: Findings) -> None:
    findings = against_llama(name)
    assert [check for check, evidence in findings.items() if evidence.outcome == CONTRADICTS] == []
    # What SUPPORTED rests on passes, so that silence is not want of power.
    assert findings[UNITS].outcome == SUPPORTS
    assert findings[ANCHORED].outcome == SUPPORTS


def test_a_shared_start_trips_checks_that_name_it(against_llama: Findings) -> None:
    found = {check for check, evidence in against_llama("llama_twin").items() if evidence.outcome == CONTRADICTS}
    assert {UNITS, CHANNELS, ROWS} <= found
    assert all(threshold(check).shared_seed_trips for check in found)


@pytest.fixture(scope="module")
def seed(small_zoo: Path) -> int:
    """The seed of llama's initial weights."""
    return int(json.loads((small_zoo / "llama" / "zoo.json").read_text())["initial_seed"])


def origin_of(small_zoo: Path, name: str, initial: InitialWeights) -> Evidence:
    pair = Pair(opened(small_zoo / name), opened(small_zoo / "llama"), initial=initial)
    return run("initialization.origin", pair)


def test_a_twin_is_measured_by_generator_and_seed_and_nothing_less(small_zoo: Path, seed: int) -> None:
    """A twin of 200 steps has learned too little of its own to be cleared; the zoo's twin is (benchmarks/results)."""
    generated = InitialWeights(generator="torch", seed=seed)
    evidence = origin_of(small_zoo, "llama_twin", generated)
    assert evidence.outcome == INCONCLUSIVE
    assert 0.2 < float(evidence.value or 0) < 0.3
    published = InitialWeights(checkpoint=source(small_zoo / "llama_initial"))
    assert origin_of(small_zoo, "llama_twin", published).outcome == INCONCLUSIVE
    other_seed = InitialWeights(generator="torch", seed=seed + 1)
    assert origin_of(small_zoo, "llama_twin", other_seed).outcome == INCONCLUSIVE


def test_a_derived_model_is_cleared_neither_by_the_seed_of_its_parent_nor_by_a_forgery(
    small_zoo: Path, seed: int
) -> None:
    generated = InitialWeights(generator="torch", seed=seed)
    evidence = origin_of(small_zoo, "llama_fine_tuned", generated)
    assert evidence.outcome == INCONCLUSIVE
    assert float(evidence.value or 0) > 0.5
    forged = InitialWeights(checkpoint=source(small_zoo / "forged_initial"))
    assert origin_of(small_zoo, "llama_fine_tuned", forged).outcome == INCONCLUSIVE


@pytest.mark.parametrize(
    ("name", "layers", "experts"),
    [
        ("llama", SUPPORTS, NOT_APPLICABLE),
        ("llama_up_scaled", INCONCLUSIVE, NOT_APPLICABLE),
        ("llama_upcycled", SUPPORTS, INCONCLUSIVE),
    ],
)
def test_copies_inside_a_model_are_seen_without_a_reference(
    name: str, layers: str, experts: str, small_zoo: Path
) -> None:
    candidate = Candidate(source(small_zoo / name), None, ("",), Training(), frozenset())
    assert run("structure.layers", candidate).outcome == layers
    assert run("structure.experts", candidate).outcome == experts
