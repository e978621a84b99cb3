"""Cosines of all tensors of two checkpoints, layers, categories and the whole: right sums, and which tensors meet."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from checks.checkpoint.checkpoint import Checkpoint
from checks.pair.comparison import Comparison, compare
from tests.pair.random_tensors import Tensors, mixtral, noisy, normal

Llama = Callable[..., Tensors]
Save = Callable[..., Path]
Compare = Callable[[Tensors, Tensors], Comparison]
LAYER = "model.layers.{}."
KERNEL_ERROR = 1e-6  # against float64, of a cosine
MATRICES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


@pytest.fixture
def compared(save_checkpoint: Save) -> Compare:
    """Compares two sets of tensors through files."""

    def run(ours: Tensors, theirs: Tensors) -> Comparison:
        return compare(Checkpoint(save_checkpoint("ours", ours)), Checkpoint(save_checkpoint("theirs", theirs)))

    return run


def pearson(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(np.corrcoef(a.double().numpy().ravel(), b.double().numpy().ravel())[0, 1])


# Sums


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cosines_agree_with_numpy_in_float64(dtype: torch.dtype, llama_tensors: Llama, compared: Compare) -> None:
    ours = llama_tensors(1, dtype)
    theirs = {name: tensor.to(dtype) for name, tensor in noisy(llama_tensors(1), 0.7).items()}
    comparison = compared(ours, theirs)
    assert {one.entry.name for one in comparison.compared} == set(ours)
    for one in comparison.compared:
        assert one.cosine == pytest.approx(pearson(ours[one.entry.name], theirs[one.entry.name]), abs=KERNEL_ERROR)
    for layer in range(3):
        names = [LAYER.format(layer) + matrix + ".weight" for matrix in MATRICES]
        sizes = [ours[name].numel() for name in names]
        expected = np.average([pearson(ours[name], theirs[name]) for name in names], weights=sizes)
        summary = comparison.layer(layer)
        assert summary.cosine == pytest.approx(expected, abs=KERNEL_ERROR)
        assert summary.elements == summary.candidate_elements == sum(sizes)
        assert summary.null_elements == sum(sizes) - 7  # centring takes one of each tensor
        assert summary.tensors == 7
        assert summary.coverage == 1
    mean = comparison.mean()
    assert mean.cosine == pytest.approx(np.mean([comparison.layer(layer).cosine for layer in range(3)]), abs=1e-12)
    assert comparison.layer_cosines() == {layer: comparison.layer(layer).cosine for layer in range(3)}


def test_mean_weighs_every_layer_the_same(compared: Compare) -> None:
    """A wide layer that is independent does not hide a narrow one that is equal."""
    ours = {"layers.0.attn.q.weight": normal(1, 8, 8), "layers.1.attn.q.weight": normal(2, 200, 200)}
    theirs = {
        "layers.0.attn.q.weight": ours["layers.0.attn.q.weight"] * 2,
        "layers.1.attn.q.weight": normal(3, 200, 200),
    }
    comparison = compared(ours, theirs)
    assert comparison.layer(0).cosine == pytest.approx(1)
    assert comparison.mean().cosine == pytest.approx(0.5, abs=0.02)


def test_null_elements_of_a_mean_of_unequal_layers_give_its_real_spread(compared: Compare) -> None:
    """The mean of layers of 40,000 and of 25 independent weights varies like the small one: 5/sqrt(n) must say so."""
    cosines, null_elements = [], 0
    for seed in range(60):
        ours = {"layers.0.attn.q.weight": normal(2 * seed, 5, 5), "layers.1.attn.q.weight": normal(777, 200, 200)}
        theirs = {
            "layers.0.attn.q.weight": normal(2 * seed + 1, 5, 5),
            "layers.1.attn.q.weight": normal(778, 200, 200),
        }
        mean = compared(ours, theirs).mean()
        assert mean.cosine is not None
        cosines.append(mean.cosine)
        null_elements = mean.null_elements
    assert np.std(cosines) < 2 / math.sqrt(null_elements)


def test_mean_over_some_layers(llama_tensors: Llama, compared: Compare) -> None:
    comparison = compared(
        llama_tensors(1), llama_tensors(1) | {"model.layers.0.mlp.up_proj.weight": normal(5, 176, 64)}
    )
    assert comparison.mean([1, 2]).cosine == pytest.approx(1)
    first = comparison.mean([0]).cosine
    assert first == comparison.layer(0).cosine
    assert first is not None
    assert first < 0.9


# Categories


def test_categories_hold_the_tensors_of_their_kind(llama_tensors: Llama, compared: Compare) -> None:
    ours = llama_tensors(1)
    comparison = compared(ours, llama_tensors(2))
    assert comparison.categories() == ["embedding", "attention", "mlp", "norm", "output"]
    assert comparison.category("embedding").elements == 256 * 64
    assert comparison.category("output").elements == 256 * 64
    assert comparison.category("attention").tensors == 12
    assert comparison.category("mlp").elements == 3 * 3 * 64 * 176
    assert comparison.category("router").cosine is None
    assert comparison.category("router").coverage == 0


def test_norms_are_pooled_and_count_as_one_vector(llama_tensors: Llama, compared: Compare) -> None:
    norms = compared(llama_tensors(1), llama_tensors(2)).category("norm")
    assert norms.tensors == 7
    assert norms.elements == 7 * 64
    assert norms.null_elements == 63  # centring takes one
    assert norms.raw_cosine is not None
    assert norms.raw_cosine > 0.99
    assert norms.cosine is not None
    assert abs(norms.cosine) < 5 / 8


def test_norms_take_part_in_no_layer(llama_tensors: Llama, compared: Compare) -> None:
    theirs = llama_tensors(2)
    theirs |= {name: tensor for name, tensor in llama_tensors(1).items() if "norm" in name}
    comparison = compared(llama_tensors(1), theirs)
    norms = comparison.category("norm").cosine
    assert norms == pytest.approx(1)
    assert all(abs(cosine or 1) < 0.05 for cosine in comparison.layer_cosines().values())


def test_rotary_norms_and_biases_never_decide(llama_tensors: Llama, compared: Compare) -> None:
    extra: Tensors = {}
    for layer in range(3):
        start = LAYER.format(layer) + "self_attn."
        extra |= {f"{start}{kind}_norm.weight": 1 + normal(layer, 16) for kind in "qk"}
        extra |= {f"{start}{kind}_proj.bias": normal(layer + 9, 64) for kind in "qkv"}
    comparison = compared(llama_tensors(1) | extra, llama_tensors(2) | extra)
    assert "bias" not in comparison.categories()
    assert comparison.category("bias").cosine is None
    assert comparison.category("norm").tensors == 7
    assert abs(comparison.category("norm").cosine or 1) < 5 / 8
    assert comparison.layer(0).tensors == 7


def test_tables_that_any_model_could_have_are_not_compared_as_weights(llama_tensors: Llama, compared: Compare) -> None:
    """Equal rotary tables and masks are listed as ordinary; as weights they would accuse independent models."""
    frequencies = 10000.0 ** -(torch.arange(0, 64, 2) / 64)
    tables = {"model.rotary_emb.inv_freq": frequencies}
    for layer in range(3):
        tables[f"model.layers.{layer}.self_attn.causal_mask"] = torch.ones(512, 512).tril()
    comparison = compared(llama_tensors(1) | tables, llama_tensors(2) | tables)
    assert set(comparison.ordinary) == set(tables)
    assert comparison.identical == ()
    assert abs(comparison.mean().cosine or 1) < 0.1
    for category in comparison.categories():
        summary = comparison.category(category)
        assert summary.cosine is None or summary.cosine < 5 / math.sqrt(summary.null_elements)


def test_rotary_tables_of_different_bases_are_not_compared_as_weights(llama_tensors: Llama, compared: Compare) -> None:
    """No byte of them is equal, and yet all falling tables resemble each other."""
    name = "model.rotary_emb.inv_freq"
    ours = llama_tensors(1) | {name: 10000.0 ** -(torch.arange(0, 128, 2) / 128)}
    theirs = llama_tensors(2) | {name: 500000.0 ** -(torch.arange(0, 128, 2) / 128)}
    comparison = compared(ours, theirs)
    assert abs(comparison.category("other").cosine or 0) < 0.9


# Tensors whose index may have a meaning


def mamba(seed: int, states: int = 16) -> Tensors:
    """Trained A_log, in every row the logarithms of 1 to `states` and a little noise; decays; the rest is random."""
    tensors: Tensors = {}
    for layer in range(2):
        start, at = f"backbone.layers.{layer}.mixer.", 100 * seed + 10 * layer
        tensors[start + "A_log"] = torch.arange(1.0, states + 1).log() + 0.05 * normal(at, 256, states)
        tensors[start + "in_proj.weight"] = normal(at + 1, 256, 64)
        tensors[start + "attention.time_decay"] = torch.linspace(-6, 3, 4096).reshape(1, 1, -1) + 0.1 * normal(
            at + 2, 4096
        )
    return tensors


def test_structured_initialisation_decides_nothing(compared: Compare) -> None:
    ours, theirs = mamba(1), mamba(2)
    name = "backbone.layers.0.mixer.A_log"
    assert pearson(ours[name], theirs[name]) > 0.99
    comparison = compared(ours, theirs)
    # The candidate's other matrices need have no counterpart.
    alone = compared(ours, {name: tensor for name, tensor in theirs.items() if "in_proj" not in name})
    assert alone.mean().cosine is alone.category("other").cosine is alone.category("attention").cosine is None
    assert alone.mean().strongest is None
    assert alone.mean().coverage == 0
    assert alone.layer(0).counterparts == 2
    for summary in (comparison.mean(), comparison.layer(1), comparison.mean([0]), comparison.category("other")):
        assert abs(summary.cosine or 1) < 0.1
        assert summary.strongest is not None
        assert "in_proj" in summary.strongest[0]
        assert abs(summary.strongest[1]) < 0.1
    assert sorted(comparison.undecided) == sorted(name for name in ours if "in_proj" not in name)
    assert "shorter than 32" in comparison.undecided[name]


def test_a_copied_matrix_of_a_known_role_stands_out_however_short(compared: Compare) -> None:
    """A router of few experts; and a stack of few matrices under an unknown name, whose matrices are large."""
    ours, theirs = mixtral(1, width=1024, wide=8, layers=1), mixtral(2, width=1024, wide=8, layers=1)
    router = "model.layers.0.block_sparse_moe.gate.weight"
    theirs[router] = ours[router] + 0.0001 * normal(5, 3, 1024)
    assert (compared(ours, theirs).layer(0).strongest or ("",))[0] == router
    stack = {"layers.0.stack": normal(3, 4, 40, 50), "layers.0.table": normal(4, 400, 12)}
    found = compared(stack, {name: 2 * tensor for name, tensor in stack.items()})
    assert (found.layer(0).strongest or ("",))[0] == "layers.0.stack"
    assert list(found.undecided) == ["layers.0.table"]


def test_mixture_has_router_and_expert_categories(compared: Compare) -> None:
    comparison = compared(mixtral(1), mixtral(2))
    assert comparison.categories() == ["embedding", "attention", "router", "routed expert"]
    assert comparison.category("router").elements == 2 * 3 * 32
    assert comparison.category("routed expert").tensors == 18


# Which tensors meet


def test_coverage_counts_the_candidates_parameters(llama_tensors: Llama, compared: Compare) -> None:
    theirs = {name: tensor for name, tensor in llama_tensors(2).items() if "mlp" not in name}
    comparison = compared(llama_tensors(1), theirs)
    attention, mlp = 64 * 64 * 2 + 2 * 32 * 64, 3 * 64 * 176
    assert comparison.layer(0).coverage == pytest.approx(attention / (attention + mlp))
    assert comparison.mean().coverage == pytest.approx(attention / (attention + mlp))
    assert comparison.category("mlp").coverage == 0
    assert comparison.category("mlp").cosine is None


def test_candidate_deeper_than_its_reference(llama_tensors: Llama, compared: Compare) -> None:
    comparison = compared(llama_tensors(1, num_hidden_layers=4), llama_tensors(2, num_hidden_layers=1))
    assert comparison.layers() == [0, 1, 2, 3]
    cosines = comparison.layer_cosines()
    assert cosines[0] is not None
    assert cosines[1] is cosines[2] is cosines[3] is None
    assert comparison.mean().coverage == pytest.approx(0.25)
    assert comparison.mean().cosine == cosines[0]


def test_reference_deeper_than_the_candidate(llama_tensors: Llama, compared: Compare) -> None:
    comparison = compared(llama_tensors(1, num_hidden_layers=1), llama_tensors(2, num_hidden_layers=4))
    assert comparison.layers() == [0]
    assert comparison.mean().coverage == 1


def test_different_widths_leave_nothing_to_compare(llama_tensors: Llama, compared: Compare) -> None:
    theirs = llama_tensors(1, hidden_size=48, head_dim=12, intermediate_size=128)
    comparison = compared(llama_tensors(1), theirs)
    assert comparison.compared == ()
    mean = comparison.mean()
    assert (mean.cosine, mean.raw_cosine, mean.elements, mean.coverage, mean.null_elements) == (None, None, 0, 0.0, 0)
    assert comparison.identical == ()


def test_names_without_layer_numbers_are_one_block(compared: Compare) -> None:
    ours = {"alpha": normal(1, 60, 40), "beta": normal(2, 40, 40), "gain": normal(3, 40)}
    comparison = compared(ours, {"alpha": ours["alpha"], "beta": normal(5, 40, 40), "gain": ours["gain"]})
    assert comparison.layers() == [0]
    block = comparison.layer(0)
    assert block.tensors == 2
    assert block.elements == 4000
    assert block.cosine == pytest.approx((2400 + 1600 * pearson(ours["beta"], normal(5, 40, 40))) / 4000)


def test_model_of_one_layer(llama_tensors: Llama, compared: Compare) -> None:
    comparison = compared(llama_tensors(1, num_hidden_layers=1), noisy(llama_tensors(1, num_hidden_layers=1), 0.1))
    assert comparison.layers() == [0]
    assert comparison.mean().cosine == comparison.layer(0).cosine
    assert (comparison.mean().cosine or 0) > 0.98


def test_tied_embeddings_leave_the_output_out(llama_tensors: Llama, compared: Compare) -> None:
    tied = {name: tensor for name, tensor in llama_tensors(1).items() if name != "lm_head.weight"}
    comparison = compared(tied, llama_tensors(2))
    assert "output" not in comparison.categories()
    assert comparison.category("embedding").coverage == 1
    turned = compared(llama_tensors(1), {n: t for n, t in llama_tensors(2).items() if n != "lm_head.weight"})
    assert turned.category("output").coverage == 0


def test_integers_and_scaled_floats_are_hashed_and_not_compared(compared: Compare) -> None:
    ours = {
        "layers.0.mlp.up_proj.weight": normal(1, 16, 16).to(torch.float8_e4m3fn),
        "layers.0.mlp.down_proj.weight": torch.arange(256, dtype=torch.int32).reshape(16, 16) * 7919 % 1009,
        "layers.0.self_attn.q_proj.weight": normal(2, 16, 16),
    }
    comparison = compared(ours, ours)
    assert [one.entry.name for one in comparison.compared] == ["layers.0.self_attn.q_proj.weight"]
    assert {name for name, _ in comparison.identical} == set(ours)
    # Eight 4-bit weights may be packed in each 32-bit integer.
    assert comparison.layer(0).coverage == pytest.approx(256 / (256 + 8 * 256 + 256))


# Undefined values


def test_nonfinite_weights_are_counted_and_leave_the_rest_defined(llama_tensors: Llama, compared: Compare) -> None:
    ours, theirs = llama_tensors(1), noisy(llama_tensors(1), 0.1)
    ours["model.layers.0.mlp.up_proj.weight"][0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    theirs["model.layers.0.mlp.up_proj.weight"][0, 2:4] = math.nan
    comparison = compared(ours, theirs)
    assert comparison.nonfinite == {"model.layers.0.mlp.up_proj.weight": 4}
    assert (comparison.layer(0).cosine or 0) > 0.98


def test_only_finite_elements_count_as_compared(compared: Compare) -> None:
    """Two finite values always have a centred cosine of 1 or -1: a NaN-filled file must not count as 4,096 weights."""
    ours = {"layers.0.mlp.up_proj.weight": torch.full((64, 64), math.nan)}
    theirs = {"layers.0.mlp.up_proj.weight": normal(1, 64, 64)}
    theirs["layers.0.mlp.up_proj.weight"][0, :2] = torch.tensor([0.3, 0.5])
    ours["layers.0.mlp.up_proj.weight"][0, :2] = torch.tensor([0.1, 0.2])
    comparison = compared(ours, theirs)
    block = comparison.layer(0)
    assert block.cosine == pytest.approx(1)
    assert comparison.nonfinite == {"layers.0.mlp.up_proj.weight": 4094}
    assert block.null_elements == 1
    assert block.coverage == pytest.approx(2 / 4096)


@pytest.mark.parametrize("value", [0.0, 1.0, -3.25, math.nan, math.inf])
def test_constant_and_undefined_tensors_have_no_cosine(value: float, llama_tensors: Llama, compared: Compare) -> None:
    ours = llama_tensors(1)
    filled = {name: torch.full_like(tensor, value) for name, tensor in ours.items()}
    comparison = compared(filled, ours)
    assert comparison.mean().cosine is None
    assert comparison.mean().coverage == 0
    assert all(comparison.category(category).cosine is None for category in comparison.categories())


def test_constant_tensor_does_not_hide_the_others_of_its_layer(llama_tensors: Llama, compared: Compare) -> None:
    ours = llama_tensors(1)
    ours["model.layers.1.self_attn.q_proj.weight"] = torch.zeros(64, 64)
    layer = compared(ours, llama_tensors(1)).layer(1)
    assert layer.cosine == pytest.approx(1)
    assert layer.tensors == 6
    assert layer.coverage < 1


def test_empty_and_scalar_tensors_are_harmless(compared: Compare) -> None:
    tensors = {"layers.0.empty.weight": torch.zeros(0, 4), "layers.0.scale": torch.tensor(2.0)}
    comparison = compared(tensors, tensors)
    assert comparison.identical == ()
    assert set(comparison.ordinary) == set(tensors)
    assert comparison.mean().cosine is None


# Equal tensors


def test_equal_tensors_are_found_under_any_name(llama_tensors: Llama, compared: Compare) -> None:
    ours, theirs = llama_tensors(1), llama_tensors(2)
    ours["model.layers.2.mlp.up_proj.weight"] = theirs["model.layers.0.mlp.gate_proj.weight"]
    ours["lm_head.weight"] = theirs["lm_head.weight"]
    assert compared(ours, theirs).identical == (
        ("lm_head.weight", "lm_head.weight"),
        ("model.layers.2.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight"),
    )


def test_equal_bytes_of_another_dtype_are_not_equal_tensors(compared: Compare) -> None:
    """Float zeros and integer zeros have the same bytes, and no meaning in common."""
    weights = normal(1, 64)
    assert compared({"a": weights}, {"b": weights.view(torch.int32)}).identical == ()
    assert compared({"a": weights}, {"b": weights.reshape(8, 8)}).identical == (("a", "b"),)
