from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from checks.statistics.sketch import BITS, best_matches, compare_sketches, sketch, sketch_of, sketch_positions


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def related(a: Tensor, correlation: float, seed: int) -> Tensor:
    return correlation * a + math.sqrt(1 - correlation**2) * normal(seed, *a.shape)


def quartile_codes(x: Tensor) -> Tensor:
    ranked = x.flatten().sort().values
    return torch.bucketize(x.flatten(), ranked[[len(ranked) * k // 4 for k in (1, 2, 3)]], right=True)


def test_independent_tensors_have_the_expected_values() -> None:
    found = [compare_sketches(sketch(normal(2 * s, 100, 90)), sketch(normal(2 * s + 1, 90, 100))) for s in range(60)]
    assert found[0].expected_jaccard == pytest.approx(1 / 7, abs=1e-6)
    jaccard = torch.tensor([one.jaccard for one in found])
    hamming = torch.tensor([one.hamming for one in found])
    # The estimate scatters by jaccard_sd; the true index of 9000 positions by .7 percent more.
    assert float(jaccard.mean()) == pytest.approx(1 / 7, abs=0.005)
    assert 0.6 * found[0].jaccard_sd < float(jaccard.std()) < 1.6 * found[0].jaccard_sd
    assert float(jaccard.max()) < 0.2
    assert float(hamming.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(hamming.min()) > 0.4


@pytest.mark.parametrize("correlation", [0.3, 0.9, 0.975, 0.999])
def test_estimates_agree_with_the_sets_and_with_the_angle(correlation: float) -> None:
    a = normal(1, 60_000)
    b = related(a, correlation, 2)
    found = compare_sketches(sketch(a), sketch(b))
    agree = float((quartile_codes(a) == quartile_codes(b)).double().mean())
    assert found.jaccard == pytest.approx(agree / (2 - agree), abs=4 * 0.5 / math.sqrt(BITS))
    assert found.hamming == pytest.approx(math.acos(correlation) / math.pi, abs=0.04)


@given(seed=st.integers(0, 999), n=st.integers(64, 400))
@settings(deadline=None, max_examples=15)
def test_scale_mean_shape_and_dtype_do_not_matter(seed: int, n: int) -> None:
    a = normal(seed, n).float().double()
    plain = sketch(a)
    for other in (3 * a, 1e-30 * a, a.float(), a.reshape(1, n, 1)):
        assert torch.equal(sketch(other).minhash, plain.minhash)
        assert torch.equal(sketch(other).simhash, plain.simhash)
    moved = compare_sketches(sketch(a + 5), plain)
    assert moved.jaccard == 1
    assert moved.hamming < 0.01
    assert compare_sketches(plain, plain).jaccard == 1
    assert compare_sketches(sketch(-a), plain).hamming > 0.9
    assert not torch.equal(sketch(a, seed=1).minhash, plain.minhash)


def test_renamed_and_reordered_tensors_are_found() -> None:
    tensors = [normal(s, 64, 80) for s in range(12)] + [normal(50 + s, 128) + 5 for s in range(4)]
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3)).tolist()
    copies = [related(tensors[i] - tensors[i].mean(), 0.99, 100 + i) for i in order]
    matches = best_matches([sketch(one) for one in copies], [sketch(one) for one in tensors])
    assert [match.other for match in matches] == order
    assert min(match.similarity.jaccard for match in matches[:12]) > 0.5
    apart = best_matches([sketch(normal(300 + s, 64, 80)) for s in range(12)], [sketch(one) for one in tensors])
    assert max(match.similarity.jaccard for match in apart) < 0.25
    assert best_matches([sketch(normal(1, 77))], [sketch(one) for one in tensors]) == []


def test_quantised_weights_keep_their_sketch() -> None:
    a = normal(1, 300, 200)
    scale = a.abs().max() / 7
    four_bits = (a / scale).round() * scale
    found = compare_sketches(sketch(a), sketch(four_bits))
    assert found.jaccard > 0.4
    # Sixteen levels fill the codes unevenly, and independent tensors agree more often: the expectation says so.
    uneven = compare_sketches(sketch(four_bits), sketch((normal(2, 300, 200) / scale).round()))
    assert uneven.expected_jaccard > 0.15
    assert uneven.jaccard == pytest.approx(uneven.expected_jaccard, abs=5 * uneven.jaccard_sd)


def test_norms_of_independent_models_do_not_match() -> None:
    """Raw cosine .9999."""
    found = compare_sketches(sketch(1 + 0.01 * normal(1, 4096)), sketch(1 + 0.01 * normal(2, 4096)))
    assert found.jaccard < 0.25
    assert found.hamming > 0.4


def test_no_sketch_with_a_reason() -> None:
    for tensor, words in (
        (torch.zeros(0), "need 64"),
        (normal(1, 63), "need 64"),
        (torch.ones(100), "constant"),
        (torch.full((100,), math.nan), "non-finite"),
        (torch.cat([torch.zeros(99), torch.ones(1)]), "quartiles are equal"),
    ):
        one = sketch(tensor)
        assert one.minhash is None
        assert words in one.reason
        assert compare_sketches(one, sketch(tensor)).jaccard is None
    with pytest.raises(TypeError, match="dequantise"):
        sketch(torch.ones(100, dtype=torch.int8))
    with pytest.raises(ValueError, match="cannot be compared"):
        compare_sketches(sketch(normal(1, 100)), sketch(normal(1, 101)))


@pytest.mark.parametrize("elements", [63, 64, 5000, 400_000])
def test_a_sketch_needs_its_positions_alone(elements: int) -> None:
    tensor = normal(1, elements)
    whole, found = sketch(tensor, 3), sketch_of(tensor[sketch_positions(elements, 3)], elements, 3)
    assert (found.reason, found.frequencies) == (whole.reason, whole.frequencies)
    assert found.minhash is None or torch.equal(found.minhash, whole.minhash)
    assert found.simhash is None or torch.equal(found.simhash, whole.simhash)
