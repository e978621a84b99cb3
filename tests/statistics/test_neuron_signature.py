from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from checks.statistics import neuron_signature
from checks.statistics.assignment import best_assignment
from checks.statistics.layer_map import expert_pairs
from checks.statistics.neuron_signature import Neurons, block_similarity, make_neurons, signature, summary


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


def test_a_summary_is_of_the_largest_neurons_however_many_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """The two sides of a pair hold different numbers of neurons of one MLP."""
    monkeypatch.setattr(neuron_signature, "POPULATION", 24)
    for weights in (mlp(1), (None, *mlp(1)[1:])):
        few, more, everything = (summary(make_neurons(*weights, count)) for count in (24, 40, None))
        assert torch.allclose(few, more, atol=1e-6)
        assert torch.allclose(few, everything, atol=1e-6)


@given(seed=st.integers(0, 99), factor=st.floats(0.01, 100))
@settings(deadline=None, max_examples=15)
def test_a_summary_does_not_change_with_the_scale_of_the_mlp(seed: int, factor: float) -> None:
    """Training on grows or shrinks all norms of a model alike."""
    gate, up, down = mlp(seed)
    plain = summary(make_neurons(gate, up, down))
    assert torch.allclose(summary(make_neurons(factor * gate, factor * up, down)), plain, atol=2e-4)
    assert torch.allclose(summary(make_neurons(gate, up, factor * down)), plain, atol=2e-4)
    uneven = torch.linspace(1, 2, len(gate))[:, None]
    assert not torch.allclose(summary(make_neurons(uneven * gate, up, down)), plain, atol=2e-4)


def renumbered_copies(noise: float, experts: int = 24, units: int = 256, width: int = 448) -> tuple[list[Neurons], ...]:
    """Experts of random weights, half of whose neurons are held; and noisy copies, renumbered and turned, all held.

    As wide and as many as of a large mixture, divided by 16 (7168 wide, 2048 units) and 8 (192 experts).
    """
    turn = torch.linalg.qr(normal(7, width, width))[0]
    candidates, references = [], []
    for expert in range(experts):
        gate, up, down = (normal(10 * expert + i, units, width) for i in (1, 2, 3))
        candidates.append(make_neurons(gate, up, down.T, units // 2))
        order = normal(expert, units).argsort()
        noisy = [view + noise * normal(10 * expert + 5 + i, units, width) for i, view in enumerate((gate, up, down))]
        gate, up, down = ((view @ turn)[order] for view in noisy)
        references.append(make_neurons(gate, up, down.T))
    return candidates, references


@pytest.mark.parametrize(("noise", "least"), [(0.2, 16), (0.3, 15)])
def test_experts_among_many_find_their_noisy_copies(noise: float, least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neuron_signature, "POPULATION", 128)
    candidates, references = (torch.stack([summary(one) for one in side]) for side in renumbered_copies(noise))
    some = torch.arange(24)[torch.linspace(0, 23, 16).round().long()]
    pairs, compared = expert_pairs(candidates[some], references, 16)
    assert compared == 16 * 24
    assert sum(int(some[pair.candidate]) == pair.reference for pair in pairs) >= least
    # The copies alone are near: where they are missing, what is nearest is further off than any of them.
    far = expert_pairs(candidates[:12], references[12:], 12)[0]
    near = expert_pairs(candidates[:12], references[:12], 12)[0]
    assert min(pair.distance for pair in far) > sorted(pair.distance for pair in near)[9]


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
