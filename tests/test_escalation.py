from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checks.checkpoint.model import Model
from checks.claim.discovery import check_names
from checks.claim.model import ModelSource
from checks.escalation import WeightOpinion, weigh_pair
from checks.evidence.judge import Judge, JudgeContext
from checks.evidence.record import CONTRADICTS, INCONCLUSIVE, SUPPORTS
from checks.pair.pair import Pair
from checks.pair.reading import Reading

Tensors = dict[str, torch.Tensor]
Llama = Callable[..., Tensors]
Save = Callable[..., Path]
Open = Callable[..., Pair]
Weigh = Callable[..., WeightOpinion]


@pytest.fixture
def weigh(save_checkpoint: Save, open_pair: Open) -> Weigh:
    """What the weights of a pair say to a suspicion."""

    def run(
        ours: Path | Tensors,
        theirs: Path | Tensors,
        cases: int = 1,
        overrides: Mapping[str, Mapping[str, float]] | None = None,
    ) -> WeightOpinion:
        pair = open_pair(
            ours if isinstance(ours, Path) else save_checkpoint("ours", ours),
            theirs if isinstance(theirs, Path) else save_checkpoint("theirs", theirs),
        )
        context = JudgeContext("id", "test", "claims/test.yaml:1", "reference", False, cases, overrides or {})
        judge = Judge("architecture.identical", context)
        opinion = weigh_pair(pair, judge)
        assert judge.evidence is None
        return opinion

    return run


def noisy(tensors: Tensors, size: float) -> Tensors:
    """Every tensor with noise of `size` times its spread."""
    generator = torch.Generator().manual_seed(77)
    return {
        name: (tensor.float() + size * tensor.float().std() * torch.randn(tensor.shape, generator=generator)).to(
            tensor.dtype
        )
        for name, tensor in tensors.items()
    }


def test_escalation_is_no_family_of_checks() -> None:
    assert not any(name.startswith("escalation") for name in check_names())


def test_independent_weights_clear(examples: Path, weigh: Weigh) -> None:
    for reference in ("base", "derived"):
        opinion = weigh(examples / "independent", examples / reference)
        assert opinion.outcome == SUPPORTS
        assert opinion.powered
        assert opinion.reason.startswith("independent weights")
        # identity.sha256 also supports, and nothing may rest on it.
        assert "identity.sha256" not in opinion.reason
        assert set(opinion.details) == {
            "identity.sha256",
            "similarity.mean",
            "similarity.embedding",
            "similarity.category",
            "independence.units",
            "independence.anchored",
        }


def test_fine_tuned_weights_confirm(examples: Path, weigh: Weigh) -> None:
    opinion = weigh(examples / "derived", examples / "base")
    assert opinion.outcome == CONTRADICTS
    assert "similarity.mean" in opinion.reason
    assert "independence.units" in opinion.reason


def test_one_measurement_that_contradicts_is_enough(examples: Path, weigh: Weigh) -> None:
    independent, base = (
        load_file(examples / "independent" / "model.safetensors"),
        load_file(examples / "base" / "model.safetensors"),
    )
    one_tensor = independent | {"lm_head.weight": base["lm_head.weight"]}
    opinion = weigh(one_tensor, examples / "base")
    assert opinion.outcome == CONTRADICTS
    assert opinion.reason.startswith("inherited weights: identity.sha256")
    assert opinion.details["similarity.mean"].startswith(SUPPORTS)


def test_weights_that_cannot_be_had_leave_it_open(examples: Path, tmp_path: Path, weigh: Weigh) -> None:
    for ours, theirs in ((examples / "base", tmp_path / "gone"), (tmp_path / "gone", examples / "base")):
        opinion = weigh(ours, theirs)
        assert opinion.outcome == INCONCLUSIVE
        assert not opinion.powered
        assert "gone" in opinion.reason


def test_other_widths_are_cleared_by_anchored_neurons_alone(llama_tensors: Llama, weigh: Weigh) -> None:
    """Zero equal tensors support nothing; neurons that answer each other need no width in common."""
    opinion = weigh(llama_tensors(1), llama_tensors(1, hidden_size=48, head_dim=12, intermediate_size=128))
    assert opinion.outcome == SUPPORTS
    assert opinion.reason.startswith("independent weights: independence.anchored")
    assert opinion.details["identity.sha256"].startswith(SUPPORTS)
    assert opinion.details["similarity.mean"].startswith(INCONCLUSIVE)


def test_undefined_weights_leave_it_open(llama_tensors: Llama, weigh: Weigh) -> None:
    broken = {name: torch.full_like(tensor, math.nan) for name, tensor in llama_tensors(1).items()}
    assert weigh(broken, llama_tensors(1)).outcome == INCONCLUSIVE


def test_mean_and_neurons_at_odds_end_contradicting(examples: Path, weigh: Weigh) -> None:
    """Heavy noise: a mean cosine near 0.1 is between the bands, and the neurons still tell."""
    opinion = weigh(noisy(load_file(examples / "base" / "model.safetensors"), 12.0), examples / "base")
    assert opinion.outcome == CONTRADICTS
    assert not opinion.details["similarity.mean"].startswith(CONTRADICTS)


def test_overrides_of_the_claim_apply(examples: Path, weigh: Weigh) -> None:
    tuned = noisy(load_file(examples / "base" / "model.safetensors"), 0.7)
    plain = weigh(tuned, examples / "base")
    loosened = weigh(tuned, examples / "base", overrides={"similarity.mean": {"contradicts_from": 0.99}})
    assert plain.details["similarity.mean"].startswith(CONTRADICTS)
    assert loosened.details["similarity.mean"].startswith(INCONCLUSIVE)


def test_level_is_that_of_the_whole_claim(examples: Path, weigh: Weigh) -> None:
    one = weigh(examples / "independent", examples / "base", cases=1).details["independence.units"]
    many = weigh(examples / "independent", examples / "base", cases=1000).details["independence.units"]
    # Ten tests in a case: all views and gates, of each of four MLPs and together.
    assert "critical 5.33" in one
    assert "critical 6.47" in many


def test_small_part_in_common_does_not_clear(llama_tensors: Llama, weigh: Weigh) -> None:
    """Attention, a quarter of the weights, and no MLP at all."""
    theirs = {name: tensor for name, tensor in llama_tensors(2).items() if ".mlp." not in name}
    assert weigh(llama_tensors(1), theirs).outcome == INCONCLUSIVE


@pytest.mark.parametrize("inherited", ["embed_tokens", "lm_head", "norm"])
def test_inherited_part_outside_the_layers_matrices_is_not_cleared(
    inherited: str, examples: Path, weigh: Weigh
) -> None:
    """Copied and trained on, so that no byte is equal: the layers are independent, and the model is not."""
    tuned = noisy(load_file(examples / "base" / "model.safetensors"), 0.1)
    mixed = {
        name: tuned[name] if inherited in name else tensor
        for name, tensor in load_file(examples / "independent" / "model.safetensors").items()
    }
    assert weigh(mixed, examples / "base").outcome != SUPPORTS


@pytest.mark.parametrize(("model", "outcome"), [("independent", INCONCLUSIVE), ("derived", CONTRADICTS)])
def test_a_screening_confirms_a_suspicion_and_never_clears_one(model: str, outcome: str, examples: Path) -> None:
    ours, theirs = (Model(ModelSource(name, path=str(examples / name)), None, ("",)) for name in (model, "base"))
    context = JudgeContext("id", "test", "claims/test.yaml:1", "reference", False, 1)
    opinion = weigh_pair(Pair(ours, theirs, reading=Reading("screen")), Judge("architecture.identical", context))
    assert opinion.outcome == outcome
    assert ("not clear it" in opinion.reason) == (outcome == INCONCLUSIVE)
