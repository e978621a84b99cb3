"""The claims of this repository: what they show without network and without weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from tests.claim_runs import verdicts

CLAIMS = {
    "solar": "solar_open_100b",
    "hyperclovax": "hyperclovax_seed_think_32b",
    "axk1": "axk1",
    "vaetki": "vaetki",
    "k_exaone": "k_exaone_236b_a23b",
}

Run = tuple[int, dict[str, Any]]
Offline = Callable[[str], Run]


@pytest.fixture(scope="session")
def runs() -> dict[str, Run]:
    """What each claim came to; it is run for the first test that asks."""
    return {}


@pytest.fixture
def offline(
    runs: dict[str, Run], pytester: pytest.Pytester, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> Offline:
    """Runs a claim of the repository with --offline, in a hub cache that is empty: its exit status and report."""
    monkeypatch.setenv("HF_HUB_CACHE", str(pytester.path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(pytester.path / "hub"))

    def run(name: str) -> Run:
        if name not in runs:
            path = repository / "claims" / f"{name}.yaml"
            result = pytester.runpytest(str(path), "--offline", "--report", "out", "-p", "no:cacheprovider")
            runs[name] = result.ret, verdicts(pytester.path / "out")[CLAIMS[name]]
        return runs[name]

    return run


OF_WEIGHTS = {"identity", "similarity", "embedding", "distribution", "independence", "structure"}


@pytest.mark.parametrize("name", CLAIMS)
def test_a_claim_offline_is_inconclusive_and_says_what_is_missing(offline: Offline, name: str) -> None:
    status, claim = offline(name)
    assert status == 10
    assert claim["verdict"] == "INCONCLUSIVE"
    assert set(claim["counts"]) <= {"supports", "inconclusive", "unavailable", "not applicable"}
    assert claim["counts"]["supports"] > 0
    for component in claim["components"].values():
        for reference in component["panel"]:
            assert reference["name"] in claim["text"]
    weights = [case for case in claim["cases"].values() if case["check"].partition(".")[0] in OF_WEIGHTS]
    assert {case["outcome"] for case in weights} == {"unavailable"}


def test_solar_comes_out_as_the_documents_table_it_with_its_corrections(offline: Offline) -> None:
    _, claim = offline("solar")
    found = {
        reference: (
            claim["cases"][f"architecture.identical[{reference}]"]["evidence"]["value"],
            claim["cases"][f"architecture.overlap[{reference}]"]["evidence"]["details"]["seven_keys_equal"],
        )
        for reference in ("mixtral_8x7b", "deepseek_v2", "qwen2_57b_a14b")
    }
    # The documents say 2/7, 1/7 and 1/7 and "0 of 5"; their own tables give these.
    assert found == {"mixtral_8x7b": (2, "3/7"), "deepseek_v2": (1, "0/7"), "qwen2_57b_a14b": (1, "1/7")}


def test_solars_unique_values_are_counted(offline: Offline) -> None:
    _, claim = offline("solar")
    shared = claim["cases"]["architecture.overlap[k_exaone_236b_a23b]"]["evidence"]["details"]["shared_by"]
    sharing, known = map(int, shared["num_hidden_layers"].split(" of "))
    assert sharing >= 6
    assert known >= 30


def test_axk1_is_five_of_five_with_kimi_k2_and_waits_for_its_weights(offline: Offline) -> None:
    _, claim = offline("axk1")
    kimi = claim["cases"]["architecture.identical[kimi_k2]"]
    assert kimi["evidence"]["value"] == 5
    assert kimi["outcome"] == "inconclusive"
    assert "no weights to ask" in kimi["evidence"]["reason"]
    deepseek = claim["cases"]["architecture.identical[deepseek_v3]"]
    assert deepseek["evidence"]["value"] == 4
    assert deepseek["outcome"] == "inconclusive"
    attention = claim["cases"]["architecture.overlap[kimi_k2]"]["evidence"]["details"]["keys"]["attention_kind"]
    assert attention == {"candidate": "MLA", "reference": "MLA", "equal": True}


def test_hyperclovax_has_three_components_with_panels_of_their_own(offline: Offline) -> None:
    _, claim = offline("hyperclovax")
    assert set(claim["components"]) == {"text", "vision", "projector"}
    assert claim["components"]["vision"]["disclosed"] == ["qwen2_5_vl_32b", "qwen2_5_vl_7b"]
    overlap = claim["cases"]["architecture.overlap[text-llama_3_1_70b]"]["evidence"]["details"]
    assert overlap["seven_keys_equal"] == "2/7"
    qwen = claim["cases"]["architecture.overlap[text-qwen2_5_72b]"]["evidence"]["details"]
    assert qwen["seven_keys"]["hidden_size"]["reference"] == 8192
    assert qwen["seven_keys"]["num_attention_heads"]["reference"] == 64
    assert qwen["seven_keys_equal"] == "1/7"
    vision = claim["cases"]["architecture.identical[vision-qwen2_5_vl_32b]"]
    assert vision["evidence"]["value"] == 5
    assert vision["outcome"] == "inconclusive"


# What claims/example.yaml says of itself: decided where so small a model allows.
BESIDE_THE_WEIGHTS = {
    "compute.flops": "supports",
    "compute.tokens": "inconclusive",
    "training_log.initial_loss": "supports",
    "training_log.continuity": "supports",
    "training_log.tokens": "supports",
    "behavior.knowledge_cutoff": "inconclusive",
    "behavior.refusals": "not applicable",
    "behavior.next_token": "inconclusive",
}


@pytest.mark.parametrize(
    ("name", "status", "verdict"), [("example", 0, "SUPPORTED"), ("example_derived", 1, "REFUTED")]
)
def test_the_examples_end_as_they_are_documented(
    pytester: pytest.Pytester, repository: Path, name: str, status: int, verdict: str
) -> None:
    path = repository / "claims" / f"{name}.yaml"
    result = pytester.runpytest_subprocess(str(path), "--report", "out", "-p", "no:cacheprovider")
    assert result.ret == status
    claim = verdicts(pytester.path / "out")[name]
    assert claim["verdict"] == verdict
    if name == "example":
        outcomes = {case: found["outcome"] for case, found in claim["cases"].items()}
        assert BESIDE_THE_WEIGHTS.items() <= outcomes.items()
        assert claim["cases"]["compute.tokens"]["evidence"]["value"] == pytest.approx(8.14, abs=0.01)
        assert claim["cases"]["compute.flops"]["evidence"]["details"]["accelerator"]["source"] == "stated by the claim"


def test_the_continued_example_is_found_by_how_it_goes_on(pytester: pytest.Pytester, repository: Path) -> None:
    """Its whole claim is REFUTED; only the part that no other example shows is run here."""
    path = repository / "claims" / "example_continued.yaml"
    names = ("next_token", "training_log", "compute")
    result = pytester.runpytest_subprocess(
        str(path), "-k", " or ".join(names), "--report", "out", "-p", "no:cacheprovider"
    )
    assert result.ret == 10, "a part of a claim is PARTIAL"
    cases = verdicts(pytester.path / "out")["example_continued"]["cases"]
    assert cases["behavior.next_token"]["outcome"] == "contradicts"
    assert cases["behavior.next_token"]["evidence"]["details"]["nearest"] == "base"
    assert cases["compute.tokens"]["outcome"] == "contradicts"
    assert cases["training_log.initial_loss"]["outcome"] == "inconclusive"
