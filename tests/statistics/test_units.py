from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from checks.statistics import units
from checks.statistics.units import (
    UnitTest,
    as_one_observation,
    combine,
    critical_z,
    stouffer,
    two_sided_log_p,
    unit_permutation_test,
)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def canonical(views: list[Tensor]) -> Tensor:
    """Views with rows of equal norm about their mean, concatenated and centred, written out."""
    scaled = []
    for view in views:
        used = (view != 0).any(1)
        rows = torch.nn.functional.normalize(view.double(), dim=1)
        rows = torch.where(used[:, None], rows - rows[used].mean(0), 0.0)
        scaled.append(torch.nn.functional.normalize(rows, dim=1, eps=1e-12))
    whole = torch.cat(scaled, 1)
    return whole - whole.mean(0)


def permutations(h: int, count: int, seed: int) -> Tensor:
    """`count` random permutations of h units, [count, h]."""
    return torch.rand(count, h, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).argsort(1)


@given(h=st.integers(3, 6), seed=st.integers(0, 999), widths=st.lists(st.integers(1, 5), min_size=1, max_size=3))
@settings(deadline=None, max_examples=40)
def test_moments_are_exact_over_all_permutations(h: int, seed: int, widths: list[int]) -> None:
    a = [normal(seed + i, h, d + 1) for i, d in enumerate(widths)]
    b = [normal(seed + 1000 + i, h, d + 1) for i, d in enumerate(widths)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(units, "LEAST_UNITS", 2)
        test = unit_permutation_test(a, b)
    products = canonical(a) @ canonical(b).T
    rows = torch.arange(h)
    sums = torch.stack([products[rows, list(order)].sum() for order in itertools.permutations(range(h))])
    sigma = float(sums.square().mean().sqrt())
    assert abs(float(sums.mean())) < 1e-12
    assert test.z == pytest.approx(float(sums[0]) / sigma, rel=1e-9, abs=1e-9)
    assert test.effect == pytest.approx(float(sums[0] / (canonical(a).norm() * canonical(b).norm())), abs=1e-12)
    assert test.z == pytest.approx(test.scale * test.effect, rel=1e-9, abs=1e-9)
    assert test.units == h


def heavy_tailed(seed: int) -> list[Tensor]:
    return [normal(seed + i, 128, 48) / normal(seed + 50 + i, 128, 48).abs().clamp(min=1e-3) for i in range(3)]


def low_rank(seed: int) -> list[Tensor]:
    """Both models of a pair share the subspace in which their units vary."""
    return [normal(seed + i, 128, 3) @ normal(7000 + i, 3, 48) + 0.1 * normal(seed + 50 + i, 128, 48) for i in range(3)]


@pytest.mark.parametrize("family", ["heavy_tailed", "low_rank", "outliers", "clusters"])
def test_null_of_sampled_permutations(family: str) -> None:
    """Two of the families have units that decide alone where rows are not scaled again about their mean."""
    a, b = globals()[family](100), globals()[family](500)
    products = canonical(a) @ canonical(b).T
    test = unit_permutation_test(a, b)
    sigma = float(canonical(a).norm() * canonical(b).norm()) / test.scale
    count = 10_000
    z = products[torch.arange(128), permutations(128, count, 3)].sum(1) / sigma
    assert float(products.diagonal().sum()) / sigma == pytest.approx(test.z, rel=1e-9)
    assert abs(float(z.mean())) < 4 / math.sqrt(count)
    assert 0.97 < float(z.std()) < 1.03
    # P(|Z| > 3.29) = .001: 10 expected; at most 23 in all but 1e-4 of samples
    assert int((z.abs() > 3.29).sum()) <= 23
    assert 0.006 < float((z.abs() > 2.576).double().mean()) < 0.014


def outliers(seed: int) -> list[Tensor]:
    """Units that share nearly all of their direction, but for a few that share none of it."""
    views = [normal(seed + i, 128, 48) + 10 * normal(seed + 20 + i, 1, 48) for i in range(3)]
    return [torch.cat([10 * normal(seed + 40 + i, 3, 48), view[3:]]) for i, view in enumerate(views)]


def clusters(seed: int) -> list[Tensor]:
    """Two kinds of units, one of them rare, that hardly differ within."""
    views = [normal(seed + i, 1, 48) + 0.05 * normal(seed + 20 + i, 128, 48) for i in range(3)]
    rare = [normal(seed + 40 + i, 1, 48) + 0.05 * normal(seed + 60 + i, 4, 48) for i in range(3)]
    return [torch.cat([few, view[4:]]) for few, view in zip(rare, views, strict=True)]


def noisy(views: list[Tensor], cosine: float, seed: int) -> list[Tensor]:
    noise = math.sqrt(1 / cosine**2 - 1)
    return [view + noise * normal(seed + i, *view.shape) for i, view in enumerate(views)]


def test_power_and_permutation() -> None:
    a = [normal(i, 512, 256) for i in range(3)]
    b = noisy(a, 0.06, 100)
    test = unit_permutation_test(a, b)
    assert test.effect == pytest.approx(0.06, abs=0.01)
    assert test.z > 10
    order = permutations(512, 1, 5)[0]
    assert abs(unit_permutation_test(a, [view[order] for view in b]).z) < 4
    assert abs(unit_permutation_test(a, [normal(200 + i, 512, 256) for i in range(3)]).z) < 4
    assert unit_permutation_test(a, a).effect == pytest.approx(1, abs=1e-12)


@given(seed=st.integers(0, 999))
@settings(deadline=None, max_examples=20)
def test_invariances(seed: int) -> None:
    a = [normal(seed + i, 64, d) for i, d in enumerate((32, 32, 16))]
    b = noisy(a, 0.3, seed + 100)
    plain = unit_permutation_test(a, b)
    order = permutations(64, 1, seed)[0]
    joint = unit_permutation_test([view[order] for view in a], [view[order] for view in b])
    assert joint.z == pytest.approx(plain.z, rel=1e-9)
    factors = normal(seed + 200, 64, 1).exp()
    rescaled = unit_permutation_test(a, [factors * b[0], 1e-20 * b[1], b[2] / factors])
    assert rescaled.z == pytest.approx(plain.z, rel=1e-9)
    swapped = unit_permutation_test(b, a)
    assert swapped.z == pytest.approx(plain.z, rel=1e-9)
    columns = torch.randperm(32, generator=torch.Generator().manual_seed(seed))
    same_basis = unit_permutation_test([a[0][:, columns], a[1], a[2]], [b[0][:, columns], b[1], b[2]])
    assert same_basis.z == pytest.approx(plain.z, rel=1e-9)


def test_a_direction_that_all_units_share_hides_nothing() -> None:
    """A LayerNorm takes constants out of what units read: every row may get one, but for that of a dead unit."""
    a = [normal(i, 128, 64) for i in range(3)]
    b = noisy(a, 0.5, 100)
    plain = unit_permutation_test(a, b)
    hidden = [view + 50 for view in b]
    for view in hidden:
        view[7] = normal(900, 64)
    found = unit_permutation_test(a, hidden)
    assert found.z == pytest.approx(plain.z, rel=0.1)
    assert found.effect == pytest.approx(plain.effect, rel=0.1)


def test_flipped_signs_change_the_sign_not_the_detection() -> None:
    up, gate, down = [normal(i, 256, 64) for i in range(3)]
    b = noisy([up, gate, down], 0.5, 100)
    straight = unit_permutation_test([up, down], [b[0], b[2]])
    flipped = unit_permutation_test([up, down], [-b[0], -b[2]])
    assert straight.z > 10
    assert flipped.z == pytest.approx(-straight.z, rel=1e-9)
    with_gate = unit_permutation_test([up, gate, down], [-b[0], b[1], -b[2]])
    assert with_gate.z < -10


@pytest.mark.parametrize("size", [1, 7, 64])
def test_column_blocks_do_not_matter(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = [normal(i, 32, 20) for i in range(3)], [normal(10 + i, 32, 20) for i in range(3)]
    plain = unit_permutation_test(a, b)
    monkeypatch.setattr(units, "COLUMN_BLOCK", size)
    blocked = unit_permutation_test(a, b)
    assert blocked.z == pytest.approx(plain.z, rel=1e-9)
    assert blocked.scale == pytest.approx(plain.scale, rel=1e-9)


def reference_of(a: list[Tensor], b: list[Tensor]) -> tuple[float, float]:
    """z and effect by the definition: Σ(A∘B) and ⟨AᵀA, BᵀB⟩ of the whole matrices in float64."""
    one, other = canonical(a), canonical(b)
    dot = float((one * other).sum())
    sigma = math.sqrt(float(((one.T @ one) * (other.T @ other)).sum()) / (len(one) - 1))
    return dot / sigma, dot / float(one.norm() * other.norm())


@given(
    h=st.integers(16, 40),
    seed=st.integers(0, 999),
    widths=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    copied=st.booleans(),
)
@settings(deadline=None, max_examples=40)
def test_units_multiplied_and_columns_multiplied_agree(h: int, seed: int, widths: list[int], copied: bool) -> None:
    """The products of the units and the Gram matrices of the columns, whichever is smaller, give the same z."""
    a = [normal(seed + i, h, d + 1) for i, d in enumerate(widths)]
    b = noisy(a, 0.5, seed + 500) if copied else [normal(seed + 1000 + i, h, d + 1) for i, d in enumerate(widths)]
    z, effect = reference_of(a, b)
    for largest, block in ((0, 4), (0, 1024), (8192, 4), (8192, 1024)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(units, "LARGEST_PRODUCTS", largest)
            patch.setattr(units, "COLUMN_BLOCK", block)
            test = unit_permutation_test(a, b)
        assert test.z == pytest.approx(z, rel=1e-9, abs=1e-9)
        assert test.effect == pytest.approx(effect, rel=1e-9, abs=1e-12)


def test_fewer_units_than_columns_are_multiplied_with_each_other_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No product larger than the units: a layer of experts is 3 x 7168 columns wide."""
    sizes: list[int] = []
    multiplied = Tensor.__matmul__

    def counting(one: Tensor, other: Tensor) -> Tensor:
        sizes.append(one.shape[0] * other.shape[1])
        return multiplied(one, other)

    monkeypatch.setattr(Tensor, "__matmul__", counting)
    a, b = [normal(1, 16, 90)], [normal(2, 16, 90)]
    assert unit_permutation_test(a, b).z is not None
    assert max(sizes, default=0) <= 16 * 16
    unit_permutation_test([normal(1, 90, 16)], [normal(2, 90, 16)])
    assert max(sizes) == 16 * 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_dtypes(dtype: torch.dtype) -> None:
    a = [normal(i, 64, 32) for i in range(3)]
    b = noisy(a, 0.5, 100)
    rounded = [[view.to(dtype) for view in views] for views in (a, b)]
    exact = unit_permutation_test([v.double() for v in rounded[0]], [v.double() for v in rounded[1]])
    assert unit_permutation_test(rounded[0], rounded[1]).z == pytest.approx(exact.z, rel=1e-12)
    assert exact.z == pytest.approx(unit_permutation_test(a, b).z, rel=0.05)


def test_zero_rows_stay_zero() -> None:
    a, b = [normal(1, 32, 8)], [normal(2, 32, 8)]
    a.append(normal(3, 32, 8))
    b.append(normal(4, 32, 8))
    a[0][5] = 0
    assert canonical(a)[5, :8].abs().max() < 0.1  # zero but for the centring
    test = unit_permutation_test(a, b)
    expected = float((canonical(a) * canonical(b)).sum() / (canonical(a).norm() * canonical(b).norm()))
    assert test.effect == pytest.approx(expected, abs=1e-12)


def test_units_that_are_zero_throughout_on_either_side_are_left_out() -> None:
    a, b = [normal(1, 32, 8), normal(3, 32, 8)], [normal(2, 32, 8), normal(4, 32, 8)]
    padded_a = [torch.cat([view, torch.zeros(9, 8)]) for view in a]
    padded_b = [torch.cat([view, normal(5, 9, 8)]) for view in b]
    test = unit_permutation_test(padded_a, padded_b)
    assert test == unit_permutation_test(a, b)
    assert test.units == 32


def test_shared_padding_does_not_make_independent_units_dependent() -> None:
    """Rows with a common direction, and an eighth of the units zero at the same end of both: |z| must stay ordinary."""
    scores = []
    for seed in range(20):
        views = [normal(3 * seed + side, 256, 16) + normal(900 + side, 1, 16) for side in (0, 1)]
        for view in views:
            view[-32:] = 0
        scores.append(unit_permutation_test([views[0]], [views[1]]).z)
    assert max(abs(score) for score in scores) < 4


def test_no_z_with_a_reason() -> None:
    a = [normal(1, 16, 4)]
    constant = [normal(2, 1, 4).expand(16, 4)]
    for views_a, views_b, words in (
        (a, constant, "units of b are equal"),
        (constant, a, "units of a are equal"),
        ([torch.zeros(16, 4)], a, "0 hidden units are not zero on both sides"),
        ([normal(1, 15, 4)], [normal(2, 15, 4)], "15 hidden units, 16 are needed"),
        ([torch.zeros(0, 4)], [torch.zeros(0, 4)], "0 hidden units"),
        (
            [torch.eye(4)[[0, 1] * 8]],
            [torch.eye(4)[[2, 3] * 8]],
            "different columns",
        ),
    ):
        test = unit_permutation_test(views_a, views_b)
        assert test.z is test.effect is test.scale is None
        assert words in test.reason


def test_errors() -> None:
    a = normal(1, 16, 4)
    for views_a, views_b in (([], []), ([a], [a, a]), ([a], [a[:7]]), ([a], [a[:, :3]]), ([a, a[:7]], [a, a[:7]])):
        with pytest.raises(ValueError, match=r"view"):
            unit_permutation_test(views_a, views_b)
    with pytest.raises(ValueError, match="matrices"):
        unit_permutation_test([a[0]], [a[0]])
    with pytest.raises(TypeError, match="dequantise first"):
        unit_permutation_test([a.long()], [a])
    for value in (math.nan, math.inf, -math.inf):
        bad = a.clone()
        bad[3, 2] = value
        with pytest.raises(ValueError, match="view 1 of b holds non-finite"):
            unit_permutation_test([a, a], [a, bad])
        with pytest.raises(ValueError, match="view 0 of a holds non-finite"):
            unit_permutation_test([bad, a], [a, a])


def test_stouffer() -> None:
    assert stouffer([1.0, 2.0, None, 3.0]) == pytest.approx(6 / math.sqrt(3))
    assert stouffer([None]) is stouffer([]) is None
    with pytest.raises(ValueError, match="NaN"):
        stouffer([math.nan])


@pytest.mark.parametrize(
    ("z", "expected"),
    [(0.0, 0.0), (1.959963984540054, math.log(0.05)), (3.290526731491926, math.log(1e-3)), (-4.891638475699, -13.8155)],
)
def test_log_p_of_known_quantiles(z: float, expected: float) -> None:
    assert two_sided_log_p(z) == pytest.approx(expected, abs=1e-4)


@given(z=st.floats(50, 1e5))
@settings(deadline=None)
def test_log_p_far_in_the_tail(z: float) -> None:
    # Mills ratio: Φ(-z) = φ(z)/z · (1 - 1/z² + 3/z⁴ - …)
    series = -1 / z**2 + 3 / z**4 - 15 / z**6 + 105 / z**8
    expected = math.log(2) - z * z / 2 - math.log(z * math.sqrt(2 * math.pi)) + math.log1p(series)
    assert two_sided_log_p(z) == two_sided_log_p(-z) == pytest.approx(expected, rel=1e-12)


def test_log_p_of_extremes() -> None:
    assert two_sided_log_p(500.0) == pytest.approx(-125006.44, abs=0.01)
    assert two_sided_log_p(math.inf) == -math.inf
    with pytest.raises(ValueError, match="NaN"):
        two_sided_log_p(math.nan)


@given(exponent=st.integers(-300, -1), tests=st.integers(1, 10_000))
@settings(deadline=None)
def test_critical_z_inverts_log_p(exponent: int, tests: int) -> None:
    alpha = 10.0**exponent
    assert two_sided_log_p(critical_z(alpha, tests)) == pytest.approx(math.log(alpha) - math.log(tests), rel=1e-9)


def test_critical_z_of_known_levels() -> None:
    assert critical_z(0.05, 1) == pytest.approx(1.959963984540054, abs=1e-12)
    assert critical_z(0.05, 50) == pytest.approx(critical_z(0.001, 1), abs=1e-12)
    for alpha, tests in ((0.0, 1), (1.0, 1), (0.5, 0), (math.nan, 1)):
        with pytest.raises(ValueError, match="alpha"):
            critical_z(alpha, tests)


SOME_TESTS = [UnitTest(1.0, 0.1, 10.0, 8), UnitTest(None, None, None, 1, "none"), UnitTest(6.0, 0.2, 30.0, 8)]


def test_detectable_effect_is_where_the_joint_score_is_critical_in_95_of_100_cases() -> None:
    combined = combine(SOME_TESTS)
    assert combined is not None
    effect = combined.detectable_effect(5.0)
    expected = 5 + 1.6448536
    assert stouffer([effect * test.scale for test in SOME_TESTS if test.scale is not None]) == pytest.approx(expected)
    at_the_limit = combine(
        UnitTest(effect * test.scale, effect, test.scale, 8) for test in SOME_TESTS if test.scale is not None
    )
    assert at_the_limit is not None
    assert at_the_limit.z == pytest.approx(expected)
    assert at_the_limit.effect == pytest.approx(effect)


def test_combined_score_is_stouffers_and_effect_times_scale() -> None:
    combined = combine(SOME_TESTS)
    assert combined is not None
    assert combined.tests == 2
    assert combined.z == pytest.approx(7 / math.sqrt(2))
    assert combined.effect == pytest.approx((10 * 0.1 + 30 * 0.2) / 40)
    assert combined.z == pytest.approx(combined.effect * (10 + 30) / math.sqrt(2))
    assert combined.log_p == pytest.approx(two_sided_log_p(7 / math.sqrt(2)))


@given(seed=st.integers(0, 999), layers=st.integers(1, 4))
@settings(deadline=None, max_examples=20)
def test_combined_score_of_real_tests_is_effect_times_scale(seed: int, layers: int) -> None:
    tests = [
        unit_permutation_test([normal(seed + 10 * i, 20, 5)], [normal(seed + 10 * i + 5000, 20, 5)])
        for i in range(layers)
    ]
    combined = combine(tests)
    assert combined is not None
    total = sum(test.scale for test in tests if test.scale is not None)
    assert combined.z == pytest.approx(combined.effect * total / math.sqrt(layers), rel=1e-9, abs=1e-9)
    assert combined.z == pytest.approx(stouffer(test.z for test in tests), rel=1e-12, abs=1e-12)


def test_one_observation_is_the_mean_score_and_effect_times_scale() -> None:
    found = as_one_observation(SOME_TESTS)
    assert found is not None
    assert (found.z, found.scale, found.units) == (3.5, 20.0, 16)
    assert found.effect == pytest.approx((10 * 0.1 + 30 * 0.2) / 40)
    assert found.z == pytest.approx(found.effect * found.scale)
    alone = as_one_observation(SOME_TESTS[:1])
    assert alone is not None
    assert (alone.z, alone.effect, alone.scale) == (1.0, 0.1, 10.0)
    assert as_one_observation(SOME_TESTS[1:2]) is as_one_observation([]) is None


@given(scores=st.lists(st.floats(-50, 50), min_size=1, max_size=20))
def test_copies_of_one_observation_are_one_observation(scores: list[float]) -> None:
    """However often an MLP was copied into experts, its score counts once."""
    tests = [UnitTest(z, z / 20, 20.0, 8) for z in scores]
    once = combine(tests)
    copied = combine(one for test in tests if (one := as_one_observation([test] * 8)))
    assert once is not None
    assert copied is not None
    assert copied.z == pytest.approx(once.z)
    assert copied.detectable_effect(5.0) == pytest.approx(once.detectable_effect(5.0))


def test_combine_of_nothing_is_none() -> None:
    assert combine([]) is None
    assert combine(SOME_TESTS[1:2]) is None


def test_combine_of_tests_without_effect_is_zero_not_missing() -> None:
    combined = combine([UnitTest(0.0, 0.0, 10.0, 8)])
    assert combined is not None
    assert (combined.z, combined.effect, combined.log_p) == (0.0, 0.0, 0.0)
