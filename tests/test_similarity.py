from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from checks.evidence.record import CONTRADICTS, INCONCLUSIVE, NOT_APPLICABLE, SUPPORTS, Evidence
from checks.pair.pair import Pair

Tensors = dict[str, torch.Tensor]
Llama = Callable[..., Tensors]
Save = Callable[..., Path]
Open = Callable[..., Pair]
Judged = Callable[..., Evidence]
Test = Callable[..., Evidence]
WHOLE = (
    "similarity.mean",
    "similarity.early_layers",
    "similarity.embedding",
    "similarity.category",
    "similarity.profile",
)


@pytest.fixture
def check(save_checkpoint: Save, open_pair: Open, judged: Judged) -> Test:
    """The evidence of one check on two sets of tensors."""

    def run(name: str, ours: Tensors, theirs: Tensors, **arguments: int) -> Evidence:
        pair = open_pair(save_checkpoint("ours", ours), save_checkpoint("theirs", theirs))
        return judged(name, pair, **arguments)

    return run


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def noisy(tensors: Tensors, size: float, seed: int = 5000) -> Tensors:
    """Every tensor with noise of `size` times its spread."""
    return {
        name: (tensor.float() + size * tensor.float().std() * normal(seed + number, *tensor.shape)).to(tensor.dtype)
        for number, (name, tensor) in enumerate(tensors.items())
    }


def int8_rounded(tensors: Tensors) -> Tensors:
    rounded = {}
    for name, tensor in tensors.items():
        step = tensor.float().abs().max() / 127
        rounded[name] = ((tensor.float() / step).round() * step).to(tensor.dtype)
    return rounded


def neurons_permuted(tensors: Tensors) -> Tensors:
    changed = dict(tensors)
    for layer in range(4):
        order = torch.randperm(352, generator=torch.Generator().manual_seed(layer))
        start = f"model.layers.{layer}.mlp."
        for kind in ("gate_proj", "up_proj"):
            changed[f"{start}{kind}.weight"] = tensors[f"{start}{kind}.weight"][order]
        changed[f"{start}down_proj.weight"] = tensors[f"{start}down_proj.weight"][:, order]
    return changed


def embeddings_replaced(tensors: Tensors) -> Tensors:
    changed = dict(tensors)
    for number, name in enumerate(("model.embed_tokens.weight", "lm_head.weight")):
        changed[name] = (0.02 * normal(number, *tensors[name].shape)).to(tensors[name].dtype)
    return changed


def second_layer_dropped(tensors: Tensors) -> Tensors:
    """Layers 0, 2, 3 under the numbers 0, 1, 2."""
    kept = {}
    for name, tensor in tensors.items():
        if ".layers." not in name:
            kept[name] = tensor
            continue
        start, number, rest = name.partition(".layers.")[0], *name.partition(".layers.")[2].split(".", 1)
        if number != "1":
            kept[f"{start}.layers.{int(number) - (int(number) > 1)}.{rest}"] = tensor
    return kept


def innocent(name: str) -> str:
    """The outcome of a check on small independent models: rows of an embedding share a direction, and 64 or 128
    dimensions of it are too few to tell it from chance."""
    return INCONCLUSIVE if name == "similarity.embedding" else SUPPORTS


# The trained examples


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("reference", ["base", "derived"])
def test_independent_training_supports(
    name: str, reference: str, examples: Path, open_pair: Open, judged: Judged
) -> None:
    evidence = judged(name, open_pair(examples / "independent", examples / reference))
    assert evidence.outcome == innocent(name)
    assert evidence.powered == (evidence.outcome == SUPPORTS)
    assert abs(float(evidence.value or 1)) < 0.06


@pytest.mark.parametrize("name", WHOLE)
def test_fine_tuned_model_contradicts(name: str, examples: Path, open_pair: Open, judged: Judged) -> None:
    evidence = judged(name, open_pair(examples / "derived", examples / "base"))
    assert evidence.outcome == CONTRADICTS
    assert float(evidence.value or 0) > 0.97


@pytest.mark.parametrize("layer", range(4))
def test_every_layer_tells_derived_from_independent(
    layer: int, examples: Path, open_pair: Open, judged: Judged
) -> None:
    derived = judged("similarity.layer", open_pair(examples / "derived", examples / "base"), layer=layer)
    independent = judged("similarity.layer", open_pair(examples / "independent", examples / "base"), layer=layer)
    assert derived.outcome == CONTRADICTS
    assert independent.outcome == SUPPORTS
    assert independent.details["elements"] == 4 * 49152 // 4 + 3 * 128 * 352


def test_layer_that_the_candidate_lacks_is_not_applicable(examples: Path, open_pair: Open, judged: Judged) -> None:
    evidence = judged("similarity.layer", open_pair(examples / "derived", examples / "base"), layer=4)
    assert evidence.outcome == NOT_APPLICABLE


# Derivations

MEAN_OF_DERIVATIONS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "noise of 0.3 times the spread": (lambda base: noisy(base, 0.3), CONTRADICTS),
    "noise of 0.7 times the spread": (lambda base: noisy(base, 0.7), CONTRADICTS),
    "noise of the spread itself": (lambda base: noisy(base, 1.0), INCONCLUSIVE),
    "cast to float32": (lambda base: {name: tensor.float() for name, tensor in base.items()}, CONTRADICTS),
    "scaled": (lambda base: {name: 3 * tensor for name, tensor in base.items()}, CONTRADICTS),
    "rounded to 8 bits": (int8_rounded, CONTRADICTS),
    "embeddings replaced": (embeddings_replaced, CONTRADICTS),
    "a layer dropped": (second_layer_dropped, CONTRADICTS),
    "neurons permuted": (neurons_permuted, CONTRADICTS),
}


@pytest.mark.parametrize("derivation", MEAN_OF_DERIVATIONS)
def test_mean_of_a_derivation_never_supports(derivation: str, base: Tensors, check: Test) -> None:
    derive, outcome = MEAN_OF_DERIVATIONS[derivation]
    evidence = check("similarity.mean", derive(base), base)
    assert evidence.outcome == outcome
    assert float(evidence.value or 0) > 0.2


@pytest.mark.parametrize("derivation", MEAN_OF_DERIVATIONS)
def test_category_of_a_derivation_contradicts(derivation: str, base: Tensors, check: Test) -> None:
    """Some kind of tensor keeps its place through every one of them, but for the heavy noise."""
    derive, _ = MEAN_OF_DERIVATIONS[derivation]
    heavy = derivation == "noise of the spread itself"
    assert check("similarity.category", derive(base), base).outcome == (INCONCLUSIVE if heavy else CONTRADICTS)


def test_permuted_neurons_lower_the_mean_to_what_attention_keeps(base: Tensors, check: Test) -> None:
    evidence = check("similarity.mean", neurons_permuted(base), base)
    attention, mlp = 49152, 3 * 128 * 352
    assert float(evidence.value or 0) == pytest.approx(attention / (attention + mlp), abs=0.03)


def test_layers_before_a_dropped_one_contradict(base: Tensors, check: Test) -> None:
    shortened = second_layer_dropped(base)
    assert check("similarity.layer", shortened, base, layer=0).outcome == CONTRADICTS
    assert check("similarity.layer", shortened, base, layer=1).outcome == SUPPORTS
    assert check("similarity.early_layers", shortened, base).outcome == CONTRADICTS


def test_shifted_layers_are_caught_by_what_lies_outside_of_them(base: Tensors, check: Test) -> None:
    """Without the first layer every other has a new number, and no layer meets its own."""
    tuned = noisy(base, 0.2)
    shifted = {key: tensor for key, tensor in tuned.items() if ".layers." not in key}
    for layer in range(3):
        start, source = f"model.layers.{layer}.", f"model.layers.{layer + 1}."
        shifted |= {key.replace(source, start): tensor for key, tensor in tuned.items() if key.startswith(source)}
    assert check("similarity.mean", shifted, base).outcome == SUPPORTS
    assert check("similarity.category", shifted, base).outcome == CONTRADICTS


def test_replaced_embeddings_are_new_and_the_rest_is_not(base: Tensors, check: Test) -> None:
    assert check("similarity.embedding", embeddings_replaced(base), base).outcome == innocent("similarity.embedding")
    assert check("similarity.early_layers", embeddings_replaced(base), base).outcome == CONTRADICTS


def test_one_inherited_layer_contradicts_in_that_layer_alone(base: Tensors, independent: Tensors, check: Test) -> None:
    tuned = noisy(base, 0.3)
    mixed = {name: tuned[name] if ".layers.2." in name else tensor for name, tensor in independent.items()}
    outcomes = [check("similarity.layer", mixed, base, layer=layer).outcome for layer in range(4)]
    assert outcomes == [SUPPORTS, SUPPORTS, CONTRADICTS, SUPPORTS]
    assert check("similarity.mean", mixed, base).outcome == INCONCLUSIVE
    profile = check("similarity.profile", mixed, base)
    assert profile.outcome == CONTRADICTS
    assert profile.details["pattern"] == "some layers high"


def test_inherited_embedding_contradicts_alone(base: Tensors, independent: Tensors, check: Test) -> None:
    tuned = noisy(base, 0.1)
    mixed = independent | {"model.embed_tokens.weight": tuned["model.embed_tokens.weight"]}
    assert check("similarity.embedding", mixed, base).outcome == CONTRADICTS
    # The embedding has a check and a bound of its own.
    category = check("similarity.category", mixed, base)
    assert category.outcome == SUPPORTS
    assert category.details["categories"]["embedding"]["cosine"] > 0.98
    assert check("similarity.mean", mixed, base).outcome == SUPPORTS


def test_inherited_norms_contradict_where_their_length_allows_it(
    base: Tensors, independent: Tensors, check: Test
) -> None:
    tuned = noisy(base, 0.1)
    mixed = {name: tuned[name] if "norm" in name else tensor for name, tensor in independent.items()}
    category = check("similarity.category", mixed, base)
    assert category.outcome == CONTRADICTS
    assert category.details["category"] == "norm"
    assert check("similarity.mean", mixed, base).outcome == SUPPORTS


def test_norms_too_short_to_decide_do_not_decide(llama_tensors: Llama, check: Test) -> None:
    """Of 30 elements, five standard deviations reach beyond the contradicting bound."""
    sizes = {"hidden_size": 30, "head_dim": 15, "num_attention_heads": 2}
    theirs = llama_tensors(2, **sizes)
    norms = {name: tensor for name, tensor in theirs.items() if "norm" in name}
    evidence = check("similarity.category", llama_tensors(1, **sizes) | norms, theirs)
    assert evidence.details["categories"]["norm"]["cosine"] == pytest.approx(1)
    assert evidence.outcome != CONTRADICTS
    assert "norm" in evidence.details["without_power"]


def test_norms_of_independent_models_lack_the_power_to_support(examples: Path, open_pair: Open, judged: Judged) -> None:
    """128 elements allow 0.44 by chance: they are named, and the verdict of the category rests on the others."""
    evidence = judged("similarity.category", open_pair(examples / "independent", examples / "base"))
    assert evidence.details["without_power"] == ["embedding", "norm", "output"]
    assert evidence.details["category"] != "norm"
    assert evidence.outcome == SUPPORTS


# The guard of methods.md, section 4: Solar-Open-100B and GLM-4.5-Air


def test_equal_raw_cosine_of_norms_never_accuses(llama_tensors: Llama, check: Test) -> None:
    """Norms of independent models: raw cosine 0.9999, centred near 0."""
    sizes = {"hidden_size": 1024, "num_hidden_layers": 2, "intermediate_size": 32, "vocab_size": 32, "head_dim": 16}
    models = []
    for seed in (1, 2):
        tensors = llama_tensors(seed, **sizes)
        models.append(
            {
                name: 1 + 0.01 * normal(seed * 100 + number, 1024) if "norm" in name else tensor
                for number, (name, tensor) in enumerate(tensors.items())
            }
        )
    evidence = check("similarity.category", *models)
    norms = evidence.details["categories"]["norm"]
    assert norms["raw_cosine"] > 0.999
    assert abs(norms["cosine"]) < 5 / math.sqrt(1024)
    assert evidence.outcome != CONTRADICTS
    for name in WHOLE:
        assert check(name, *models).outcome != CONTRADICTS


def test_norms_of_trained_independent_models_never_accuse(examples: Path, open_pair: Open, judged: Judged) -> None:
    for reference in ("base", "derived"):
        pair = open_pair(examples / "independent", examples / reference)
        norms = judged("similarity.category", pair).details["categories"]["norm"]
        assert norms["raw_cosine"] > 0.99
        assert abs(norms["cosine"]) < 5 / math.sqrt(128)
        assert all(judged(name, pair).outcome == innocent(name) for name in WHOLE)


def test_matrices_with_a_common_mean_never_accuse(llama_tensors: Llama, check: Test) -> None:
    models = [{name: tensor + 1 for name, tensor in llama_tensors(seed).items()} for seed in (1, 2)]
    for name in WHOLE:
        evidence = check(name, *models)
        assert evidence.outcome == innocent(name)
    assert check("similarity.mean", *models).details["raw_cosine"] > 0.99


ORDINARY: dict[str, Callable[[], Tensors]] = {
    "zeros": lambda: {f"model.layers.{n}.self_attn.sinks.weight": torch.zeros(64, 64) for n in range(3)},
    "ones": lambda: {f"model.layers.{n}.self_attn.scale.weight": torch.ones(64, 64) for n in range(3)},
    "causal masks": lambda: {
        f"model.layers.{n}.self_attn.causal_mask": torch.ones(1024, 1024).tril() for n in range(3)
    },
    "rotary frequencies": lambda: {"model.rotary_emb.inv_freq": 10000.0 ** -(torch.arange(0, 128, 2) / 128)},
    "rotary cache": lambda: {
        "model.rotary_emb.cos_cached": torch.outer(
            torch.arange(512.0), 10000.0 ** -(torch.arange(0, 128, 2) / 128)
        ).cos()
    },
    "fixed positions": lambda: {
        "model.embed_positions.weight": torch.outer(torch.arange(2048.0), 10000.0 ** -(torch.arange(0, 64) / 64)).sin()
    },
}


@pytest.mark.parametrize("kind", ORDINARY)
@pytest.mark.parametrize("name", WHOLE)
def test_tensors_that_any_model_could_have_do_not_accuse(
    kind: str, name: str, llama_tensors: Llama, check: Test
) -> None:
    extra = ORDINARY[kind]()
    assert check(name, llama_tensors(1) | extra, llama_tensors(2) | extra).outcome != CONTRADICTS


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", WHOLE)
def test_random_models_do_not_accuse(name: str, seed: int, llama_tensors: Llama, check: Test) -> None:
    assert check(name, llama_tensors(2 * seed), llama_tensors(2 * seed + 1)).outcome == innocent(name)


@pytest.mark.parametrize("name", WHOLE)
def test_shuffled_copy_of_an_independent_model_does_not_accuse(
    name: str, base: Tensors, independent: Tensors, check: Test
) -> None:
    generator = torch.Generator().manual_seed(1)
    shuffled = {
        key: tensor.flatten()[torch.randperm(tensor.numel(), generator=generator)].reshape(tensor.shape)
        for key, tensor in independent.items()
    }
    assert check(name, shuffled, base).outcome == innocent(name)


# Where there is no power


@pytest.mark.parametrize("name", ["similarity.mean", "similarity.early_layers"])
def test_small_part_in_common_is_inconclusive(name: str, llama_tensors: Llama, check: Test) -> None:
    """Only attention, a quarter of the weights, has a counterpart."""
    theirs = {key: tensor for key, tensor in llama_tensors(2).items() if ".mlp." not in key}
    evidence = check(name, llama_tensors(1), theirs)
    assert evidence.outcome == INCONCLUSIVE
    assert not evidence.powered
    assert "no power" in evidence.reason
    assert evidence.details["coverage"] == pytest.approx(12288 / (12288 + 3 * 64 * 176))


def test_layer_with_a_small_part_in_common_is_inconclusive(llama_tensors: Llama, check: Test) -> None:
    theirs = {key: tensor for key, tensor in llama_tensors(2).items() if ".mlp." not in key}
    assert check("similarity.layer", llama_tensors(1), theirs, layer=1).outcome == INCONCLUSIVE


@pytest.mark.parametrize("name", ["similarity.mean", "similarity.early_layers"])
def test_weights_without_a_layer_number_count_as_not_compared(name: str, llama_tensors: Llama, check: Test) -> None:
    """One numbered matrix has a counterpart; all other weights, 95 in 100, have names of another kind."""
    theirs = llama_tensors(2)
    ours = {key.replace("model.layers.", "decoder.block_"): tensor for key, tensor in llama_tensors(1).items()}
    key = "model.layers.0.self_attn.q_proj.weight"
    ours[key] = ours.pop(key.replace("model.layers.", "decoder.block_"))
    evidence = check(name, ours, theirs)
    assert evidence.outcome != SUPPORTS


def test_small_part_in_common_still_contradicts(llama_tensors: Llama, check: Test) -> None:
    theirs = {key: tensor for key, tensor in noisy(llama_tensors(1), 0.1).items() if ".mlp." not in key}
    assert check("similarity.mean", llama_tensors(1), theirs).outcome == CONTRADICTS


@pytest.mark.parametrize("name", [*WHOLE, "similarity.layer"])
def test_other_widths_are_not_applicable(name: str, llama_tensors: Llama, check: Test) -> None:
    arguments = {"layer": 0} if name == "similarity.layer" else {}
    theirs = llama_tensors(1, hidden_size=48, head_dim=12, intermediate_size=128)
    assert check(name, llama_tensors(1), theirs, **arguments).outcome == NOT_APPLICABLE


def test_other_vocabulary_is_not_evidence_of_scratch(llama_tensors: Llama, check: Test) -> None:
    evidence = check("similarity.embedding", llama_tensors(1), llama_tensors(2, vocab_size=300))
    assert evidence.outcome == NOT_APPLICABLE


def test_tiny_model_has_no_power(llama_tensors: Llama, check: Test) -> None:
    sizes = {
        "hidden_size": 4,
        "intermediate_size": 4,
        "num_hidden_layers": 1,
        "vocab_size": 8,
        "head_dim": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    for name in WHOLE:
        evidence = check(name, llama_tensors(3, **sizes), llama_tensors(4, **sizes))
        assert evidence.outcome == INCONCLUSIVE


@pytest.mark.parametrize("value", [0.0, 1.0, math.nan])
def test_weights_that_have_no_cosine_are_a_test_without_power(value: float, llama_tensors: Llama, check: Test) -> None:
    """They have a counterpart of equal name and shape: the question arises and cannot be decided."""
    filled = {name: torch.full_like(tensor, value) for name, tensor in llama_tensors(1).items()}
    evidence = check("similarity.mean", filled, llama_tensors(2))
    assert evidence.outcome == INCONCLUSIVE


def test_file_full_of_nan_does_not_accuse(llama_tensors: Llama, check: Test) -> None:
    """Two finite values in each tensor, rising in both models: a centred cosine of 1, of two elements."""
    ours, theirs = {}, {}
    for name, tensor in llama_tensors(1).items():
        ours[name] = torch.full_like(tensor, math.nan)
        ours[name].view(-1)[:2] = torch.tensor([0.1, 0.2])
        theirs[name] = tensor.clone()
        theirs[name].view(-1)[:2] = torch.tensor([0.3, 0.7])
    for name in WHOLE:
        assert check(name, ours, theirs).outcome != CONTRADICTS


def test_evidence_names_what_was_read(llama_tensors: Llama, check: Test) -> None:
    evidence = check("similarity.mean", llama_tensors(1), llama_tensors(2))
    assert evidence.read["candidate"]["name"] == "ours"
    assert len(evidence.read["reference"]["sha256"]) == 64
    assert set(evidence.details["per_layer"]) == {0, 1, 2}
    assert evidence.details["compared_tensors"] == 21
    assert evidence.documented is not None
