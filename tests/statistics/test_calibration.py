"""Are p-values of the exact tests uniform on trained weights that were renumbered at random?

The full measurement, with independently trained pairs, is benchmarks/calibration.py.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import kstest
from torch import Tensor

from checks.statistics.channels import channel_permutation_test
from checks.statistics.shape_pairing import ShapeSample, pair_by_shape, shape_sample
from checks.statistics.units import stouffer, unit_permutation_test

EXAMPLES = Path(__file__).parents[2] / "examples" / "checkpoints"
# A correct test falls below this once in a thousand sets of seeds; the seeds are fixed.
LEAST_P = 1e-3
LAYERS, COLUMNS = 4, 32


@cache
def mlps(name: str) -> list[list[Tensor]]:
    """Down, up and gate of each layer of an example model, neurons as rows, some columns of them."""
    tensors = load_file(EXAMPLES / name / "model.safetensors")
    start = "model.layers.{}.mlp.{}_proj.weight"
    whole = [
        [tensors[start.format(layer, "down")].T, *(tensors[start.format(layer, kind)] for kind in ("up", "gate"))]
        for layer in range(LAYERS)
    ]
    return [[view[:, :COLUMNS].double() for view in views] for views in whole]


def order(size: int, seed: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


def p_of_uniform(zs: list[float], alternative: str = "two-sided") -> float:
    """p of a Kolmogorov-Smirnov test of the two-sided p-values of z."""
    p = 2 * torch.special.ndtr(-torch.tensor(zs, dtype=torch.float64).abs())
    return float(kstest(p.numpy(), "uniform", alternative=alternative).pvalue)


def units_z(ours: list[list[Tensor]], theirs: list[list[Tensor]]) -> float:
    z = stouffer(unit_permutation_test(a, b).z for a, b in zip(ours, theirs, strict=True))
    assert z is not None
    return z


@pytest.mark.parametrize("name", ["base", "independent"])
def test_unit_tests_of_renumbered_neurons(name: str) -> None:
    zs = []
    for draw in range(200):
        changed = [
            [view[order(len(view), LAYERS * draw + layer)] for view in views] for layer, views in enumerate(mlps(name))
        ]
        zs.append(units_z(changed, mlps("base")))
    assert p_of_uniform(zs) > LEAST_P


def test_order_that_any_model_could_share_is_noticed() -> None:
    """What would break exchangeability: neurons of both models sorted by one weight. The test above sees it."""

    def ordered(name: str, column: int) -> list[list[Tensor]]:
        return [[view[views[2][:, column].argsort()] for view in views] for views in mlps(name)]

    independent = [units_z(ordered("independent", column), ordered("base", column)) for column in range(20)]
    assert p_of_uniform(independent) < LEAST_P


def test_channel_tests_of_renumbered_channels() -> None:
    views = [view[:64].T for layer in mlps("base") for view in layer]
    zs = [channel_permutation_test([view[order(COLUMNS, draw)] for view in views], views).z for draw in range(200)]
    assert p_of_uniform(zs) > LEAST_P


@cache
def samples(name: str) -> list[ShapeSample]:
    return [shape_sample(view) for views in mlps(name) for view in views]


def test_nameless_pairs_of_renumbered_models() -> None:
    """Each axis that was renumbered is uniform; the smaller z of both, and the strongest pair, may only be larger."""
    neurons, channels, smaller, strongest = [], [], [], []
    for draw in range(100):
        columns = order(COLUMNS, 1_000_000 + draw)
        changed = [
            shape_sample(view[order(len(view), 1000 * draw + layer)][:, columns])
            for layer, views in enumerate(mlps("base"))
            for view in views
        ]
        found = pair_by_shape(changed, samples("base"))
        assert found.tests == 3 * LAYERS
        # The shorter axis comes first.
        channels.append(found.pairs[0].z_rows)
        neurons.append(found.pairs[0].z_columns)
        smaller.append(found.pairs[0].z)
        strongest.append(found.log_p)
    assert p_of_uniform(channels) > LEAST_P
    assert p_of_uniform(neurons) > LEAST_P
    assert p_of_uniform(smaller, "greater") > LEAST_P
    corrected = torch.tensor(strongest, dtype=torch.float64).exp()
    assert kstest(corrected.numpy(), "uniform", alternative="greater").pvalue > LEAST_P
