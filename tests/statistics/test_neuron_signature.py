from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from checks.statistics.assignment import best_assignment
from checks.statistics.neuron_signature import block_similarity, make_neurons, signature, summary


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mlp(seed: int, units: int = 64, width: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    """Gate, up and down of one layer; neurons of different sizes, some directions preferred."""
    spectrum = torch.linspace(2, 0.2, width)
    scale = (0.3 * normal(seed + 9, units, 1)).exp()
    gate, up, down = (normal(seed + i, units, width) * spectrum * scale for i in (1, 2, 3))
    return gate + 0.5 * up, up, (down + 0.5 * gate).T


def disguised(
    weights: tuple[Tensor, Tensor, Tensor], seed: int, negate: bool = True
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The same MLP renumbered, in a rotated basis, with neurons rescaled and negated; and the order of its neurons."""
    gate, up, down = weights
    order = normal(seed, len(gate)).argsort()
    turn = torch.linalg.qr(normal(seed + 1, gate.shape[1], gate.shape[1]))[0]
    factor = normal(seed + 2, len(gate), 1).exp()
    factor = factor * normal(seed + 3, len(gate), 1).sign() if negate else factor
    return order, ((gate @ turn)[order], (factor * up @ turn)[order], (turn.T @ down / factor.T)[:, order])


@given(seed=st.integers(0, 999))
@settings(deadline=None, max_examples=15)
def test_signatures_and_summaries_survive_every_disguise(seed: int) -> None:
    plain = mlp(seed)
    order, hidden = disguised(plain, seed + 50)
    one, other = make_neurons(*plain), make_neurons(*hidden)
    assert torch.allclose(signature(one)[order], signature(other), atol=0.02)
    assert torch.equal(best_assignment(signature(other) @ signature(one).T).columns, order)
    assert torch.allclose(summary(one), summary(other), atol=1e-3)


def test_signature_without_a_gate_keeps_signs() -> None:
    _, up, down = mlp(1)
    plain = signature(make_neurons(None, up, down))
    order, (_, turned, written) = disguised((up, up, down), 5, negate=False)
    assert torch.equal(best_assignment(signature(make_neurons(None, turned, written)) @ plain.T).columns, order)
    assert not torch.allclose(signature(make_neurons(None, -up, down)), plain, atol=0.02)


def test_another_mlp_is_less_similar_than_a_copy() -> None:
    base = signature(make_neurons(*mlp(1)))
    copy = signature(make_neurons(*(view + 0.1 * normal(40 + i, *view.shape) for i, view in enumerate(mlp(1)))))
    others = [signature(make_neurons(*mlp(seed))) for seed in (100, 200, 300)]
    assert float(block_similarity(base, copy)) > max(float(block_similarity(base, other)) for other in others)
    assert float(block_similarity(base, base[:20])) == pytest.approx(1, abs=1e-5)
    assert math.isnan(float(block_similarity(base, base[:0])))


def test_the_largest_neurons_are_chosen_whatever_their_scale() -> None:
    gate, up, down = mlp(1)
    some = make_neurons(gate, up, down, 20)
    sizes = gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)
    assert set(some.numbers.tolist()) == set(sizes.argsort(descending=True)[:20].tolist())
    assert some.numbers.tolist() == sorted(some.numbers.tolist())
    assert (some.count, some.total) == (20, 64)
    order, hidden = disguised((gate, up, down), 7)
    assert set(order[make_neurons(*hidden, 20).numbers].tolist()) == set(some.numbers.tolist())
    assert torch.allclose(some.fixed.norm(dim=1), torch.ones(20))


def test_zero_neurons_and_copies_are_left_out() -> None:
    gate, up, down = (view.clone() for view in mlp(1))
    up[3] = 0
    down[:, 5] = 0
    gate[8], up[8], down[:, 8] = gate[2], 4 * up[2], down[:, 2]
    kept = make_neurons(gate, up, down).numbers.tolist()
    assert kept == [i for i in range(64) if i not in (3, 5, 8)]
    # Equal readings alone are no copy.
    gate[9] = gate[2]
    assert 9 in make_neurons(gate, up, down).numbers.tolist()


def test_nothing_left() -> None:
    empty = make_neurons(torch.zeros(4, 8), torch.zeros(4, 8), torch.zeros(8, 4))
    assert empty.count == 0
    assert signature(empty).shape == (0, signature(make_neurons(*mlp(1))).shape[1])
    gateless = make_neurons(None, torch.zeros(4, 8), torch.zeros(8, 4))
    assert signature(gateless).shape == (0, signature(make_neurons(None, *mlp(1)[1:])).shape[1])
    with pytest.raises(ValueError, match="without neurons"):
        summary(empty)


def test_constant_views_have_finite_signatures() -> None:
    same = torch.eye(8)[[0] * 6]
    neurons = make_neurons(same + 0.01 * normal(1, 6, 8), same, same.T)
    assert bool(signature(neurons).isfinite().all())


def test_without_up_makes_both_kinds_comparable() -> None:
    gate, up, down = mlp(1)
    gated, plain = make_neurons(gate, up, down).without_up(), make_neurons(None, gate, down).without_up()
    assert gated.sign_free
    assert plain.sign_free
    assert signature(gated).shape == signature(plain).shape


def test_errors() -> None:
    gate, up, down = mlp(1)
    with pytest.raises(ValueError, match="shapes"):
        make_neurons(gate[:5], up, down)
    with pytest.raises(ValueError, match="shapes"):
        make_neurons(gate, up, down.T)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
def test_a_weight_that_is_not_finite_costs_its_neuron_alone(value: float) -> None:
    """The norm of a neuron with 3e38 is not finite."""
    for number in range(3):
        views = [view.clone() for view in mlp(1)]
        (views[number].T if number == 2 else views[number])[5, 3] = value
        found = make_neurons(*views)
        assert found.numbers.tolist() == [i for i in range(64) if i != 5]
        assert (found.count, found.total) == (63, 64)
        without = [view[:, found.numbers] if at == 2 else view[found.numbers] for at, view in enumerate(mlp(1))]
        expected = make_neurons(*without)
        assert torch.equal(found.fixed, expected.fixed)
        assert torch.equal(signature(found), signature(expected))
        assert torch.allclose(summary(found), summary(expected), atol=1e-6)


def test_an_mlp_without_any_finite_neuron_has_none() -> None:
    gate, up, down = mlp(1)
    found = make_neurons(gate, torch.full_like(up, math.nan), down, 20)
    assert (found.count, found.total) == (0, 64)
