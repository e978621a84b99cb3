"""Outcomes of cases → verdicts and exit statuses, as the contract has them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from checks.claim.cases import expand
from checks.claim.load import load_claim
from checks.claim.model import Claim
from checks.claim.verdict import (
    EXIT_ERRORS,
    EXIT_OPEN,
    EXIT_REFUTED,
    EXIT_SUPPORTED,
    LIMITS,
    CaseResult,
    Verdict,
    decide,
    direction_of_copying,
    overall_exit_status,
)
from checks.evidence.record import (
    CONTRADICTS,
    DISCLOSED,
    ERROR,
    INCONCLUSIVE,
    NOT_APPLICABLE,
    SUPPORTS,
    UNAVAILABLE,
    Evidence,
)

PANEL = ("kimi_k2", "deepseek_v3")
ORIGIN = "initialization.origin"


@pytest.fixture
def claim(write_claim: Callable[..., Path]) -> Claim:
    return load_claim(write_claim(model="axk1", references=list(PANEL)))


@pytest.fixture
def divided(write_claim: Callable[..., Path]) -> Claim:
    return load_claim(
        write_claim(
            model="hyperclovax_seed_think_32b",
            components={
                "text": {"prefix": "model.language_model.", "references": ["llama_3_1_70b"]},
                "vision": {
                    "prefix": "model.vision_model.",
                    "references": ["qwen2_5_vl_32b"],
                    "disclosed": ["qwen2_5_vl_32b"],
                },
            },
        )
    )


def verdict_of(claim: Claim, **outcomes: str | None) -> Verdict:
    """The verdict when every case supports, except those whose id starts with a given text.

    Keys are written with `__` for `.` and `_of_` before the text between the brackets. The claim states no initial
    weights, unless a key says otherwise.
    """
    results = []
    for case in expand(claim):
        outcome: str | None = NOT_APPLICABLE if case.check == ORIGIN else SUPPORTS
        for pattern, wanted in outcomes.items():
            check, _, parameters = pattern.partition("_of_")
            if case.check.startswith(check.replace("__", ".")) and parameters in case.parameters:
                outcome = wanted
        evidence = None if outcome is None else Evidence(case.check, outcome, "because", 0.0, powered=True)
        results.append(CaseResult(case, evidence))
    return decide(claim, results)


def test_all_support_is_supported_with_its_limits(claim: Claim) -> None:
    verdict = verdict_of(claim)
    assert verdict.verdict == "SUPPORTED"
    assert verdict.text == "no evidence of inherited weights from any of the 2 references below"
    assert "proven" not in verdict.text
    assert verdict.exit_status == EXIT_SUPPORTED
    assert verdict.limits == LIMITS
    assert any("ancestors outside the panel are not seen" in limit for limit in verdict.limits)
    # Since independence.anchored passed, which withstands permutation and rotation.


def test_one_decisive_failure_refutes_whatever_else_passed_or_is_missing(claim: Claim) -> None:
    verdict = verdict_of(claim, similarity__mean_of_kimi_k2=CONTRADICTS, identity__sha256=ERROR, independence=None)
    assert verdict.verdict == "REFUTED"
    assert verdict.exit_status == EXIT_REFUTED
    assert "shares weights with kimi_k2" in verdict.text
    assert "similarity.mean" in verdict.text
    assert "deepseek_v3" not in verdict.text


def test_a_test_that_a_shared_seed_trips_says_so(claim: Claim) -> None:
    alone = verdict_of(claim, independence__units_of_kimi_k2=CONTRADICTS)
    assert "inherited or same initial weights: kimi_k2" in alone.text
    with_cosine = verdict_of(claim, independence__units_of_kimi_k2=CONTRADICTS, similarity__mean_of_kimi_k2=CONTRADICTS)
    assert "shares weights with kimi_k2" in with_cosine.text


@pytest.mark.parametrize("check", ["similarity__profile", "architecture__identical"])
def test_supporting_checks_and_suspicions_never_refute_alone(claim: Claim, check: str) -> None:
    verdict = verdict_of(claim, **{f"{check}_of_kimi_k2": CONTRADICTS})
    assert verdict.verdict == "INCONCLUSIVE"
    assert verdict.exit_status == EXIT_OPEN


def test_an_inconclusive_cosine_and_suspicion_yield_to_a_calibrated_test_that_passed(claim: Claim) -> None:
    verdict = verdict_of(claim, similarity=INCONCLUSIVE, architecture=INCONCLUSIVE)
    assert verdict.verdict == "SUPPORTED"


def test_no_support_without_a_powered_decisive_check_for_every_reference(claim: Claim) -> None:
    verdict = verdict_of(claim, similarity__mean_of_kimi_k2=INCONCLUSIVE, independence_of_kimi_k2=NOT_APPLICABLE)
    assert verdict.verdict == "INCONCLUSIVE"
    assert "no decisive check with power passed against kimi_k2" in verdict.text


def test_support_does_not_rest_on_unequal_hashes_or_a_passed_suspicion(claim: Claim) -> None:
    verdict = verdict_of(claim, similarity=NOT_APPLICABLE, independence=NOT_APPLICABLE)
    assert verdict.verdict == "INCONCLUSIVE"


def test_evidence_without_power_does_not_support(claim: Claim) -> None:
    results = [
        CaseResult(case, Evidence(case.check, SUPPORTS, "", 0.0, powered=False))
        for case in expand(claim)
        if case.check != ORIGIN
    ]
    assert decide(claim, results).verdict == "INCONCLUSIVE"


@pytest.mark.parametrize("outcome", [INCONCLUSIVE, NOT_APPLICABLE])
def test_no_support_without_a_check_that_withstands_every_disguise(claim: Claim, outcome: str) -> None:
    verdict = verdict_of(claim, independence__anchored_of_kimi_k2=outcome)
    assert verdict.verdict == "INCONCLUSIVE"
    assert "no check that withstands permutation, rotation and a new vocabulary passed against kimi_k2" in verdict.text
    assert "deepseek_v3" not in verdict.text


# Initial weights that the claim states

EXPLAINED_CHECKS = [
    "similarity__mean",
    "similarity__layer",
    "independence__units",
    "independence__channels",
    "embedding__rows",
]


@pytest.mark.parametrize("check", EXPLAINED_CHECKS)
def test_what_a_start_in_common_explains_refutes_only_without_a_proven_origin(claim: Claim, check: str) -> None:
    found = {f"{check}_of_kimi_k2": CONTRADICTS}
    for origin in (NOT_APPLICABLE, INCONCLUSIVE, UNAVAILABLE, ERROR):
        verdict = verdict_of(claim, **found, initialization__origin_of_kimi_k2=origin)
        assert verdict.verdict == "REFUTED"
        assert "kimi_k2" in verdict.text
    assert verdict_of(claim, **found, initialization__origin_of_kimi_k2=SUPPORTS).verdict == "SUPPORTED"


def test_a_twin_that_trips_every_check_of_weights_is_supported_by_its_origin(claim: Claim) -> None:
    found: dict[str, str | None] = {f"{check}_of_kimi_k2": CONTRADICTS for check in EXPLAINED_CHECKS}
    assert verdict_of(claim, **found).verdict == "REFUTED"
    proven = verdict_of(claim, **found, initialization__origin_of_kimi_k2=SUPPORTS)
    assert proven.verdict == "SUPPORTED"
    assert proven.exit_status == EXIT_SUPPORTED


@pytest.mark.parametrize(
    "check", ["independence__anchored", "independence__neurons", "identity__mse", "identity__sketch"]
)
def test_what_a_twin_passes_neither_refutes_nor_clears_one_that_does_not(claim: Claim, check: str) -> None:
    found = {f"{check}_of_kimi_k2": CONTRADICTS}
    assert verdict_of(claim, **found).verdict == "REFUTED"
    verdict = verdict_of(claim, **found, initialization__origin_of_kimi_k2=SUPPORTS)
    assert verdict.verdict == "INCONCLUSIVE"
    assert f"contradicted by {check.replace('__', '.')}" in verdict.text


def test_an_origin_explains_no_equal_bytes(claim: Claim) -> None:
    verdict = verdict_of(claim, identity__sha256_of_kimi_k2=CONTRADICTS, initialization__origin=SUPPORTS)
    assert verdict.verdict == "REFUTED"
    assert "identity.sha256" in verdict.text


def test_an_origin_explains_nothing_of_another_reference(claim: Claim) -> None:
    verdict = verdict_of(claim, similarity__mean_of_deepseek_v3=CONTRADICTS, initialization__origin_of_kimi_k2=SUPPORTS)
    assert verdict.verdict == "REFUTED"
    assert "shares weights with deepseek_v3" in verdict.text


def test_an_origin_of_one_component_explains_nothing_of_another(divided: Claim) -> None:
    found = {"similarity__mean_of_text": CONTRADICTS}
    assert verdict_of(divided, **found, initialization__origin_of_vision=SUPPORTS).verdict == "REFUTED"
    assert verdict_of(divided, **found, initialization__origin_of_text=SUPPORTS).verdict != "REFUTED"


def test_an_origin_does_not_hide_errors_or_missing_weights(claim: Claim) -> None:
    origin = {"initialization__origin": SUPPORTS}
    assert verdict_of(claim, **origin, independence__units=ERROR).exit_status == EXIT_ERRORS
    assert verdict_of(claim, **origin, independence__units=UNAVAILABLE).verdict == "INCONCLUSIVE"
    assert verdict_of(claim, **origin, independence__units=None).verdict == "PARTIAL"


def test_an_origin_explains_suspicions_that_the_same_weights_confirmed(claim: Claim) -> None:
    for check in ("tokenizer__vocabulary_of_kimi_k2", "architecture__identical_of_kimi_k2"):
        assert verdict_of(claim, **{check: CONTRADICTS}).verdict == "INCONCLUSIVE"
        assert verdict_of(claim, **{check: CONTRADICTS}, initialization__origin=SUPPORTS).verdict == "SUPPORTED"


def test_an_origin_does_not_explain_copies_inside_the_candidate(claim: Claim) -> None:
    verdict = verdict_of(
        claim, structure__layers=INCONCLUSIVE, compute__flops=CONTRADICTS, initialization__origin=SUPPORTS
    )
    assert verdict.verdict == "INCONCLUSIVE"
    assert "contradicted by compute.flops" in verdict.text


def test_unavailable_weights_leave_it_open_and_are_named(claim: Claim) -> None:
    verdict = verdict_of(claim, identity_of_kimi_k2=UNAVAILABLE, similarity_of_kimi_k2=UNAVAILABLE)
    assert verdict.verdict == "INCONCLUSIVE"
    assert "weights could not be had for the comparison with kimi_k2" in verdict.text
    assert verdict.exit_status == EXIT_OPEN


def test_errors_leave_it_open_with_an_exit_status_of_their_own(claim: Claim) -> None:
    verdict = verdict_of(claim, identity__sha256_of_kimi_k2=ERROR)
    assert verdict.verdict == "INCONCLUSIVE"
    assert verdict.exit_status == EXIT_ERRORS
    assert "identity.sha256[kimi_k2]" in verdict.text


def test_a_missing_report_makes_it_partial(claim: Claim) -> None:
    verdict = verdict_of(claim, architecture__panel=None)
    assert verdict.verdict == "PARTIAL"
    assert verdict.exit_status == EXIT_SUPPORTED
    assert "architecture.panel" in verdict.text


@pytest.mark.parametrize("outcome", [INCONCLUSIVE, UNAVAILABLE, CONTRADICTS])
def test_a_partial_run_is_zero_only_when_clean(claim: Claim, outcome: str) -> None:
    verdict = verdict_of(claim, architecture__panel=None, architecture__overlap_of_kimi_k2=outcome)
    assert verdict.verdict == "PARTIAL"
    assert verdict.exit_status == EXIT_OPEN


def test_a_partial_run_without_a_decisive_pass_is_open(claim: Claim) -> None:
    verdict = verdict_of(claim, identity=None, similarity=None, independence=None)
    assert verdict.verdict == "PARTIAL"
    assert verdict.exit_status == EXIT_OPEN


def test_a_partial_run_with_errors_is_an_error(claim: Claim) -> None:
    assert verdict_of(claim, architecture__panel=None, identity=ERROR).exit_status == EXIT_ERRORS


def test_a_disclosed_part_leaves_the_rest_supported(divided: Claim) -> None:
    verdict = verdict_of(divided, similarity__mean_of_vision=DISCLOSED)
    assert verdict.verdict == "SUPPORTED"
    assert verdict.text.startswith("except vision: no evidence of inherited weights from the one reference below")
    assert verdict.exit_status == EXIT_SUPPORTED
    assert {one.component.name: one.verdict for one in verdict.components} == {
        "text": "SUPPORTED",
        "vision": "DISCLOSED",
    }


def test_a_disclosed_text_decoder_makes_the_claim_disclosed(divided: Claim) -> None:
    verdict = verdict_of(divided, similarity__mean_of_text=DISCLOSED)
    assert verdict.verdict == "DISCLOSED"
    assert verdict.exit_status == EXIT_OPEN


def test_a_disclosed_only_component_makes_the_claim_disclosed(claim: Claim) -> None:
    assert verdict_of(claim, similarity__mean_of_kimi_k2=DISCLOSED).verdict == "DISCLOSED"


def test_an_open_part_keeps_a_claim_with_a_disclosed_part_open(divided: Claim) -> None:
    verdict = verdict_of(
        divided,
        similarity__mean_of_vision=DISCLOSED,
        similarity_of_text=INCONCLUSIVE,
        independence_of_text=INCONCLUSIVE,
    )
    assert verdict.verdict == "INCONCLUSIVE"


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ({"supports_below": 0.2}, "INCONCLUSIVE"),
        ({"contradicts_from": 0.95}, "INCONCLUSIVE"),
        ({"coverage_from": 0.1}, "INCONCLUSIVE"),
        ({"supports_below": 0.05}, "SUPPORTED"),
        ({"contradicts_from": 0.7}, "SUPPORTED"),
    ],
)
def test_a_loosened_threshold_cannot_support(
    write_claim: Callable[..., Path], values: dict[str, float], verdict: str
) -> None:
    overrides = {"similarity.mean": {**values, "reason": "to try it"}}
    claim = load_claim(write_claim(model="axk1", references=["kimi_k2"], thresholds=overrides))
    assert verdict_of(claim).verdict == verdict


def test_the_worst_claim_sets_the_exit_status(claim: Claim) -> None:
    supported, refuted = verdict_of(claim), verdict_of(claim, similarity__mean=CONTRADICTS)
    erred, open_ = verdict_of(claim, identity=ERROR), verdict_of(claim, similarity=UNAVAILABLE)
    assert overall_exit_status([supported]) == EXIT_SUPPORTED
    assert overall_exit_status([supported, open_]) == EXIT_OPEN
    assert overall_exit_status([supported, open_, erred]) == EXIT_ERRORS
    assert overall_exit_status([supported, open_, erred, refuted]) == EXIT_REFUTED


@pytest.mark.parametrize(
    ("candidate", "reference", "expected"),
    [
        ("solar_open_100b", "glm_4_5_air", "published earlier (2025-07"),
        ("mixtral_8x7b", "glm_4_5_air", "published later"),
        ("solar_open_100b", "solar_10_7b", "a model of the same developer, published earlier"),
    ],
)
def test_dates_and_developers_say_which_direction_is_possible(
    write_claim: Callable[..., Path], candidate: str, reference: str, expected: str
) -> None:
    claim: Any = load_claim(write_claim(model=candidate, references=[reference]))
    assert expected in direction_of_copying(claim.model, claim.components[0].panel[0].source)


def test_copies_inside_the_candidate_keep_the_claim_open(claim: Claim) -> None:
    found = []
    for one in verdict_of(claim).results:
        if one.case.check == "structure.layers":
            assert one.evidence is not None
            one = replace(one, evidence=replace(one.evidence, outcome=INCONCLUSIVE, keeps_open=True))
        found.append(one)
    verdict = decide(claim, found)
    assert verdict.verdict == "INCONCLUSIVE"
    assert "left open by structure.layers" in verdict.text
