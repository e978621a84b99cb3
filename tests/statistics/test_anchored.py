from __future__ import annotations

import pytest
import torch
from torch import Tensor

from checks.statistics.anchored import anchored_matchings
from checks.statistics.neuron_signature import Neurons, make_neurons

UNITS, WIDTH, LAYERS = 96, 32, 3


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


Mlp = tuple[Tensor | None, Tensor, Tensor]


def model(seed: int, layers: int = LAYERS, gated: bool = True) -> list[Mlp]:
    """MLPs whose neurons prefer some directions, as trained ones do."""
    spectrum = torch.linspace(2, 0.2, WIDTH)
    made: list[Mlp] = []
    for layer in range(layers):
        first, up, down = (normal(1000 * seed + 10 * layer + i, UNITS, WIDTH) * spectrum for i in range(3))
        made.append((first, up, (down + 0.5 * first).T) if gated else (None, up, (down + 0.5 * up).T))
    return made


def disguised(mlps: list[Mlp], seed: int, noise: float = 0.0, keep: int = UNITS) -> list[Mlp]:
    """The same model rotated, its neurons renumbered, negated and rescaled, noise added, some neurons pruned."""
    turn = torch.linalg.qr(normal(seed, WIDTH, WIDTH))[0]
    changed: list[Mlp] = []
    for layer, (gate, up, down) in enumerate(mlps):
        order = normal(seed + layer + 1, UNITS).argsort()[:keep]
        factor = normal(seed + layer + 50, UNITS, 1).exp()
        if gate is not None:
            factor = factor * normal(seed + layer + 70, UNITS, 1).sign()
        views = [factor * up, (down / factor.T).T] if gate is None else [gate, factor * up, (down / factor.T).T]
        views = [
            (view + noise * view.norm(dim=1, keepdim=True) / WIDTH**0.5 * normal(seed + 99 * i + layer, UNITS, WIDTH))
            @ turn
            for i, view in enumerate(views, start=1)
        ]
        views = [view[order] for view in views]
        changed.append((None, views[0], views[1].T) if gate is None else (views[0], views[1], views[2].T))
    return changed


def neurons(mlps: list[Mlp]) -> list[Neurons]:
    return [make_neurons(*mlp) for mlp in mlps]


SAME = [(i, i) for i in range(LAYERS)]
OTHER = [(i, j) for i in range(LAYERS) for j in range(LAYERS) if i != j]


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("keep", [UNITS, 60])
def test_a_disguised_copy_is_found_and_mismatched_layers_are_not(gated: bool, keep: int) -> None:
    base = model(1, gated=gated)
    found = anchored_matchings(neurons(disguised(base, 5, 0.2, keep)), neurons(base), SAME, OTHER)
    assert len(found.mapped) == LAYERS
    for one in found.mapped:
        assert one.units == keep
        assert one.agreement > 0.9
    assert len(found.mismatched) == len(OTHER)
    assert max(one.agreement for one in found.mismatched) < 0.12
    # The larger side may be the candidate's as well.
    turned = anchored_matchings(neurons(base), neurons(disguised(base, 5, 0.2, keep)), SAME, [])
    assert min(one.agreement for one in turned.mapped) > 0.9


def test_independent_models_agree_by_chance_only() -> None:
    counts = []
    for seed in range(12):
        found = anchored_matchings(neurons(model(2 * seed + 10)), neurons(model(2 * seed + 11)), SAME, seed=seed)
        counts += [float(one.agreements) for one in found.mapped]
    # Poisson(1) in 36 blocks: mean within .5 (three standard errors), none above 8 (p = 4e-5).
    assert sum(counts) / len(counts) < 1.8
    assert max(counts) <= 8


def test_one_inherited_layer_is_found_by_its_own_anchors() -> None:
    base, other = model(1, 6), model(2, 6)
    mixed = [*other[:2], base[2], *other[3:]]
    found = anchored_matchings(neurons(disguised(mixed, 5, 0.1)), neurons(base), [(i, i) for i in range(6)])
    agreements = [one.agreement for one in found.mapped]
    assert agreements[2] > 0.9
    assert max(agreements[:2] + agreements[3:]) < 0.12
    alone = anchored_matchings(neurons(disguised([base[2]], 5, 0.1)), neurons([base[2]]), [(0, 0)])
    assert alone.mapped[0].agreement > 0.9


def test_what_the_anchors_show() -> None:
    base = model(1)
    same = anchored_matchings(neurons(base), neurons(base), SAME)
    assert same.same_number == 1
    assert torch.allclose(same.directions[0], same.directions[1])
    hidden = anchored_matchings(neurons(disguised(base, 5)), neurons(base), SAME)
    assert hidden.same_number < 0.1
    turn = torch.linalg.lstsq(hidden.directions[1], hidden.directions[0]).solution
    assert torch.allclose(turn @ turn.T, torch.eye(WIDTH), atol=1e-3)


def test_repeats_itself() -> None:
    a, b = neurons(model(1)), neurons(disguised(model(1), 5, 0.5))
    assert anchored_matchings(a, b, SAME, OTHER, seed=3).mapped == anchored_matchings(a, b, SAME, OTHER, seed=3).mapped


def test_nothing_to_match() -> None:
    assert anchored_matchings([], [], []).mapped == ()
    few = [make_neurons(*(view[:1] if i < 2 else view[:, :1] for i, view in enumerate(mlp))) for mlp in model(1)]
    found = anchored_matchings(few, neurons(model(2)), SAME, OTHER)
    assert all(one.z is None for one in found.mapped)
    # Two layers leave no anchor that is a neuron of neither.
    two = anchored_matchings(neurons(model(1, 2)), neurons(model(2, 2)), [(0, 0), (1, 1)], [(0, 1), (1, 0)])
    assert len(two.mapped) == 2
    assert two.mismatched == ()


def test_errors() -> None:
    with pytest.raises(ValueError, match="pair"):
        anchored_matchings(neurons(model(1)), neurons(model(2)), [(0, 7)])
    with pytest.raises(ValueError, match="without_up"):
        anchored_matchings(neurons(model(1)), neurons(model(2, gated=False)), SAME)
