from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from checks.statistics import shape_pairing
from checks.statistics.shape_pairing import (
    ShapePairing,
    pair_by_shape,
    shape_positions,
    shape_sample,
    shape_sample_of,
)

ALPHA = math.log(1e-6)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network(seed: int) -> list[Tensor]:
    """A small network with kernels, attention, class rows and norms; rows of all share a mean direction."""
    tensors = [normal(seed + i, 64, 32, 3, 3) for i in range(3)]
    tensors += [normal(seed + 20 + i, 96, 96) + normal(seed + 60 + i, 1, 96) for i in range(6)]
    tensors += [normal(seed + 40 + i, 200, 96) * normal(77, 200, 1).exp() + normal(78, 200, 1) for i in range(2)]
    return tensors + [1 + 0.1 * normal(seed + 50 + i, 96) for i in range(4)]


def compare(a: list[Tensor], b: list[Tensor]) -> ShapePairing:
    return pair_by_shape([shape_sample(one) for one in a], [shape_sample(one) for one in b])


def test_a_renamed_reordered_and_tuned_copy_is_found() -> None:
    a = network(1)
    order = torch.randperm(len(a), generator=torch.Generator().manual_seed(2)).tolist()
    b = [a[i] + 0.5 * a[i].std() * normal(900 + i, *a[i].shape) for i in order]
    found = compare(a, b)
    assert {pair.index: order[pair.other] for pair in found.pairs} == {i: i for i in range(len(a))}
    assert found.tests == 11
    assert found.log_p < ALPHA
    assert found.share(ALPHA, 0.5) > 0.98
    assert min(pair.z for pair in found.pairs if pair.z is not None) > 8
    assert found.searched == 9 + 2 * 36 + 4 + 16


def test_an_independent_model_of_the_same_architecture_is_not_accused() -> None:
    scores, log_p = [], []
    for seed in range(12):
        found = compare(network(1000 * seed), network(1000 * seed + 500))
        assert len(found.pairs) == 15
        scores += [pair.z for pair in found.pairs if pair.z is not None]
        log_p.append(found.log_p)
        # The largest of many similarities is large by the search alone; the tested elements know nothing of it.
        assert found.share(ALPHA, 0.0) == 0
    assert max(abs(score) for score in scores) < 4.5
    assert min(log_p) > math.log(1e-4)
    assert abs(sum(scores) / len(scores)) < 0.3


def test_class_rows_that_any_model_shares_do_not_accuse() -> None:
    """Rows scaled and shifted by class: their order alone is far from random, that of the columns is not."""
    found = compare(network(1), network(501))
    rows = [pair for pair in found.pairs if pair.elements == 200 * 96]
    # A matrix is turned so that the shorter axis, the channels, comes first.
    assert max(abs(pair.z_columns) for pair in rows) > 6
    assert max(abs(pair.z) for pair in rows) < 4


def test_transposed_exports_are_found() -> None:
    a = [normal(1, 40, 96), normal(2, 64, 64), normal(3, 64, 64), normal(4, 64, 64)]
    found = compare(a, [a[3], a[2].T, a[1], a[0].T])
    assert {pair.index: pair.other for pair in found.pairs} == {0: 3, 1: 2, 2: 1, 3: 0}
    assert [pair.turned for pair in found.pairs] == [False, False, True, False]
    assert min(pair.effect for pair in found.pairs) == pytest.approx(1)


def test_pairing_and_test_share_no_row_and_no_column() -> None:
    a = torch.arange(64 * 80, dtype=torch.float64).reshape(64, 80)
    sample = shape_sample(a)
    block = sample.block.long().flatten()
    assert sample.block.shape == (32, 40, 1)
    assert len(sample.pairing) == 32 * 40
    values = sample.pairing.double()
    # The pairing elements are centred and scaled; their number is restored from two known gaps.
    used_rows, used_columns = set((block // 80).tolist()), set((block % 80).tolist())
    free = torch.tensor([[r not in used_rows and c not in used_columns for c in range(80)] for r in range(64)])
    expected = a[free] - a[free].mean()
    assert torch.allclose(values.sort().values, (expected / expected.norm()).sort().values, atol=1e-5)


@given(seed=st.integers(0, 99), scale=st.sampled_from([1e-30, 2.0, 1e30]))
@settings(deadline=None, max_examples=10)
def test_scale_and_dtype_do_not_matter(seed: int, scale: float) -> None:
    a = [normal(seed + i, 48, 80) for i in range(3)]
    b = [one + normal(seed + 9 + i, 48, 80) for i, one in enumerate(a)]
    plain, scaled = compare(a, b), compare([scale * one for one in a], [one.double() for one in b])
    for one, other in zip(plain.pairs, scaled.pairs, strict=True):
        assert (one.index, one.other) == (other.index, other.other)
        assert one.z == pytest.approx(other.z, rel=1e-4)
    halves = compare([one.bfloat16() for one in a], b)
    assert [pair.other for pair in halves.pairs] == [0, 1, 2]


def test_large_groups_pair_mutual_best(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shape_pairing, "LARGEST_ASSIGNMENT", 4)
    a = [normal(i, 32, 48) for i in range(9)]
    found = compare(a, a[::-1][:7])
    assert {pair.index: pair.other for pair in found.pairs if pair.similarity > 0.9} == {i: 8 - i for i in range(2, 9)}
    assert set(found.unpaired) <= {0, 1}


def test_vectors_are_paired_and_decide_nothing() -> None:
    norms = [1 + 0.1 * normal(i, 256) for i in range(5)]
    found = compare(norms, norms[::-1])
    assert [pair.other for pair in found.pairs] == [4, 3, 2, 1, 0]
    assert found.tests == 0
    assert found.strongest is found.log_p is None
    assert found.share(ALPHA, 0.1) == 0


def test_what_cannot_be_paired_has_a_reason() -> None:
    for tensor, words in (
        (torch.zeros(0), "need 64"),
        (torch.tensor(3.0), "1 elements"),
        (torch.ones(40, 40), "constant"),
        (torch.full((40, 40), math.nan), "non-finite"),
    ):
        assert words in shape_sample(tensor).reason
    assert compare([torch.ones(40, 40)], [torch.ones(40, 40)]).pairs == ()
    short = compare([normal(1, 3, 200)], [normal(1, 3, 200)])
    assert short.pairs[0].z_rows is None
    assert short.pairs[0].z_columns > 8
    assert short.pairs[0].z is short.pairs[0].log_p is short.pairs[0].effect is None
    with pytest.raises(TypeError, match="dequantise"):
        shape_sample(torch.ones(40, 40, dtype=torch.int8))


@pytest.mark.parametrize("shape", [(100,), (30, 500), (500, 30), (300, 300), (1, 70, 1, 90), (20, 9, 50), (4, 5, 6, 7)])
def test_a_sample_needs_its_positions_alone(shape: tuple[int, ...]) -> None:
    tensor = normal(1, *shape)
    whole, found = shape_sample(tensor, 3), shape_sample_of(tensor.reshape(-1)[shape_positions(shape, 3)], shape, 3)
    assert (found.shape, found.elements, found.reason) == (whole.shape, whole.elements, None)
    assert torch.equal(found.pairing, whole.pairing)
    assert torch.equal(found.block, whole.block)
    assert (found.turned is None) == (len(set(shape) - {1}) > 1 or len(shape) == 1)
    if found.turned and whole.turned:
        assert all(torch.equal(one, other) for one, other in zip(found.turned, whole.turned, strict=True))


def test_a_transpose_is_looked_at_in_the_same_places() -> None:
    wide, square = normal(1, 40, 300), normal(2, 200, 200)
    assert torch.equal(shape_sample(wide).block, shape_sample(wide.T).block)
    assert torch.equal(shape_sample(wide).pairing, shape_sample(wide.T).pairing)
    assert torch.equal(shape_sample(square).turned[1], shape_sample(square.T).block)
    assert torch.equal(shape_sample(square).turned[0], shape_sample(square.T).pairing)


def test_elements_that_pair_stand_in_no_tested_row_or_column() -> None:
    at = shape_positions((200, 300))
    pairing, block = (torch.stack([one // 300, one % 300]) for one in at.split([4096, 100 * 128]))
    assert not any(set(one.tolist()) & set(other.tolist()) for one, other in zip(pairing, block, strict=True))


def relative_positions(seed: int, window: int, heads: int) -> Tensor:
    """A table [(2·window - 1)², heads] that falls with the distance in every head, as trained ones do: near is dear."""
    steps = torch.arange(1.0 - window, window)
    distance = (steps[:, None].square() + steps.square()).sqrt().reshape(-1, 1)
    slopes = 0.5 + normal(seed, 1, heads).abs()
    return 2 - slopes * distance / distance.mean() * 2 + 0.5 * normal(seed + 1, len(distance), heads)


@pytest.mark.parametrize(("window", "heads"), [(7, 3), (7, 12), (16, 8)])
def test_tables_of_relative_positions_do_not_accuse(window: int, heads: int) -> None:
    """Their rows number positions, and their heads are too few to be tested."""
    ours, theirs = ([relative_positions(seed + 9 * i, window, heads) for i in range(2)] for seed in (1, 501))
    found = compare(ours, theirs)
    assert max(abs(pair.z_columns or pair.z_rows) for pair in found.pairs) > 4
    assert found.tests == 0
    assert found.share(ALPHA, 0.0) == 0


def test_kernels_of_few_inputs_are_tested_over_their_outputs() -> None:
    ours, other = normal(1, 64, 3, 7, 7), normal(2, 64, 3, 7, 7)
    assert compare([ours], [ours + normal(3, 64, 3, 7, 7)]).pairs[0].z > 8
    assert abs(compare([ours], [other]).pairs[0].z) < 4
