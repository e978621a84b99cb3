"""The expansion of a claim: ids, order, selection, the size of the calibrated family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from checks.claim.cases import calibrated_cases, expand
from checks.claim.discovery import check_names, discovered_checks
from checks.claim.load import load_claim
from checks.evidence.thresholds import threshold, thresholds

Write = Callable[..., Path]


def test_every_check_has_a_threshold_and_every_threshold_a_check() -> None:
    assert set(check_names()) == set(thresholds())


def test_every_check_asks_a_question_and_states_null_statistic_source_and_blindness() -> None:
    for check in discovered_checks().values():
        text = check.function.__doc__ or ""
        assert "?" in text.splitlines()[0], check.id
        for part in ("Null hypothesis:", "Statistic:", "Documented:"):
            assert part in text, f"{check.id} lacks {part}"


def test_ids_name_component_reference_and_layer(write_claim: Write) -> None:
    claim = load_claim(
        write_claim(
            model="hyperclovax_seed_think_32b",
            components={
                "text": {"prefix": "model.language_model.", "references": ["llama_3_1_70b"]},
                "vision": {"prefix": "model.vision_model.", "references": ["qwen2_5_vl_32b"]},
                "projector": {"prefix": "model.mm_projector.", "references": ["qwen2_5_vl_32b"]},
            },
        )
    )
    ids = [case.id for case in expand(claim)]
    assert "similarity.layer[vision-qwen2_5_vl_32b-12]" in ids
    assert "similarity.layer[text-llama_3_1_70b-71]" in ids
    assert "architecture.panel[projector]" in ids
    assert len([one for one in ids if one.startswith("similarity.layer[vision")]) == 32
    assert len([one for one in ids if one.startswith("similarity.layer[text")]) == 72
    assert not [one for one in ids if one.startswith("similarity.layer[projector")]
    assert len(ids) == len(set(ids))


def test_ids_of_an_undivided_candidate_are_short(write_claim: Write) -> None:
    claim = load_claim(write_claim(model="solar_open_100b", references=["glm_4_5_air"]))
    ids = {case.id for case in expand(claim)}
    assert {"similarity.layer[glm_4_5_air-12]", "architecture.panel", "similarity.mean[glm_4_5_air]"} <= ids


def test_only_and_without_take_families_and_checks(write_claim: Write) -> None:
    content = {"model": "solar_open_100b", "references": ["glm_4_5_air"]}
    only = load_claim(write_claim(**content, checks={"only": ["independence", "similarity.mean"]}))
    checks = {case.check for case in expand(only)}
    assert {"independence.units", "independence.anchored", "similarity.mean"} <= checks
    assert {check.partition(".")[0] for check in checks - {"similarity.mean"}} == {"independence"}
    without = load_claim(write_claim(**content, checks={"without": ["architecture", "similarity.layer"]}))
    checks = {case.check for case in expand(without)}
    assert "similarity.mean" in checks
    assert "similarity.layer" not in checks
    assert not any(check.startswith("architecture.") for check in checks)


def test_the_calibrated_family_is_the_whole_claim(write_claim: Write) -> None:
    claim = load_claim(write_claim(model="solar_open_100b", references=["glm_4_5_air", "mixtral_8x7b", "deepseek_v2"]))
    of_pairs = {"units", "channels", "tensors", "neurons", "anchored"}
    calibrated = {case.check for case in expand(claim) if threshold(case.check).calibrated}
    assert calibrated == {f"independence.{name}" for name in of_pairs} | {
        "embedding.rows",
        "structure.layers",
        "structure.experts",
    }
    # Six checks of each of three pairs, two of the candidate alone.
    assert calibrated_cases(claim) == 3 * 6 + 2


def test_each_case_knows_its_line(write_claim: Write) -> None:
    path = write_claim(
        "claim: x\nstatement: y\nmodel: axk1\nreferences:\n  - deepseek_v2\n  - solar_open_100b\nnearest: 1\n"
    )
    lines = {case.reference: case.line for case in expand(load_claim(path)) if case.check == "identity.sha256"}
    assert lines == {"deepseek_v2": 5, "solar_open_100b": 6, "kimi_k2": 7}
