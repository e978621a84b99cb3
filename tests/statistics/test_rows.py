from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from checks.statistics.rows import row_similarity, unbiased_linear_cka


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(d: int, seed: int) -> Tensor:
    return torch.linalg.qr(normal(seed, d, d)).Q


def table(seed: int, n: int = 600, d: int = 32) -> Tensor:
    """Rows of a trained table: a mean row, and a frequency axis along which all tokens of any model are laid out."""
    frequency = torch.linspace(-2, 2, n, dtype=torch.float64)[:, None]
    return normal(seed, n, d) + 2 * normal(seed + 1, 1, d) + frequency * normal(seed + 2, 1, d)


def test_independent_tables_share_the_frequency_of_tokens_and_nothing_else() -> None:
    found = [row_similarity(table(10 * s), table(10 * s + 5)) for s in range(60)]
    channel = torch.tensor([one.channel_z for one in found])
    assert float(channel.abs().max()) < 4
    assert 0.75 < float(channel.std()) < 1.25
    # Shuffled pairs destroy what every two tables share, so this is no test of independence.
    assert max(abs(one.token_z) for one in found) > 8
    assert max(abs(one.cosine) for one in found) < 0.35


def test_fine_tuned_permuted_and_rotated_tables() -> None:
    a = table(1)
    tuned = row_similarity(a, a + 0.2 * normal(5, *a.shape))
    assert tuned.cosine > 0.97
    assert tuned.channel_z > 12
    assert tuned.cka > 0.95
    assert tuned.aligned_cosine > 0.95
    assert tuned.residual < 0.1
    assert tuned.fitted == 300
    for changed in (a[:, torch.randperm(32, generator=torch.Generator().manual_seed(1))], a @ rotation(32, 2)):
        other = row_similarity(a, changed + 0.2 * normal(5, *a.shape))
        assert abs(other.cosine) < 0.5
        assert abs(other.channel_z) < 4
        assert other.aligned_cosine > 0.95
        assert other.cka == pytest.approx(tuned.cka, abs=0.02)


def test_other_widths_are_aligned() -> None:
    a = table(1)
    wide = row_similarity(a, torch.cat([a @ rotation(32, 3), 0.3 * normal(4, 600, 16)], 1))
    assert wide.cosine is wide.channel_z is wide.token_z is None
    assert wide.aligned_cosine > 0.9
    assert wide.cka > 0.9
    apart = row_similarity(a, table(40, d=48))
    assert apart.aligned_cosine < 0.6
    few = row_similarity(a[:100], table(40, d=48)[:100])
    assert few.aligned_cosine is None
    assert "need 128" in few.reason


def hsic_by_kernels(a: Tensor, b: Tensor) -> float:
    """Song et al. 2012, equation 5, written out with the kernels."""
    n = a.shape[0]
    k, l = (x @ x.T * (1 - torch.eye(n, dtype=torch.float64)) for x in (a, b))  # noqa: E741
    ones = torch.ones(n, dtype=torch.float64)
    value = (k @ l).trace() + (ones @ k @ ones) * (ones @ l @ ones) / ((n - 1) * (n - 2))
    return float(value - 2 / (n - 2) * (ones @ k @ l @ ones))


@given(seed=st.integers(0, 999), n=st.integers(4, 30), d=st.integers(1, 8))
@settings(deadline=None, max_examples=30)
def test_cka_agrees_with_its_kernels(seed: int, n: int, d: int) -> None:
    a, b = normal(seed, n, d), normal(seed + 1, n, d) + normal(seed, n, d)
    a, b = a - a.mean(0), b - b.mean(0)
    own = hsic_by_kernels(a, a), hsic_by_kernels(b, b)
    found = unbiased_linear_cka(a, b)
    if min(own) <= 0:
        assert found is None
    else:
        expected = max(-1.0, min(1.0, hsic_by_kernels(a, b) / math.sqrt(own[0] * own[1])))
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_unrelated_features_have_no_cka() -> None:
    values = [unbiased_linear_cka(normal(s, 60, 50), normal(s + 500, 60, 50)) for s in range(40)]
    assert abs(math.fsum(value for value in values if value is not None) / 40) < 0.02
    assert unbiased_linear_cka(normal(1, 60, 50), normal(1, 60, 50)) == pytest.approx(1)
    with pytest.raises(ValueError, match="at least 4"):
        unbiased_linear_cka(normal(1, 3, 2), normal(2, 3, 2))


@given(seed=st.integers(0, 999), scale=st.sampled_from([1e-200, 1e-3, 7.0, 1e200]))
@settings(deadline=None, max_examples=10)
def test_one_factor_changes_nothing(seed: int, scale: float) -> None:
    a = table(seed, 200, 12)
    b = a + normal(seed + 9, 200, 12)
    plain, scaled = row_similarity(a, b), row_similarity(scale * a, b)
    for name in ("cosine", "cka", "aligned_cosine", "residual"):
        assert getattr(scaled, name) == pytest.approx(getattr(plain, name), rel=1e-6)
    assert scaled.channel_z == pytest.approx(plain.channel_z, rel=1e-3)


def test_unused_and_equal_rows() -> None:
    a = table(1)
    b = a + 0.2 * normal(5, *a.shape)
    a[::7] = 0
    b[3] = 0
    found = row_similarity(a, b)
    assert found.tokens == 600 - 86 - 1
    assert found.cosine > 0.97
    assert "0 tokens" in row_similarity(torch.zeros(50, 4), normal(1, 50, 4)).reason
    assert "rows of a are equal" in row_similarity(torch.ones(50, 4), normal(1, 50, 4)).reason


def test_dtypes_and_errors() -> None:
    a = table(1)
    b = a + normal(5, *a.shape)
    exact = row_similarity(a, b)
    assert row_similarity(a.bfloat16(), b.bfloat16()).cosine == pytest.approx(exact.cosine, abs=0.01)
    with pytest.raises(TypeError, match="dequantise"):
        row_similarity(a.long(), b)
    with pytest.raises(ValueError, match="one per token"):
        row_similarity(a[:5], b)
    with pytest.raises(ValueError, match="need \\[tokens"):
        row_similarity(a[0], b[0])
    b[3, 3] = math.nan
    with pytest.raises(ValueError, match="table of b holds non-finite"):
        row_similarity(a, b)
