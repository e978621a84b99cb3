from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from checks.statistics import channels
from checks.statistics.channels import ChannelProducts, channel_permutation_test
from checks.statistics.units import unit_permutation_test


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def order(size: int, seed: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))


def rotation(d: int, seed: int) -> Tensor:
    """Uniform among the orthogonal matrices."""
    factor, upper = torch.linalg.qr(normal(seed, d, d))
    return factor * upper.diagonal().sign()


def canonical(views: list[Tensor]) -> Tensor:
    """Row-normalised, concatenated and centred views, written out."""
    whole = torch.cat([torch.nn.functional.normalize(view.double(), dim=1) for view in views], 1)
    return whole - whole.mean(0)


def trained(seed: int, d: int = 64) -> list[Tensor]:
    """Views with outlier channels, a shared low-rank structure and one mean direction, as trained models have."""
    outliers = normal(seed, d, 1).abs() ** 3 + 0.1
    return [
        outliers * (normal(seed + 7 * i, d, 48) + normal(seed + 90 + i, d, 2) @ normal(i, 2, 48)) + 0.2
        for i in range(4)
    ]


@given(d=st.integers(2, 6), seed=st.integers(0, 999), widths=st.lists(st.integers(2, 5), min_size=1, max_size=3))
@settings(deadline=None, max_examples=30)
def test_moments_are_exact_over_all_permutations(d: int, seed: int, widths: list[int]) -> None:
    a = [normal(seed + i, d, n) for i, n in enumerate(widths)]
    b = [normal(seed + 1000 + i, d, n) for i, n in enumerate(widths)]
    test = channel_permutation_test(a, b)
    products = canonical(a) @ canonical(b).T
    rows = torch.arange(d)
    sums = torch.stack([products[rows, list(one)].sum() for one in itertools.permutations(range(d))])
    assert abs(float(sums.mean())) < 1e-12
    assert test.z == pytest.approx(float(sums[0] / sums.square().mean().sqrt()), rel=1e-4, abs=1e-4)
    assert test.channels == d


@given(seed=st.integers(0, 999))
@settings(deadline=None, max_examples=20)
def test_agrees_with_the_unit_test_of_the_same_views(seed: int) -> None:
    """Of views without a mean row, which the unit test takes out before it scales rows, and this one after."""
    half = [normal(seed + i, 12, n) for i, n in enumerate((40, 7))]
    a = [torch.cat([view, -view]) for view in half]
    b = [torch.cat([one, -one]) for one in (view + normal(seed + 100 + i, *view.shape) for i, view in enumerate(half))]
    one, other = channel_permutation_test(a, b), unit_permutation_test(a, b)
    assert one.z == pytest.approx(other.z, rel=1e-5)
    assert one.effect == pytest.approx(other.effect, rel=1e-5)
    assert one.z == pytest.approx(one.scale * one.effect, rel=1e-9)


def test_null_of_models_with_structure() -> None:
    """Independent models, and models whose channels were permuted: z is standard normal."""
    scores = [channel_permutation_test(trained(1000 * s), trained(1000 * s + 500)).z for s in range(150)]
    a = trained(77)
    scores += [channel_permutation_test(a, [view[order(64, s)] for view in a]).z for s in range(150)]
    values = torch.tensor(scores)
    assert abs(float(values.mean())) < 4 / math.sqrt(300)
    assert 0.85 < float(values.std()) < 1.15
    assert float(values.abs().max()) < 4.5


def test_rotated_models_have_an_ordinary_z() -> None:
    a = trained(5)
    scores: list[float] = []
    for seed in range(100):
        products = ChannelProducts(64)
        for view in a:
            products.add(view, rotation(64, seed) @ view)
        # A rotation leaves norms of ones, and folds the gains into the readers.
        products.add_gains([1 + 0.1 * normal(seed, 64)], [torch.ones(64, dtype=torch.float64)])
        scores.append(products.test().z)
    assert max(abs(score) for score in scores) < 4
    assert abs(sum(scores) / 100) < 0.4
    assert 0.8 < float(torch.tensor(scores).std()) < 1.3
    # The orthogonal factor of a QR decomposition as it stands leans towards -1: such a rotation hides less.
    leaning = [
        channel_permutation_test(a, [torch.linalg.qr(normal(seed, 64, 64)).Q @ view for view in a]).z
        for seed in range(50)
    ]
    assert sum(leaning) / 50 < -1


def test_power_and_sampled_tail() -> None:
    a = trained(1)
    b = [view + 4 * view.std(1, keepdim=True) * normal(50 + i, *view.shape) for i, view in enumerate(a)]
    test = channel_permutation_test(a, b, permutations=500, seed=3)
    assert test.z > 8
    assert 0.1 < test.effect < 0.5
    assert 2 < test.largest_sampled < 5
    assert (test.permutations, test.seed) == (500, 3)
    assert channel_permutation_test(a, a).effect == pytest.approx(1, abs=1e-6)
    again = channel_permutation_test(a, b, permutations=500, seed=3)
    assert again == test


@given(seed=st.integers(0, 999))
@settings(deadline=None, max_examples=15)
def test_invariances(seed: int) -> None:
    a, b = trained(seed, 32), trained(seed + 1, 32)
    b = [x + 2 * y for x, y in zip(a, b, strict=True)]
    plain = channel_permutation_test(a, b)
    pi = order(32, seed)
    for left, right in (
        ([view[pi] for view in a], [view[pi] for view in b]),
        (b, a),
        ([3e-30 * view for view in a], [view * normal(9, 32, 1).exp() for view in b]),
        ([view[:, order(48, 3)] for view in a], [view[:, order(48, 3)] for view in b]),
        (a[::-1], b[::-1]),
    ):
        assert channel_permutation_test(left, right).z == pytest.approx(plain.z, rel=1e-3)
    assert channel_permutation_test(a, [-view for view in b]).z == pytest.approx(-plain.z, rel=1e-3)


def test_merging_and_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = trained(1), trained(2)
    whole = channel_permutation_test(a, b)
    monkeypatch.setattr(channels, "COLUMN_BLOCK", 5)
    first, second = ChannelProducts(64), ChannelProducts(64)
    for number, (left, right) in enumerate(zip(a, b, strict=True)):
        (first if number < 2 else second).add(left.to(torch.float32), right.to(torch.float32))
    first.merge(second)
    assert first.test().z == pytest.approx(whole.z, abs=1e-4)
    assert (first.views, first.columns) == (whole.views, whole.columns) == (4, 192)
    with pytest.raises(ValueError, match="cannot merge"):
        first.merge(ChannelProducts(63))


def test_norms_of_ones_and_zero_biases_tell_nothing() -> None:
    products = ChannelProducts(64)
    for constant in (torch.ones(64), torch.zeros(64)):
        products.add_gains([constant], [constant])
        products.add(constant[:, None].expand(64, 9), constant[:, None].expand(64, 9))
    test = products.test()
    assert test.z is test.effect is test.scale is None
    assert "no view varies" in test.reason
    # Beside real views they change nothing.
    a, b = trained(1), trained(2)
    plain = channel_permutation_test(a, b)
    with_ones = [torch.cat([view, torch.ones(64, 40)], 1) for view in (a[0], b[0])]
    padded = channel_permutation_test([with_ones[0], *a[1:]], [with_ones[1], *b[1:]])
    assert padded.z == pytest.approx(plain.z, abs=1e-6)


def test_norms_of_independent_models_with_a_large_common_mean() -> None:
    """Raw cosine .99 and .9999: the gains of N(1, .01²) in 1024 channels do not resemble each other."""
    for spread, raw in ((0.01, 0.9998), (0.1, 0.98)):
        a, b = ([1 + spread * normal(seed + i, 1024) for i in range(6)] for seed in (1, 100))
        assert float(torch.nn.functional.cosine_similarity(a[0], b[0], dim=0)) > raw
        products = ChannelProducts(1024)
        products.add_gains(a, b)
        assert abs(products.test().z) < 4
        inherited = ChannelProducts(1024)
        inherited.add_gains(a, [one + 0.5 * spread * normal(200 + i, 1024) for i, one in enumerate(a)])
        assert inherited.test().z > 40


def test_padding_channels_are_left_out() -> None:
    a, b = trained(1), trained(2)
    padded = [[torch.cat([view, torch.zeros(9, 48)]) for view in side] for side in (a, b)]
    test = channel_permutation_test(*padded)
    assert test.channels == 64
    assert test.z == pytest.approx(channel_permutation_test(a, b).z, rel=1e-6)


def test_no_z_with_a_reason() -> None:
    for a, b, words in (
        (torch.zeros(8, 4), normal(1, 8, 4), "no view varies"),
        (normal(1, 1, 4), normal(2, 1, 4), "no view varies"),
        (normal(1, 8, 1).abs(), normal(2, 8, 1).abs(), "different columns, or are equal"),
    ):
        test = channel_permutation_test([a], [b])
        assert test.z is None
        assert words in test.reason


def test_errors() -> None:
    products = ChannelProducts(8)
    for a, b in ((normal(1, 7, 4), normal(1, 7, 4)), (normal(1, 8, 4), normal(1, 8, 5)), (normal(1, 8), normal(1, 8))):
        with pytest.raises(ValueError, match="view"):
            products.add(a, b)
    with pytest.raises(TypeError, match="dequantise"):
        products.add(torch.ones(8, 2, dtype=torch.int8), normal(1, 8, 2))
    for value in (math.nan, math.inf):
        bad = normal(1, 8, 4)
        bad[2, 2] = value
        with pytest.raises(ValueError, match="view of b holds non-finite"):
            products.add(normal(1, 8, 4), bad)
        with pytest.raises(ValueError, match="gain of a holds non-finite"):
            products.add_gains([bad[:, 2]], [normal(1, 8)])
    with pytest.raises(ValueError, match="need \\[8\\]"):
        products.add_gains([normal(1, 7)], [normal(1, 7)])
    with pytest.raises(ValueError, match="same gains"):
        products.add_gains([], [normal(1, 8)])
    with pytest.raises(ValueError, match="at least one channel"):
        ChannelProducts(0)
    with pytest.raises(ValueError, match="same views"):
        channel_permutation_test([], [])
