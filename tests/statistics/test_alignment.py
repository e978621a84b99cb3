from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from checks.statistics.alignment import (
    alignment_test,
    common_basis,
    kernel,
    layer_similarities,
    seen_transform,
    signed_permutation,
)
from checks.statistics.rows import unbiased_linear_cka

TOKENS, WIDTH, LAYERS = 300, 24, 6


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(seed: int, width: int = WIDTH) -> Tensor:
    return torch.linalg.qr(normal(seed, width, width))[0]


def table(seed: int, width: int = WIDTH) -> Tensor:
    return normal(seed, TOKENS, width) * torch.linspace(2, 0.3, width).double() + normal(seed + 1, width)


def readers(seed: int, layers: int = LAYERS) -> list[Tensor]:
    """All layers read some directions more than others, and each has directions of its own."""
    shared = normal(7, 5, WIDTH)
    own = [normal(seed + i, 20, 5) @ normal(seed + 50 + i, 5, WIDTH) for i in range(layers)]
    return [one + normal(seed + 90 + i, 20, 5) @ shared for i, one in enumerate(own)]


def tables(a: list[Tensor], b: list[Tensor], rows_a: Tensor, rows_b: Tensor) -> list[tuple[Tensor, Tensor]]:
    basis = common_basis(rows_a, rows_b)
    stacks = [torch.stack([kernel(one, side) for one in layers]) for layers, side in ((a, basis.a), (b, basis.b))]
    return [layer_similarities(stacks[0], stacks[1])]


EQUAL = {i: i for i in range(LAYERS)}


@given(seed=st.integers(0, 999))
@settings(deadline=None, max_examples=10)
def test_a_rotated_copy_is_found(seed: int) -> None:
    rows, turn, weights = table(seed), rotation(seed + 1), readers(seed)
    noisy = [weight + 0.1 * weight.std() * normal(seed + 7 + i, *weight.shape) for i, weight in enumerate(weights)]
    test = alignment_test(tables([one @ turn for one in noisy], weights, rows @ turn, rows), EQUAL)
    assert test.level > 0.9
    assert test.z > 8
    assert len(test.per_layer) == LAYERS
    assert test.count == 20


def test_layers_that_share_directions_are_not_accused() -> None:
    """Same token table, independent layers: plain CKA is high everywhere, what is particular to a layer is not."""
    for seed in range(5):
        rows = table(seed)
        test = alignment_test(tables(readers(seed), readers(seed + 500), rows, rows), EQUAL)
        assert test.plain_level > 0.2
        assert abs(test.level) < 0.15
        assert abs(test.z) < 3
    unrelated = alignment_test(tables(readers(1), readers(600), table(1), table(900)), EQUAL)
    assert abs(unrelated.level) < 0.15


def test_other_width_and_depth() -> None:
    wide = 40
    embed = torch.linalg.qr(normal(3, wide, WIDTH))[0].T
    rows, weights = table(1), readers(1)
    larger = [one @ embed for one in (*weights[:3], *weights[2:])]
    mapped = dict(enumerate([0, 1, 2, 2, 3, 4, 5]))
    test = alignment_test(tables(larger, weights, rows @ embed, rows), mapped)
    assert test.level > 0.95
    assert test.z > 5
    assert seen_transform(rows @ embed, rows).kind == "projection"


def test_kernels_are_unbiased_cka() -> None:
    x, y, basis = normal(1, 30, WIDTH), normal(2, 25, WIDTH), rotation(3)[:, :16]
    expected = unbiased_linear_cka((x @ basis).T, (y @ basis).T)
    found = float((kernel(x, basis).double() * kernel(y, basis).double()).sum())
    assert found == pytest.approx(expected, abs=1e-6)
    assert float(kernel(x, basis).norm()) == pytest.approx(1, abs=1e-6)
    turned = rotation(5, 30) @ x
    assert torch.allclose(kernel(turned, basis), kernel(x, basis), atol=1e-6)
    assert kernel(torch.zeros(3, WIDTH), basis).abs().max() == 0


def test_few_layers_have_a_level_and_no_score() -> None:
    rows = table(1)
    test = alignment_test(tables(readers(1, 3), readers(1, 3), rows, rows), {0: 0, 1: 1, 2: 2})
    assert test.z is None
    assert "6 are needed" in test.reason
    assert test.level == pytest.approx(1, abs=1e-6)
    nothing = alignment_test([], {})
    assert nothing.level is nothing.z is None
    one = alignment_test(tables(readers(1, 1), readers(1, 1), rows, rows), {0: 0})
    assert one.level == 0


def test_neighbours_are_no_null() -> None:
    plain = torch.eye(5) + 0.9 * torch.diag(torch.ones(4), 1)
    plain[0, 4], plain[4, 0] = 0.01, -0.01
    test = alignment_test([(plain, plain)], {i: i for i in range(5)})
    assert test.count == 12
    assert test.z > 50


@given(seed=st.integers(0, 999))
@settings(deadline=None, max_examples=10)
def test_transforms_are_named(seed: int) -> None:
    rows = table(seed)
    noisy = rows + 0.1 * normal(seed + 2, TOKENS, WIDTH)
    order, signs = normal(seed + 3, WIDTH).argsort(), normal(seed + 4, WIDTH).sign()
    signs[0], signs[1] = 1, -1
    for changed, kind in (
        (noisy, "identity"),
        (noisy * signs, "sign flips"),
        (noisy[:, order], "permutation"),
        ((noisy * signs)[:, order], "signed permutation"),
        (noisy @ rotation(seed), "rotation"),
        (table(seed + 5000), "none"),
    ):
        found = seen_transform(changed, rows)
        assert found.kind == kind
        assert (found.cosine > 0.9) == (kind != "none")


def test_few_rows_fit_no_rotation() -> None:
    rows = table(1)[:16]
    assert seen_transform(rows @ rotation(1), rows).kind == "unknown"
    assert seen_transform(rows, rows).kind == "identity"


def test_signed_permutation_is_recovered() -> None:
    rows = table(1)
    order, signs = normal(3, WIDTH).argsort(), normal(4, WIDTH).sign()
    kept, taken, found = signed_permutation((rows * signs)[:, order], rows)
    assert torch.equal(order[kept], taken)
    assert torch.equal(found, signs[taken])


def test_errors() -> None:
    rows = table(1)
    for bad, words in ((rows[:5], "rows"), (rows.long(), "floating"), (rows[0], "width")):
        with pytest.raises(ValueError, match=words):
            common_basis(bad, rows)
        with pytest.raises(ValueError, match=words):
            seen_transform(bad, rows)
    for few in (common_basis, seen_transform):
        with pytest.raises(ValueError, match="7 rows"):
            few(rows[:7], rows[:7])
    broken = rows.clone()
    broken[3, 2] = math.inf
    with pytest.raises(ValueError, match="rows of b hold non-finite"):
        common_basis(rows, broken)
    with pytest.raises(ValueError, match="too few"):
        kernel(rows, rotation(1)[:, :3])
    with pytest.raises(ValueError, match="non-finite"):
        kernel(broken, rotation(1))
