from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from checks.evidence.record import CONTRADICTS, INCONCLUSIVE, NOT_APPLICABLE, SUPPORTS, Evidence
from checks.pair import measures
from checks.pair.pair import Pair
from checks.statistics.units import critical_z, unit_permutation_test

Tensors = dict[str, torch.Tensor]
Llama = Callable[..., Tensors]
Config = Callable[..., dict[str, Any]]
Save = Callable[..., Path]
Open = Callable[..., Pair]
Judged = Callable[..., Evidence]
Test = Callable[[Tensors, Tensors], Evidence]
MLP_KINDS = ("gate_proj", "up_proj", "down_proj")
PERMUTATIONS = 10_000


@pytest.fixture
def units(save_checkpoint: Save, open_pair: Open, judged: Judged) -> Test:
    """The evidence of independence.units on two sets of tensors."""

    def run(ours: Tensors, theirs: Tensors) -> Evidence:
        pair = open_pair(save_checkpoint("ours", ours), save_checkpoint("theirs", theirs))
        return judged("independence.units", pair)

    return run


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def noisy(tensors: Tensors, size: float, seed: int = 5000) -> Tensors:
    """Every tensor with noise of `size` times its spread."""
    return {
        name: (tensor.float() + size * tensor.float().std() * normal(seed + number, *tensor.shape)).to(tensor.dtype)
        for number, (name, tensor) in enumerate(tensors.items())
    }


def with_mlps(tensors: Tensors, change: Callable[[int, str, torch.Tensor], torch.Tensor], layers: int = 4) -> Tensors:
    """`tensors` with `change(layer, kind, matrix)` in place of every MLP matrix, units as rows."""
    changed = dict(tensors)
    for layer in range(layers):
        for kind in MLP_KINDS:
            name = f"model.layers.{layer}.mlp.{kind}.weight"
            matrix = changed[name].T if kind == "down_proj" else changed[name]
            matrix = change(layer, kind, matrix)
            changed[name] = matrix.T.contiguous() if kind == "down_proj" else matrix
    return changed


def neurons_permuted(tensors: Tensors, seed: int = 3) -> Tensors:
    def permute(layer: int, kind: str, matrix: torch.Tensor) -> torch.Tensor:
        order = torch.randperm(len(matrix), generator=torch.Generator().manual_seed(seed + layer))
        return matrix[order]

    return with_mlps(tensors, permute)


def int8_rounded(tensors: Tensors) -> Tensors:
    rounded = {}
    for name, tensor in tensors.items():
        step = tensor.float().abs().max() / 127
        rounded[name] = ((tensor.float() / step).round() * step).to(tensor.dtype)
    return rounded


def layers_dropped(tensors: Tensors) -> Tensors:
    """Without the last layer, whose numbers are not taken by another."""
    return {name: tensor for name, tensor in tensors.items() if ".layers.3." not in name}


def embeddings_replaced(tensors: Tensors) -> Tensors:
    changed = dict(tensors)
    for number, name in enumerate(("model.embed_tokens.weight", "lm_head.weight")):
        changed[name] = (0.02 * normal(number, *tensors[name].shape)).to(tensors[name].dtype)
    return changed


# The trained examples and what can be made of them


def test_independent_training_supports(examples: Path, open_pair: Open, judged: Judged) -> None:
    for reference in ("base", "derived"):
        evidence = judged("independence.units", open_pair(examples / "independent", examples / reference))
        assert evidence.outcome == SUPPORTS
        assert evidence.powered
        assert abs(float(evidence.value or 0)) < 3
        assert evidence.details["mlps"] == 4
        assert evidence.details["units"] == 4 * 352
        assert evidence.details["detectable_effect"] < 0.02


def test_fine_tuned_model_contradicts(examples: Path, open_pair: Open, judged: Judged) -> None:
    evidence = judged("independence.units", open_pair(examples / "derived", examples / "base"))
    assert evidence.outcome == CONTRADICTS
    assert float(evidence.value or 0) > 100
    assert evidence.details["effect"] > 0.9
    assert evidence.details["log_p"] < -10_000
    assert "initialisation seed" in evidence.details["note"]


DERIVATIONS: dict[str, Callable[[Tensors], Tensors]] = {
    "noise of 0.3 times the spread": lambda base: noisy(base, 0.3),
    "noise of 8 times the spread": lambda base: noisy(base, 8.0),
    "cast to float32": lambda base: {name: tensor.float() for name, tensor in base.items()},
    "rounded to 8 bits": int8_rounded,
    "embeddings replaced": embeddings_replaced,
    "last layer dropped": layers_dropped,
    "scaled": lambda base: {name: 3 * tensor for name, tensor in base.items()},
    "half pruned to zero": lambda base: {
        name: torch.where(tensor.abs() < tensor.abs().float().median(), 0, tensor) for name, tensor in base.items()
    },
    "names of another kind": lambda base: {
        name.replace("model.layers", "transformer.h"): tensor for name, tensor in base.items()
    },
}


@pytest.mark.parametrize("derivation", DERIVATIONS)
def test_derivation_that_keeps_the_order_of_neurons_contradicts(derivation: str, base: Tensors, units: Test) -> None:
    assert units(DERIVATIONS[derivation](base), base).outcome == CONTRADICTS


def test_permuted_neurons_are_the_stated_limit(base: Tensors, units: Test) -> None:
    """A renumbering is the null hypothesis itself: this check cannot see it and must not pretend to."""
    evidence = units(neurons_permuted(base), base)
    assert evidence.outcome != CONTRADICTS
    assert abs(float(evidence.value or 0)) < 5


def test_merge_of_two_models_contradicts_for_both(base: Tensors, independent: Tensors, units: Test) -> None:
    merged = {name: (base[name] + independent[name]) / 2 for name in base}
    assert units(merged, base).outcome == CONTRADICTS
    assert units(merged, independent).outcome == CONTRADICTS


def test_one_layer_of_four_contradicts(base: Tensors, independent: Tensors, units: Test) -> None:
    """Trained on after it was copied, so that no byte is equal."""
    taken = noisy(base, 1.0)
    mixed = {name: taken[name] if ".layers.2." in name else tensor for name, tensor in independent.items()}
    evidence = units(mixed, base)
    assert evidence.outcome == CONTRADICTS
    scores = {layer: abs(z[0]) for layer, z in evidence.details["z_per_layer"].items()}
    assert scores.pop(2) > 50
    assert max(scores.values()) < 5


def signs_flipped(tensors: Tensors) -> Tensors:
    """A copy of the same function: up row and down column of some neurons negated, so many that z is near 0."""
    changed = dict(tensors)
    for layer in range(4):
        gate, up, down = (tensors[f"model.layers.{layer}.mlp.{kind}.weight"] for kind in MLP_KINDS)
        low, high = 0, len(up)
        while high - low > 1:
            middle = (low + high) // 2
            signs = torch.where(torch.arange(len(up)) < middle, -1, 1)[:, None].to(up.dtype)
            test = unit_permutation_test([gate, signs * up, signs * down.T], [gate, up, down.T])
            low, high = (middle, high) if (test.z or 0) > 0 else (low, middle)
        signs = torch.where(torch.arange(len(up)) < high, -1, 1)[:, None].to(up.dtype)
        changed[f"model.layers.{layer}.mlp.up_proj.weight"] = signs * up
        changed[f"model.layers.{layer}.mlp.down_proj.weight"] = (signs * down.T).T.contiguous()
    return changed


def test_flipped_signs_of_neurons_do_not_clear_a_copy(base: Tensors, units: Test) -> None:
    """SwiGLU leaves the sign of up and down free; gate rows, which cannot be negated, still agree one by one."""
    copy = signs_flipped(base)
    inputs = normal(1, 128, 5)
    outputs = []
    for tensors in (copy, base):
        gate, up, down = (tensors[f"model.layers.1.mlp.{kind}.weight"].float() for kind in MLP_KINDS)
        outputs.append(down @ (torch.nn.functional.silu(gate @ inputs) * (up @ inputs)))
    assert torch.allclose(outputs[0], outputs[1], atol=1e-5)
    assert units(copy, base).outcome != SUPPORTS


def wholly_permuted(tensors: Tensors) -> Tensors:
    """A copy of the same function under another numbering of neurons, heads, head dimensions and residual channels."""
    generator = torch.Generator().manual_seed(8)
    channels = torch.randperm(128, generator=generator)
    changed = {name: tensor[channels] if tensor.dim() == 1 else tensor for name, tensor in tensors.items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        changed[name] = tensors[name][:, channels]
    for layer in range(4):
        start = f"model.layers.{layer}."
        neurons = torch.randperm(352, generator=generator)
        # Two key-value heads of 32, each for two queries; values and outputs may also permute within a head.
        pairs = torch.randperm(2, generator=generator)
        keys = (32 * pairs[:, None] + torch.arange(32)).flatten()
        queries = (64 * pairs[:, None] + torch.arange(64)).flatten()
        inner = torch.randperm(32, generator=generator)
        values = (32 * pairs[:, None] + inner).flatten()
        outputs = (64 * pairs[:, None, None] + 32 * torch.arange(2)[None, :, None] + inner).flatten()
        rows = {"q": queries, "k": keys, "v": values}
        for kind, order in rows.items():
            name = f"{start}self_attn.{kind}_proj.weight"
            changed[name] = tensors[name][order][:, channels]
        name = f"{start}self_attn.o_proj.weight"
        changed[name] = tensors[name][:, outputs][channels]
        for kind in ("gate", "up"):
            name = f"{start}mlp.{kind}_proj.weight"
            changed[name] = tensors[name][neurons][:, channels]
        name = f"{start}mlp.down_proj.weight"
        changed[name] = tensors[name][:, neurons][channels]
    return {name: tensor.contiguous() for name, tensor in changed.items()}


def test_wholly_permuted_copy_computes_the_same_and_is_the_limit_of_every_check_there_is(
    base: Tensors, examples: Path, save_checkpoint: Save, open_pair: Open, judged: Judged
) -> None:
    """Whoever adds a check that withstands permutation: let this one fail, and assert that the copy is found."""
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM.from_pretrained(examples / "base", dtype=torch.float32)
    tokens = torch.randint(1024, (1, 16), generator=torch.Generator().manual_seed(0))
    copy = wholly_permuted(base)
    with torch.no_grad():
        before = model(tokens).logits
        model.load_state_dict({name: tensor.float() for name, tensor in copy.items()})
        after = model(tokens).logits
    assert torch.allclose(before, after, atol=1e-3)
    pair = open_pair(save_checkpoint("copy", copy), examples / "base")
    checks = ["identity.sha256", "similarity.mean", "similarity.category", "similarity.embedding", "independence.units"]
    assert [check for check in checks if judged(check, pair).outcome == CONTRADICTS] == []


# Innocents


@pytest.mark.parametrize("seed", range(5))
def test_shuffled_copies_of_an_independent_model_do_not_accuse(
    seed: int, base: Tensors, independent: Tensors, units: Test
) -> None:
    assert units(neurons_permuted(independent, 100 * seed), base).outcome in (SUPPORTS, INCONCLUSIVE)


@pytest.mark.parametrize("seed", range(8))
def test_random_models_do_not_accuse(seed: int, llama_tensors: Llama, units: Test) -> None:
    evidence = units(llama_tensors(2 * seed), llama_tensors(2 * seed + 1))
    assert evidence.outcome in (SUPPORTS, INCONCLUSIVE)
    assert abs(float(evidence.value or 0)) < 4.9


def test_score_of_trained_mlps_is_standard_normal_over_permutations(examples: Path) -> None:
    """The null by sampling: 10,000 renumberings of the neurons, in each layer alone and in the joint score."""
    ours, theirs = (
        load_file(examples / "independent" / "model.safetensors"),
        load_file(examples / "base" / "model.safetensors"),
    )
    generator = torch.Generator().manual_seed(1)
    joint = torch.zeros(PERMUTATIONS, dtype=torch.float64)
    for layer in range(4):
        views = []
        for tensors in (ours, theirs):
            gate, up, down = (tensors[f"model.layers.{layer}.mlp.{kind}.weight"].double() for kind in MLP_KINDS)
            views.append([gate, up, down.T])
        test = unit_permutation_test(*views)
        rows = torch.nn.functional.normalize
        scaled = [[rows(view, dim=1) for view in side] for side in views]
        whole = [torch.cat([rows(view - view.mean(0), dim=1) for view in side], 1) for side in scaled]
        a, b = (matrix - matrix.mean(0) for matrix in whole)
        products = a @ b.T
        assert test.scale is not None
        assert test.z is not None
        sigma = float(a.norm() * b.norm()) / test.scale
        assert float(products.diagonal().sum()) / sigma == pytest.approx(test.z, rel=1e-9)
        orders = torch.rand(PERMUTATIONS, len(products), generator=generator).argsort(1)
        z = products[torch.arange(len(products)), orders].sum(1) / sigma
        assert abs(float(z.mean())) < 4 / math.sqrt(PERMUTATIONS)
        assert 0.95 < float(z.std()) < 1.05
        assert float(z.abs().max()) < 5
        joint += z / 2
    assert 0.95 < float(joint.std()) < 1.05
    assert float(joint.abs().max()) < 5
    assert 0.0002 < float((joint.abs() > 3.29).double().mean()) < 0.0025


# Power and level


def test_level_is_shared_by_all_calibrated_cases(
    llama_tensors: Llama, save_checkpoint: Save, open_pair: Open, judged: Judged
) -> None:
    """A score that is critical for one case is not for a claim of 100,000 cases."""
    ours = llama_tensors(1)
    theirs = save_checkpoint("theirs", ours)
    for seed in range(20):
        pair = open_pair(save_checkpoint(f"ours{seed}", noisy(llama_tensors(1), 55.0, 1000 * seed)), theirs)
        tests = pair.once(measures.units)
        assert tests is not None
        if critical_z(1e-6, tests.tests) < tests.strongest_joint.z < 6.3:
            break
    else:
        pytest.fail("no model of the wanted score")
    alone = judged("independence.units", pair, calibrated_cases=1)
    many = judged("independence.units", pair, calibrated_cases=100_000)
    assert alone.value == many.value
    assert alone.details["critical_z"] == critical_z(1e-6, tests.tests)
    assert many.details["critical_z"] == critical_z(1e-6, 100_000 * tests.tests)
    assert alone.outcome == CONTRADICTS
    assert many.outcome == INCONCLUSIVE


def test_few_neurons_have_no_power(llama_tensors: Llama, units: Test) -> None:
    small = {"intermediate_size": 4, "hidden_size": 8, "head_dim": 2, "vocab_size": 16, "num_hidden_layers": 1}
    evidence = units(llama_tensors(1, **small), llama_tensors(2, **small))
    assert evidence.outcome == INCONCLUSIVE
    assert not evidence.powered
    assert "no power" in evidence.reason


def test_other_widths_are_not_applicable(llama_tensors: Llama, units: Test) -> None:
    evidence = units(llama_tensors(1), llama_tensors(1, intermediate_size=160))
    assert evidence.outcome == NOT_APPLICABLE
    assert not evidence.powered


def test_mlps_without_variation_decide_nothing(llama_tensors: Llama, units: Test) -> None:
    constant = with_mlps(llama_tensors(1), lambda layer, kind, matrix: torch.ones_like(matrix), layers=3)
    evidence = units(constant, llama_tensors(1))
    assert evidence.outcome in (INCONCLUSIVE, NOT_APPLICABLE)
    assert evidence.value is None


def test_undefined_weights_decide_nothing(llama_tensors: Llama, units: Test) -> None:
    broken = with_mlps(llama_tensors(1), lambda layer, kind, matrix: torch.full_like(matrix, math.nan), layers=3)
    assert units(broken, llama_tensors(1)).outcome in (INCONCLUSIVE, NOT_APPLICABLE)


def test_one_comparable_mlp_of_four_is_not_enough_to_pass(base: Tensors, independent: Tensors, units: Test) -> None:
    """Three layers pruned to a smaller width, which this check cannot compare, and one fresh: nothing to pass on."""
    guilty = with_mlps(base, lambda layer, kind, matrix: matrix[:320])
    for kind in MLP_KINDS:
        name = f"model.layers.0.mlp.{kind}.weight"
        guilty[name] = independent[name]
    evidence = units(guilty, base)
    assert evidence.details["mlps"] == 1
    assert evidence.outcome != SUPPORTS


def mixture(seed: int, experts: int = 48, layers: int = 2) -> Tensors:
    """The experts of a model of many small ones."""
    tensors: Tensors = {}
    for layer in range(layers):
        for expert in range(experts):
            start = f"model.layers.{layer}.mlp.experts.{expert}."
            number = seed + 3 * (layer * experts + expert)
            tensors |= {
                f"{start}gate_proj.weight": normal(number, 16, 24),
                f"{start}up_proj.weight": normal(number + 1, 16, 24),
                f"{start}down_proj.weight": normal(number + 2, 24, 16),
            }
    return tensors


def test_experts_of_independent_models_support(units: Test) -> None:
    """Of equal size they are one observation for each layer; it takes layers to have power."""
    evidence = units(mixture(0, experts=4, layers=24), mixture(10_000, experts=4, layers=24))
    assert evidence.outcome == SUPPORTS
    assert evidence.details["mlps"] == 96


def test_one_inherited_expert_of_many_is_not_passed(units: Test) -> None:
    """Its own score is far beyond chance, and is lost in the mean of 96."""
    ours, theirs = mixture(0), mixture(10_000)
    for name in theirs:
        if ".layers.1.mlp.experts.37." in name:
            ours[name] = theirs[name] + 0.1 * normal(7, *theirs[name].shape)
    evidence = units(ours, theirs)
    assert max(abs(z) for scores in evidence.details["z_per_layer"].values() for z in scores) > 10
    assert evidence.outcome != SUPPORTS


# The other checks of the family on trained models; what permutes and rotates is in test_detection.py


@pytest.mark.parametrize("check", ["channels", "tensors", "neurons", "anchored", "alignment"])
def test_each_check_of_the_family_supports_and_contradicts(
    check: str, examples: Path, open_pair: Open, judged: Judged
) -> None:
    alone = judged(f"independence.{check}", open_pair(examples / "independent", examples / "base"))
    assert (alone.outcome, alone.powered) == (SUPPORTS, True)
    derived = judged(f"independence.{check}", open_pair(examples / "derived", examples / "base"))
    assert derived.outcome == CONTRADICTS
    assert derived.powered


def test_other_widths_have_no_channels_in_common(
    llama_config: Config, llama_tensors: Llama, save_checkpoint: Save, open_pair: Open, judged: Judged
) -> None:
    narrow = {"hidden_size": 32, "head_dim": 8, "intermediate_size": 80, "vocab_size": 128}
    pair = open_pair(
        save_checkpoint("narrow", llama_tensors(1, **narrow), llama_config(**narrow)),
        save_checkpoint("wide", llama_tensors(2), llama_config()),
    )
    assert judged("independence.channels", pair).outcome == NOT_APPLICABLE


def test_tensors_under_names_that_say_nothing_contradict(
    base: Tensors, examples: Path, save_checkpoint: Save, open_pair: Open, judged: Judged
) -> None:
    renamed = {f"weights.{number}": tensor for number, tensor in enumerate(noisy(base, 0.3).values())}
    evidence = judged("independence.tensors", open_pair(save_checkpoint("renamed", renamed), examples / "base"))
    assert evidence.outcome == CONTRADICTS
    assert "weights." in evidence.reason


def test_without_tokens_in_common_only_the_checks_by_tokens_fall_silent(
    examples: Path, base: Tensors, save_checkpoint: Save, open_pair: Open, judged: Judged
) -> None:
    config = json.loads((examples / "base" / "config.json").read_text())
    pair = open_pair(save_checkpoint("bare", noisy(base, 0.3), config), examples / "base")
    for check in ("neurons", "alignment"):
        evidence = judged(f"independence.{check}", pair)
        assert (evidence.outcome, evidence.powered) == (INCONCLUSIVE, False)
    assert judged("independence.anchored", pair).outcome == CONTRADICTS
    assert judged("independence.channels", pair).outcome == CONTRADICTS
