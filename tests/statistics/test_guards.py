"""What any two models share must accuse neither: masks, zeros, ones, rotary tables, norms near one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from checks.statistics.channels import ChannelProducts
from checks.statistics.elementwise import elementwise_sums
from checks.statistics.magnitude import robust_cosine
from checks.statistics.ordinary import ordinary_reason
from checks.statistics.shape_pairing import pair_by_shape, shape_sample
from checks.statistics.sketch import compare_sketches, sketch

WIDTH = 4096


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotary_table() -> Tensor:
    angles = torch.arange(512)[:, None] * (10_000.0 ** (-torch.arange(0, 64, 2) / 64))[None]
    return torch.cat([angles.cos(), angles.cos()], 1)


SHARED = {
    "mask": torch.ones(128, 128).tril(),
    "zero biases": torch.zeros(WIDTH),
    "norms of ones": torch.ones(WIDTH),
    "rotary table": rotary_table(),
    "rotary frequencies": 10_000.0 ** (-torch.arange(0, 512, 2) / 512),
}


@pytest.mark.parametrize("name", SHARED)
def test_tensors_that_any_model_could_have_are_excluded(name: str) -> None:
    """Their two copies are equal to the bit: that they never accuse rests on being left out."""
    assert ordinary_reason(SHARED[name]) is not None


@pytest.mark.parametrize("name", ["zero biases", "norms of ones"])
def test_constants_have_no_direction_in_any_statistic(name: str) -> None:
    tensor = SHARED[name]
    assert robust_cosine(tensor, tensor.clone()).spearman is None
    assert elementwise_sums(tensor, tensor.clone()).centred_cosine is None
    assert sketch(tensor).minhash is None
    assert shape_sample(tensor).reason == "constant or non-finite"
    products = ChannelProducts(WIDTH)
    products.add_gains([tensor], [tensor])
    assert products.test().z is None


def test_two_vectors_near_one() -> None:
    """N(1, .01²) in R⁴⁰⁹⁶: raw cosine .9999, and nothing in common."""
    a, b = (1 + 0.01 * normal(seed, WIDTH) for seed in (1, 2))
    sums = elementwise_sums(a, b)
    assert sums.cosine > 0.9998
    assert abs(sums.centred_cosine) < 5 / 64
    found = robust_cosine(a, b)
    assert abs(found.spearman) < 5 * found.null_sd
    assert compare_sketches(sketch(a), sketch(b)).jaccard < 0.2
    assert pair_by_shape([shape_sample(a)], [shape_sample(b)]).log_p is None


# Reported in January 2026 for RMSNorm weights of Solar-Open-100B and GLM-4.5-Air, layers of 4096: raw cosine of input
# norms .127 at layer 0, .342 at layer 1, about .989 in the layers that were published; post-attention norms .986.
REPORTED_INPUT = [0.127, 0.342, *[0.989] * 10]
REPORTED_POST = [0.986] * 12


def norms(seed: int, cosines: list[float]) -> list[Tensor]:
    """Gains of a model's layers: mean 1, the spread that gives the reported cosine, half of it shared by all layers."""
    own = normal(seed, WIDTH)
    return [
        1 + math.sqrt(1 / cosine - 1) * (own + normal(seed + 1 + layer, WIDTH)) / math.sqrt(2)
        for layer, cosine in enumerate(cosines)
    ]


@pytest.mark.parametrize("cosines", [REPORTED_INPUT, REPORTED_POST])
def test_the_public_norm_case(cosines: list[float]) -> None:
    solar, glm = norms(1000, cosines), norms(2000, cosines)
    pairs = [elementwise_sums(a, b) for a, b in zip(solar, glm, strict=True)]
    raw = [one.cosine for one in pairs]
    assert raw == pytest.approx(cosines, abs=0.06)
    centred = [one.centred_cosine for one in pairs]
    assert max(abs(cosine) for cosine in centred) < 5 / 64
    products = ChannelProducts(WIDTH)
    products.add_gains(solar, glm)
    assert abs(products.test().z) < 4
    assert max(abs(robust_cosine(a, b).spearman) for a, b in zip(solar, glm, strict=True)) < 5 / 64
    sketches = [[sketch(one) for one in side] for side in (solar[:4], glm[:4])]
    assert max(compare_sketches(a, b).jaccard for a, b in zip(*sketches, strict=True)) < 0.25

    # A true derivative of the same norms (the same public record: Pearson about 1).
    derived = ChannelProducts(WIDTH)
    spread = [0.1 * float(one.std()) for one in glm]
    derived.add_gains(glm, [one + s * normal(i, WIDTH) for i, (one, s) in enumerate(zip(glm, spread, strict=True))])
    assert derived.test().z > 30
