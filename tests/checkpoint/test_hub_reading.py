"""How much is read of models on the hub: a screening within the budget, unless everything is asked for or is here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import snapshot_download

from tests.claim_runs import ExampleClaim

MODELS = ("derived", "base")
Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(example_claim: ExampleClaim, hub: Any, examples: Path) -> Run:
    """Runs a claim about two models on a hub and returns its report."""
    derived, base = (
        {
            "name": name,
            "repo": f"org/{name}",
            "revision": hub.add_directory(f"org/{name}", examples / name),
            "config": str(examples / name / "config.json"),
        }
        for name in MODELS
    )
    checks = ["similarity.mean", "similarity.layer", "independence.units"]
    example_claim.write(derived, [base], checks={"only": checks})

    def make(*options: str) -> dict[str, Any]:
        example_claim.run(*options)
        return example_claim.report()

    return make


def read_of(claim: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = claim["cases"]["similarity.mean[base]"]["evidence"]["read"]
    return found


def test_models_on_the_hub_are_screened_within_the_budget(hub: Any, run: Run, examples: Path) -> None:
    claim = run("--budget", "2MB")
    assert claim["verdict"] == "REFUTED"
    read = read_of(claim)
    assert (read["mode"], read["budget"], read["may_support"]) == ("screen", 2_000_000, False)
    planned = sum(read[name]["read"]["bytes"] for name in ("candidate", "reference"))
    weights = sum((examples / name / "model.safetensors").stat().st_size for name in MODELS)
    assert planned <= 2_000_000 < weights
    # What comes over the wire is what was planned, once, and listings, heads of answers and tokenizers beside it.
    assert hub.wire_bytes <= planned * 1.05 + 200_000
    # A second run has it all in the store; what opens the models is asked for again.
    hub.requests.clear()
    before = hub.wire_bytes
    assert run("--budget", "2MB") == claim
    assert hub.wire_bytes - before < 400_000


def test_everything_is_read_if_asked_for(run: Run) -> None:
    assert read_of(run("--read", "full"))["mode"] == "full"


def test_a_model_in_the_local_hub_cache_is_read_in_full(hub: Any, run: Run) -> None:
    for name in MODELS:
        snapshot_download(f"org/{name}", endpoint=hub.endpoint)
    claim = run()
    assert read_of(claim)["mode"] == "full"
    assert read_of(claim)["candidate"]["sha256"] is not None
