"""Compute checks on the statements of real models and on impossible ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from checks.catalog import entry as catalog
from checks.claim.model import ModelSource
from checks.claim.training import Training
from checks.evidence.record import CONTRADICTS, INCONCLUSIVE, NOT_APPLICABLE, SUPPORTS, Evidence
from checks.pair.candidate import Candidate

Judged = Callable[..., Evidence]

# 10B parameters, 1T tokens, 1,000 H100 for 10 days: 6e22 operations in 8.5e23, 7 %.
STATED = Training(
    total=1e10,
    active=1e10,
    tokens=1e12,
    accelerator="H100",
    accelerator_count=1000,
    days=10,
    precision="bf16",
)


def candidate(training: Training | None = None, key: str | None = None, component: str | None = None) -> Candidate:
    architectures = catalog.load(key).components if key else {}
    source = ModelSource(name=key or "model", catalog_key=key, architectures=architectures)
    made = Candidate(source, component, ("",), Training(), frozenset())
    made.training = training or Training()
    return made


def largest(evidence: Evidence) -> dict[str, Any]:
    readings: list[dict[str, Any]] = evidence.details["readings"]
    return max(readings, key=lambda one: max(one["utilisation"].values()))


def test_a_stated_peak_serves_where_the_table_knows_none(judged: Judged) -> None:
    unknown = replace(STATED, accelerator="our own chip", precision="bf16", peak=1e15)
    evidence = judged("compute.flops", candidate(unknown))
    assert evidence.value == pytest.approx(6e22 / (1000 * 10 * 86400 * 1e15))
    assert evidence.details["accelerator"]["source"] == "stated by the claim"
    assert evidence.details["accelerator"]["unverified"] is True
    known = judged("compute.flops", candidate(replace(STATED, peak=1.0)))
    assert known.value == judged("compute.flops", candidate(STATED)).value
    assert judged("compute.flops", candidate(replace(unknown, peak=1e12))).outcome == CONTRADICTS
    assert judged("compute.flops", candidate(replace(unknown, peak=None))).outcome == NOT_APPLICABLE


def test_deepseek_v3_is_plausible(judged: Judged) -> None:
    evidence = judged("compute.flops", candidate(key="deepseek_v3"))
    assert evidence.outcome == SUPPORTS
    assert "not proof" in evidence.reason
    assert evidence.details["decided_by"] == "fp8"
    assert evidence.details["accelerator"]["unverified"] is True
    # 61 layers of 128 heads, 192 and 128 wide, over a mean context of 2048.
    attention = 6 * 14.8e12 * 128 * (192 + 128) * 61 * 2048
    assert largest(evidence)["attention_flops"] == pytest.approx(attention)
    assert evidence.value == pytest.approx((3.2856e24 + attention) / (2.664e6 * 3600 * 1978.9e12))
    assert 0.19 < (evidence.value or 0) < 0.20
    assert "plausible" in (evidence.band or "")
    assert "(2,664,000 accelerator hours)" in evidence.reason
    assert "(2,788,000 accelerator hours)" in evidence.reason
    assert "attention not counted" not in evidence.reason


def test_deepseek_v3_in_bf16_as_its_report_counts(judged: Judged) -> None:
    evidence = judged("compute.flops", candidate(Training(precision="bf16"), key="deepseek_v3"))
    hours = {row["accelerator_hours"]["value"]: row for row in evidence.details["readings"]}
    for time, share in ((2.788e6, 0.331), (2.664e6, 0.346)):
        counted = hours[time]["parameter_flops"] / (hours[time]["parameter_flops"] + hours[time]["attention_flops"])
        assert hours[time]["utilisation"]["bf16"] * counted == pytest.approx(share, abs=0.001)


def test_solar_open(judged: Judged) -> None:
    """19.7T tokens, 12B active, 480 B200; the 66 days follow from a throughput, which the record says."""
    stated = Training(active=12e9, tokens=19.7e12, accelerator="B200", accelerator_count=480, precision="bf16")
    evidence = judged("compute.flops", candidate(stated, key="solar_open_100b"))
    row = largest(evidence)
    assert row["parameter_flops"] == pytest.approx(1.4184e24)
    assert row["utilisation"]["bf16"] == pytest.approx(1.4184e24 / (19.7e12 / 7200 * 2.25e15))
    assert row["utilisation"]["bf16"] == pytest.approx(0.230, abs=0.001)
    assert row["utilisation"]["fp8"] == pytest.approx(0.115, abs=0.001)
    assert evidence.outcome == SUPPORTS
    assert "not stated" in evidence.details["catalogued"]["tokens_per_second_per_accelerator"][0]["note"]
    assert "attention not counted" in evidence.reason
    tokens = judged("compute.tokens", candidate(stated, key="solar_open_100b"))
    assert tokens.outcome == SUPPORTS
    assert tokens.details["readings"][0]["per_active_parameter"] == pytest.approx(1641.7, abs=0.1)
    assert tokens.details["readings"][0]["per_parameter"] == pytest.approx(192, abs=0.1)


def test_axk1(judged: Judged) -> None:
    evidence = judged("compute.flops", candidate(Training(precision="bf16"), key="axk1"))
    assert evidence.value == pytest.approx(1.98e24 / (1.8432e6 * 3600 * 989.4e12), rel=0.01)
    assert evidence.value == pytest.approx(0.30, abs=0.005)
    assert evidence.outcome == SUPPORTS


def test_vaetki_shows_both_token_counts(judged: Judged) -> None:
    evidence = judged("compute.flops", candidate(key="vaetki"))
    found = {row["tokens"]["value"]: row for row in evidence.details["readings"]}
    assert set(found) == {5.1e12, 9.8e12}
    assert found[5.1e12]["parameter_flops"] == pytest.approx(3.09e23, rel=0.001)
    assert found[9.8e12]["parameter_flops"] == pytest.approx(5.94e23, rel=0.001)
    assert evidence.details["accelerator"]["name"] == "H100 PCIe"
    assert found[9.8e12]["utilisation"]["bf16"] == pytest.approx(0.0745, abs=0.0005)
    assert evidence.value == found[9.8e12]["utilisation"]["fp8"]
    assert "(5.1e+12 tokens) or" in evidence.reason
    assert "(9.8e+12 tokens)" in evidence.reason
    tokens = judged("compute.tokens", candidate(key="vaetki"))
    assert "505 (5.1e+12 tokens) or 970 (9.8e+12 tokens) tokens per active parameter" in tokens.reason


def test_hours_from_a_throughput_belong_to_their_own_tokens(judged: Judged) -> None:
    """Twice the tokens at one rate take twice the hours: the utilisation is that of the rate."""
    evidence = judged("compute.flops", candidate(Training(tokens=39.4e12), key="solar_open_100b"))
    rows = evidence.details["readings"]
    assert [row["tokens"]["value"] for row in rows] == [39.4e12, 19.7e12]
    assert rows[0]["accelerator_hours"]["value"] == pytest.approx(2 * rows[1]["accelerator_hours"]["value"])
    assert rows[0]["utilisation"] == pytest.approx(rows[1]["utilisation"])


@pytest.mark.parametrize(
    ("accelerator", "decided_by"), [("A100", "tf32"), ("V100", "fp32"), ("H100", "tf32"), ("TPU v4", "bf16")]
)
def test_fp32_is_no_reason_to_count_with_faster_precisions(accelerator: str, decided_by: str, judged: Judged) -> None:
    stated = replace(STATED, accelerator=accelerator, precision="fp32")
    assert judged("compute.flops", candidate(stated)).details["decided_by"] == decided_by


@pytest.mark.parametrize(
    ("changes", "outcome", "reading"),
    [
        ({}, SUPPORTS, "plausible"),
        ({"tokens": 9.8e12}, SUPPORTS, "plausible"),
        ({"tokens": 11e12}, INCONCLUSIVE, "implausible"),
        ({"tokens": 15e12}, CONTRADICTS, "impossible"),
        ({"tokens": 15e12, "precision": "fp8"}, SUPPORTS, "plausible"),
        ({"tokens": 15e12, "accelerator": "A100"}, CONTRADICTS, "impossible"),
        ({"days": 0.6}, CONTRADICTS, "impossible"),
    ],
)
def test_bands_of_utilisation(changes: dict[str, Any], outcome: str, reading: str, judged: Judged) -> None:
    evidence = judged("compute.flops", candidate(replace(STATED, **changes)))
    assert evidence.outcome == outcome
    assert (evidence.band or "").startswith(reading)


def test_attention_counts_where_the_sequence_length_is_stated(judged: Judged) -> None:
    without = judged("compute.flops", candidate(Training(precision="bf16"), key="axk1"))
    short = judged("compute.flops", candidate(Training(precision="bf16"), key="deepseek_v3"))
    long = judged("compute.flops", candidate(Training(precision="bf16", sequence_length=65536), key="deepseek_v3"))
    assert largest(without)["attention_flops"] is None
    assert largest(short)["attention_flops"] == pytest.approx(2.21 / 16 * largest(short)["parameter_flops"], rel=0.01)
    assert largest(long)["attention_flops"] == pytest.approx(2.21 * largest(long)["parameter_flops"], rel=0.01)
    assert long.value == pytest.approx(3.21 / (1 + 2.21 / 16) * (short.value or 0), rel=0.01)


def test_sliding_layers_see_their_window(judged: Judged) -> None:
    """VAETKI: five layers of six see 512 tokens, so that attention stays far below full attention's share."""
    evidence = judged("compute.flops", candidate(Training(sequence_length=32768), key="vaetki"))
    row = largest(evidence)
    full = 6 * row["tokens"]["value"] * 24 * (192 + 128) * 48 * 16384
    assert row["attention_flops"] == pytest.approx(full * (8 * 16384 + 40 * 508) / (48 * 16384), rel=0.001)


@pytest.mark.parametrize(
    "changes", [{"tokens": None}, {"accelerator": "my own chip"}, {"days": None}, {"active": None, "total": None}]
)
def test_what_is_not_stated_is_not_applicable(changes: dict[str, Any], judged: Judged) -> None:
    evidence = judged("compute.flops", candidate(replace(STATED, **changes)))
    assert evidence.outcome == NOT_APPLICABLE
    assert evidence.reason.startswith("not stated")


def test_active_parameters_are_counted_when_nobody_states_them(judged: Judged) -> None:
    source = ModelSource(name="m", architectures=catalog.load("mistral_7b").components)
    made = Candidate(source, None, ("",), Training(), frozenset())
    made.training = replace(STATED, active=None, total=None)  # type: ignore[attr-defined,unused-ignore]
    evidence = judged("compute.flops", made)
    assert evidence.details["active_parameters"]["source"] == "counted from the configuration"
    assert evidence.details["active_parameters"]["value"] == pytest.approx(7.24e9, rel=0.01)


@pytest.mark.parametrize(
    ("tokens", "outcome"), [(2e11, INCONCLUSIVE), (2.01e11, SUPPORTS), (2.1e10, INCONCLUSIVE), (1.9e10, CONTRADICTS)]
)
def test_bands_of_tokens(tokens: float, outcome: str, judged: Judged) -> None:
    evidence = judged("compute.tokens", candidate(replace(STATED, tokens=tokens)))
    assert evidence.outcome == outcome
    assert evidence.value == pytest.approx(20e10 / tokens)


def test_components_beside_the_text_decoder_are_not_asked(judged: Judged) -> None:
    for check in ("compute.flops", "compute.tokens"):
        assert judged(check, candidate(STATED, component="vision")).outcome == NOT_APPLICABLE
        assert judged(check, candidate(STATED, component="text")).outcome == SUPPORTS


def test_a_claim_without_figures_and_catalogue_is_not_applicable(judged: Judged) -> None:
    for check in ("compute.flops", "compute.tokens"):
        assert judged(check, candidate()).outcome == NOT_APPLICABLE
