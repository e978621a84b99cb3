"""--read, --budget and --seed as a user meets them: what each mode reads, and what it may conclude."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from checks.checkpoint.model import Model
from checks.claim.model import ModelSource
from checks.pair.pair import Pair
from checks.pair.reading import Reading
from checks.plugin import parse_budget
from checks.streaming.planned_source import NotPlanned
from tests.claim_runs import ExampleClaim

CHECKS = ("similarity", "independence.units", "identity.sha256")
Run = Callable[..., dict[str, Any]]


@pytest.fixture
def run(example_claim: ExampleClaim, examples: Path) -> Run:
    """Runs a claim about one example model against another, and returns its report."""

    def make(
        *options: str,
        model: str = "derived",
        reference: str = "base",
        checks: tuple[str, ...] = CHECKS,
        paths: Sequence[Path] | None = None,
    ) -> Any:
        places = paths or (examples / model, examples / reference)
        ours, theirs = ({"name": place.name, "path": str(place)} for place in places)
        example_claim.write(ours, [theirs], checks={"only": list(checks)})
        result = example_claim.run("--store", "none", *options)
        return {**example_claim.report(), "status": result.ret}

    return make


@pytest.fixture
def large(save_checkpoint: Any, llama_tensors: Any, llama_config: Any) -> list[Path]:
    """Two independent models, of which a sample draws blocks."""
    size = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 6, "vocab_size": 2048}
    config = llama_config(**size)
    return [save_checkpoint(name, llama_tensors(seed, **size), config) for seed, name in enumerate(("one", "other"))]


def pair_of(paths: Sequence[Path], reading: Reading) -> Pair:
    ours, theirs = (Model(ModelSource(path.name, path=str(path)), None, ("",)) for path in paths)
    return Pair(ours, theirs, reading=reading)


def outcomes(claim: dict[str, Any]) -> dict[str, str]:
    return {case_id.partition("[")[0]: case["outcome"] for case_id, case in claim["cases"].items()}


def records(claim: dict[str, Any]) -> list[dict[str, Any]]:
    return [case["evidence"]["read"] for case in claim["cases"].values()]


@pytest.mark.parametrize("mode", ["screen", "sample"])
def test_a_derived_model_is_refuted_from_a_part(run: Run, mode: str) -> None:
    claim = run("--read", mode)
    assert claim["verdict"] == "REFUTED"
    found = outcomes(claim)
    assert found["similarity.mean"] == found["similarity.layer"] == found["independence.units"] == "contradicts"
    assert found["identity.sha256"] == "inconclusive"
    assert "read only in part" in claim["cases"]["identity.sha256[base]"]["evidence"]["reason"]
    for read in records(claim):
        assert (read["mode"], read["seed"]) == (mode, 0)
        assert read["candidate"]["sha256"] is None
        assert 0 < read["share"] < 1


def test_a_screening_never_supports(run: Run) -> None:
    claim = run("--read", "screen", model="independent")
    assert claim["verdict"] == "INCONCLUSIVE"
    assert "read only in part: a screening may refute, not support" in claim["text"]
    similar = {name: outcome for name, outcome in outcomes(claim).items() if name.startswith("similarity.")}
    assert set(similar.values()) == {"inconclusive"}


def test_a_sample_may_support_and_says_what_it_could_not_see(run: Run, large: list[Path]) -> None:
    checks = ("similarity.mean", "similarity.layer", "independence.units")
    claim = run("--read", "sample", "--seed", "7", paths=large, checks=checks)
    assert "read only in part" not in claim["text"]
    mean = claim["cases"]["similarity.mean[other]"]
    assert mean["outcome"] == "supports"
    low, high = mean["evidence"]["details"]["estimate"]["interval"]
    assert -0.1 < low < high < 0.1
    assert "would not be seen" in mean["evidence"]["reason"]
    read = mean["evidence"]["read"]
    assert read["seed"] == 7
    assert 0.1 < read["share"] < 0.25
    assert read["unseen_elements_of_a_tensor"] > 0
    assert read["candidate"]["read"]["longest_run_of_unread_layers"] > 0
    units = claim["cases"]["independence.units[other]"]
    assert units["outcome"] == "supports"
    assert units["evidence"]["details"]["coverage"] == 1  # of the MLPs of the layers that are read
    assert units["evidence"]["details"]["mlps"] == len(read["candidate"]["read"]["layers"]) < 6


def test_everything_is_read_of_local_directories_by_default(run: Run) -> None:
    claim = run(checks=("similarity.mean", "identity.sha256"))
    for read in records(claim):
        assert read["mode"] == "full"
        assert len(read["candidate"]["sha256"]) == 64
    assert outcomes(claim)["identity.sha256"] != "inconclusive"


def test_another_seed_draws_other_blocks_and_the_same_seed_the_same(large: list[Path]) -> None:
    def mean(seed: int) -> float | None:
        return pair_of(large, Reading("sample", seed=seed)).comparison().mean().cosine

    assert mean(1) == mean(1) != mean(2)


def test_a_budget_bounds_what_is_read(run: Run) -> None:
    everything = run("--read", "screen", checks=("similarity.mean",))
    less = run("--read", "screen", "--budget", "2MB", checks=("similarity.mean",))
    assert less["verdict"] == "REFUTED"
    (much,), (little,) = records(everything), records(less)
    for name in ("candidate", "reference"):
        assert little[name]["read"]["bytes"] < much[name]["read"]["bytes"]
    assert little["candidate"]["read"]["bytes"] + little["reference"]["read"]["bytes"] <= 2_000_000
    assert little["candidate"]["read"]["layers"] != much["candidate"]["read"]["layers"]


def test_too_small_a_budget_says_how_much_is_needed(run: Run, pytester: pytest.Pytester) -> None:
    claim = run("--read", "sample", "--budget", "1kB", checks=("similarity.mean",))
    assert claim["status"] == 11
    assert "raise it with --budget" in claim["cases"]["similarity.mean[base]"]["evidence"]["reason"]


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("500 MB", 5 * 10**8), ("1.5g", 15 * 10**8), ("1000", 1000), ("2kb", 2000)]
)
def test_a_budget_has_a_unit(text: str, size: int) -> None:
    assert parse_budget(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1", "5 XB", "GB", "0.2", "nan"])
def test_no_budget(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="no number of bytes"):
        parse_budget(text)


def test_another_mode_is_a_usage_error(pytester: pytest.Pytester) -> None:
    result = pytester.runpytest("--read", "half")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    with pytest.raises(ValueError, match="no way to read"):
        Reading("half")


def test_what_needs_everything_is_not_had_from_a_part(examples: Path) -> None:
    pair = pair_of([examples / "derived", examples / "base"], Reading("sample"))
    with pytest.raises(NotPlanned, match="--read full"):
        pair.elementwise()
    comparison = pair.comparison()
    assert comparison.is_sampled
    assert comparison.identical == ()
    # Tensors outside what is planned cannot be read behind the plan's back.
    assert pair.plan is not None
    unread = next(
        name
        for name, entry in pair.candidate.checkpoint.tensors.items()
        if not pair.plan.candidate.is_whole(entry.stored_name)
    )
    with pytest.raises(NotPlanned):
        pair.candidate.checkpoint.read(unread)
    # The canonical form has the layers that are read whole, and no others.
    for model, side in zip(pair.canonical, (pair.plan.candidate, pair.plan.reference), strict=True):
        assert model.layers == side.layers
