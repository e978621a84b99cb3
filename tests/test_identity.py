from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checks.evidence.record import CONTRADICTS, DISCLOSED, INCONCLUSIVE, NOT_APPLICABLE, SUPPORTS, Evidence
from checks.pair.pair import Pair

Tensors = dict[str, torch.Tensor]
Llama = Callable[..., Tensors]
Save = Callable[..., Path]
Open = Callable[..., Pair]
Judged = Callable[..., Evidence]
Test = Callable[..., Evidence]


@pytest.fixture
def sha256(save_checkpoint: Save, open_pair: Open, judged: Judged) -> Test:
    """The evidence of identity.sha256 on two sets of tensors."""

    def run(ours: Tensors, theirs: Tensors, **arguments: bool) -> Evidence:
        pair = open_pair(save_checkpoint("ours", ours), save_checkpoint("theirs", theirs))
        return judged("identity.sha256", pair, **arguments)

    return run


def test_trained_models_hold_no_equal_tensors(examples: Path, open_pair: Open, judged: Judged) -> None:
    """Not even the fine-tuned one: a count of zero proves nothing, and no verdict may rest on it."""
    for ours, theirs in (("independent", "base"), ("independent", "derived"), ("derived", "base")):
        evidence = judged("identity.sha256", open_pair(examples / ours, examples / theirs))
        assert evidence.outcome == SUPPORTS
        assert evidence.value == 0
        assert evidence.details["tensors"] == []
        assert evidence.details["candidate_tensors"] == 39


def test_copy_contradicts_with_every_tensor(examples: Path, open_pair: Open, judged: Judged) -> None:
    evidence = judged("identity.sha256", open_pair(examples / "base", examples / "base"))
    assert evidence.outcome == CONTRADICTS
    assert evidence.value == 39


def test_renamed_copy_contradicts(examples: Path, sha256: Test) -> None:
    base = load_file(examples / "base" / "model.safetensors")
    renamed = {f"weights.{number}": tensor for number, tensor in enumerate(reversed(base.values()))}
    evidence = sha256(renamed, base)
    assert evidence.outcome == CONTRADICTS
    assert evidence.value == 39
    assert "weights.38 = lm_head.weight" in evidence.details["tensors"]


def test_resharded_copy_contradicts(examples: Path, save_checkpoint: Save, open_pair: Open, judged: Judged) -> None:
    sharded = save_checkpoint("sharded", load_file(examples / "base" / "model.safetensors"), shards=4)
    assert judged("identity.sha256", open_pair(sharded, examples / "base")).value == 39


def test_reshaped_copy_contradicts(llama_tensors: Llama, sha256: Test) -> None:
    theirs = llama_tensors(1)
    assert sha256({name: tensor.reshape(-1, 4) for name, tensor in theirs.items()}, theirs).value == len(theirs)


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "model.layers.0.input_layernorm.weight"]
)
def test_one_copied_tensor_contradicts_and_is_named(name: str, examples: Path, sha256: Test) -> None:
    base = load_file(examples / "base" / "model.safetensors")
    evidence = sha256(load_file(examples / "independent" / "model.safetensors") | {name: base[name]}, base)
    assert evidence.outcome == CONTRADICTS
    assert evidence.value == 1
    assert evidence.details["tensors"] == [name]


def test_copied_layer_under_another_number_contradicts(llama_tensors: Llama, sha256: Test) -> None:
    ours, theirs = llama_tensors(1), llama_tensors(2)
    for name in list(ours):
        if ".layers.0." in name:
            ours[name] = theirs[name.replace(".layers.0.", ".layers.2.")]
    evidence = sha256(ours, theirs)
    assert evidence.value == 9
    assert any(" = model.layers.2." in pair for pair in evidence.details["tensors"])


def test_disclosed_copy_is_disclosed(llama_tensors: Llama, sha256: Test) -> None:
    assert sha256(llama_tensors(1), llama_tensors(1), disclosed=True).outcome == DISCLOSED
    assert sha256(llama_tensors(1), llama_tensors(2), disclosed=True).outcome == SUPPORTS


@pytest.mark.parametrize(
    "change",
    [
        lambda tensor: tensor.double(),
        lambda tensor: tensor * (1 + 1e-6),
        lambda tensor: tensor.flip(0),
    ],
    ids=["cast", "one rounding", "another order"],
)
def test_changed_bytes_are_the_stated_limit(
    change: Callable[[torch.Tensor], torch.Tensor], llama_tensors: Llama, sha256: Test
) -> None:
    theirs = llama_tensors(1)
    assert sha256({name: change(tensor) for name, tensor in theirs.items()}, theirs).value == 0


frequencies = 10000.0 ** -(torch.arange(0, 64, 2) / 64)
angles = torch.outer(torch.arange(128.0), frequencies)
ORDINARY: Tensors = {
    "zeros": torch.zeros(64, 64),
    "ones": torch.ones(256, dtype=torch.bfloat16),
    "unit norm": torch.full((4096,), 1.0),
    "empty": torch.zeros(0),
    "scalar": torch.tensor(3.5),
    "mask": torch.ones(128, 128).tril(),
    "additive mask": torch.full((128, 128), -math.inf).triu(1),
    "boolean mask": torch.ones(128, 128, dtype=torch.bool).tril(),
    "rotary frequencies": frequencies,
    "rotary cache": angles.cos(),
    "rotary cache in bfloat16": angles.sin().to(torch.bfloat16),
    "positions": torch.arange(512),
    "slopes": 2.0 ** -torch.arange(1, 33),
    "not a number": torch.full((64,), math.nan),
    "eight-bit zeros": torch.zeros(64, dtype=torch.int8),
}


@pytest.mark.parametrize("kind", ORDINARY)
def test_tensor_that_any_model_could_have_is_listed_and_does_not_count(
    kind: str, llama_tensors: Llama, sha256: Test
) -> None:
    evidence = sha256(llama_tensors(1) | {"buffer": ORDINARY[kind]}, llama_tensors(2) | {"other": ORDINARY[kind]})
    assert evidence.outcome == SUPPORTS
    assert evidence.value == 0
    assert list(evidence.details["ordinary"]) == ["buffer"]


def test_trained_tensor_called_a_buffer_counts(llama_tensors: Llama, sha256: Test) -> None:
    """Names can lie: what is ordinary is judged by content."""
    theirs = llama_tensors(2)
    evidence = sha256(llama_tensors(1) | {"rotary_emb.inv_freq": theirs["lm_head.weight"]}, theirs)
    assert evidence.outcome == CONTRADICTS
    assert evidence.value == 1


def test_untrained_norms_do_not_accuse(llama_tensors: Llama, sha256: Test) -> None:
    """Norms that still are ones in both models, as after a few steps at bfloat16."""
    models = [
        {
            name: torch.ones_like(tensor, dtype=torch.bfloat16) if "norm" in name else tensor
            for name, tensor in llama_tensors(seed).items()
        }
        for seed in (1, 2)
    ]
    evidence = sha256(*models)
    assert evidence.outcome == SUPPORTS
    assert len(evidence.details["ordinary"]) == 7


def test_packed_weights_are_compared_by_their_bytes(llama_tensors: Llama, sha256: Test) -> None:
    packed = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in llama_tensors(1).items()}
    assert sha256(packed, packed).outcome == CONTRADICTS
    other = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in llama_tensors(2).items()}
    assert sha256(packed, other).outcome == SUPPORTS


@pytest.mark.parametrize("seed", range(5))
def test_random_models_do_not_accuse(seed: int, llama_tensors: Llama, sha256: Test) -> None:
    evidence = sha256(
        llama_tensors(2 * seed, torch.bfloat16, hidden_size=32, head_dim=8),
        llama_tensors(2 * seed + 1, torch.bfloat16, hidden_size=32, head_dim=8),
    )
    assert evidence.outcome == SUPPORTS
    assert evidence.value == 0


# Nearly equal tensors


def test_nearly_equal_numbers(examples: Path, open_pair: Open, judged: Judged, save_checkpoint: Save) -> None:
    base = load_file(examples / "base" / "model.safetensors")
    generator = torch.Generator().manual_seed(2)
    touched = {
        name: tensor.float() + 0.02 * tensor.float().std() * torch.randn(tensor.shape, generator=generator)
        for name, tensor in base.items()
    }
    near = open_pair(save_checkpoint("touched", touched), examples / "base")
    independent = open_pair(examples / "independent", examples / "base")
    derived = open_pair(examples / "derived", examples / "base")
    for check in ("mse", "sketch"):
        assert judged(f"identity.{check}", independent).outcome == SUPPORTS
        assert judged(f"identity.{check}", near).outcome == CONTRADICTS
        # Trained on for long: alike and not nearly equal.
        assert judged(f"identity.{check}", derived).outcome == INCONCLUSIVE


def test_sketches_ignore_names_and_mean_squares_need_them(
    examples: Path, open_pair: Open, judged: Judged, save_checkpoint: Save
) -> None:
    base = load_file(examples / "base" / "model.safetensors")
    renamed = {f"weights.{number}": tensor.float() * 1.001 for number, tensor in enumerate(base.values())}
    pair = open_pair(save_checkpoint("renamed", renamed), examples / "base")
    assert judged("identity.mse", pair).outcome == NOT_APPLICABLE
    assert judged("identity.sketch", pair).outcome == CONTRADICTS


def test_small_weights_of_unrelated_models_are_not_nearly_equal(
    llama_tensors: Llama, open_pair: Open, judged: Judged, save_checkpoint: Save
) -> None:
    """Their mean squared difference lies below the documented 1e-5, which says nothing but that they are small."""
    ours, theirs = ({name: 0.01 * tensor for name, tensor in llama_tensors(seed).items()} for seed in (1, 2))
    evidence = judged("identity.mse", open_pair(save_checkpoint("ours", ours), save_checkpoint("theirs", theirs)))
    assert evidence.outcome == SUPPORTS
    assert evidence.details["tensors_below_the_documented_bound"] == evidence.details["compared_tensors"]


def test_structured_initialisation_does_not_accuse(
    llama_tensors: Llama, open_pair: Open, judged: Judged, save_checkpoint: Save
) -> None:
    """Two Mamba-like models trained apart: the logarithms of 1 to 16 in every row of A_log, and a little noise."""
    models = []
    for seed in (1, 2):
        generator = torch.Generator().manual_seed(seed)
        noise = 0.05 * torch.randn(2, 512, 16, generator=generator)
        states = {f"model.layers.{i}.mamba.A_log": torch.arange(1.0, 17).log() + noise[i] for i in range(2)}
        models.append(llama_tensors(seed) | states)
    pair = open_pair(save_checkpoint("ours", models[0]), save_checkpoint("theirs", models[1]))
    for check in (
        "identity.sketch",
        "identity.mse",
        "similarity.mean",
        "similarity.early_layers",
        "similarity.category",
    ):
        assert judged(check, pair).outcome == SUPPORTS, check
    assert judged("similarity.layer", pair, layer=0).outcome == SUPPORTS
    listed = judged("identity.sketch", pair).details["undecided"]
    assert list(listed) == ["model.layers.0.mamba.A_log", "model.layers.1.mamba.A_log"]
    assert set(judged("identity.mse", pair).details["undecided"]) == set(listed)
    only = [save_checkpoint(f"only{i}", {n: t for n, t in one.items() if "A_log" in n}) for i, one in enumerate(models)]
    for check in ("identity.sketch", "identity.mse"):
        assert judged(check, open_pair(*only)).outcome == NOT_APPLICABLE
    # Equal bytes are no coincidence, whatever the shape.
    assert judged("identity.sha256", open_pair(only[0], only[0])).outcome == CONTRADICTS
