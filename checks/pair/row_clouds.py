"""Rows of two models over the residual channels, as clouds of points."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from checks.checkpoint.canonical import CanonicalModel

if TYPE_CHECKING:
    from torch import Tensor

    from checks.statistics.pca import CloudOverlap
    from checks.statistics.wasserstein import DistributionDistance

# Points of one cloud.
POINTS = 4096
# What a cloud of readers is taken from, beside up and gate.
READERS = ("q", "k", "v", "q_a", "kv_a")


def compare_clouds(candidate: CanonicalModel, reference: CanonicalModel, seed: int = 0) -> dict[str, CloudOverlap]:
    """Overlap of the joint principal components of embedding rows, and of rows that read the residual stream.

    Tokens, layers and neurons need not correspond. Empty for models of different width. Raises CheckpointUnavailable.
    """
    from checks.statistics.pca import cloud_overlap

    if candidate.hidden_size != reference.hidden_size:
        return {}
    found = {}
    if candidate.has("embedding") and reference.has("embedding"):
        ours, theirs = (_finite(model.once(embedding_points, seed)) for model in (candidate, reference))
        found["embedding"] = cloud_overlap(ours, theirs, seed=seed)
    ours, theirs = (_readers(model, seed) for model in (candidate, reference))
    if len(ours) and len(theirs):
        found["readers"] = cloud_overlap(ours, theirs, seed=seed)
    return found


def compare_elements(
    candidate: CanonicalModel, reference: CanonicalModel, seed: int = 0
) -> dict[str, DistributionDistance]:
    """Distance of the distributions of elements: embedding, attention, mlp; of the first, middle and last layer."""
    from checks.statistics.wasserstein import element_distance

    sides = [_elements(model, seed) for model in (candidate, reference)]
    return {name: element_distance(sides[0][name], sides[1][name], seed=seed) for name in sides[0] if name in sides[1]}


def visit_clouds(model: CanonicalModel, layer: int | None, seed: int = 0) -> None:
    """Takes what `compare_clouds` wants of a layer, or of the embedding, while it is at hand."""
    if layer is not None:
        model.once(layer_readers, layer, seed)
    elif model.has("embedding"):
        model.once(embedding_points, seed)


def visit_elements(model: CanonicalModel, layer: int | None, seed: int = 0) -> None:
    """Takes what `compare_elements` wants of a layer, or of the embedding, while it is at hand."""
    if layer in _element_layers(model):
        model.once(layer_elements, layer, seed)
    elif layer is None and model.has("embedding"):
        model.once(embedding_elements, seed)


def embedding_points(model: CanonicalModel, seed: int) -> Tensor:
    """Rows [n, d] of the embedding, evenly spread, 4096 at most."""
    return _spread(model.embedding(), POINTS, seed)


def layer_readers(model: CanonicalModel, layer: int, seed: int) -> tuple[Tensor, ...]:
    """Rows [n, d] of a layer's readers, as many of each, with their norms folded in; finite ones."""
    each = max(16, POINTS // max(1, len(model.layers) * (len(READERS) + 2)))
    pieces = [_spread(model.folded(part, layer), each, seed) for part in READERS if model.has(part, layer)]
    for place in model.mlps(layer)[:1]:
        mlp = model.mlp(place, folded=True, rows=_sample(place.units, each, seed))
        pieces += [mlp.up] if mlp.gate is None else [mlp.up, mlp.gate]
    return tuple(_finite(piece) for piece in pieces if piece.shape[1] == model.hidden_size)


def embedding_elements(model: CanonicalModel, seed: int) -> Tensor:
    """Some values of the embedding."""
    return _values(model.embedding(), seed)


def layer_elements(model: CanonicalModel, layer: int, seed: int) -> Mapping[str, tuple[Tensor, ...]]:
    """Some values of each matrix of a layer, by category."""
    found = {
        "attention": tuple(
            _values(model.matrix(part, layer), seed) for part in (*READERS, "o") if model.has(part, layer)
        )
    }
    for place in model.mlps(layer)[:1]:
        mlp = model.mlp(place)
        matrices = [mlp.up, mlp.down] if mlp.gate is None else [mlp.gate, mlp.up, mlp.down]
        found["mlp"] = tuple(_values(matrix, seed) for matrix in matrices)
    return found


def _readers(model: CanonicalModel, seed: int) -> Tensor:
    """Rows [n, d] of every layer's readers."""
    import torch

    pieces = [piece for layer in model.layers for piece in model.once(layer_readers, layer, seed)]
    return torch.cat(pieces) if pieces else torch.zeros(0, model.hidden_size)


def _element_layers(model: CanonicalModel) -> list[int]:
    """The first, middle and last layer."""
    layers = model.layers
    return sorted({layers[0], layers[len(layers) // 2], layers[-1]}) if layers else []


def _elements(model: CanonicalModel, seed: int) -> dict[str, Tensor]:
    """Sampled values by category."""
    import torch

    pieces: dict[str, list[Tensor]] = {}
    if model.has("embedding"):
        pieces["embedding"] = [model.once(embedding_elements, seed)]
    for layer in _element_layers(model):
        for category, values in model.once(layer_elements, layer, seed).items():
            pieces.setdefault(category, []).extend(values)
    return {name: torch.cat(values) for name, values in pieces.items() if values}


def _values(matrix: Tensor, seed: int) -> Tensor:
    at = _sample(matrix.numel(), 65_536, seed).to(matrix.device)
    return matrix[at // matrix.shape[1], at % matrix.shape[1]]


def _spread(rows: Tensor, count: int, seed: int) -> Tensor:
    return rows[_sample(rows.shape[0], count, seed).to(rows.device)]


def _sample(total: int, count: int, seed: int) -> Tensor:
    from checks.statistics.positions import sample_positions

    return sample_positions(total, count, seed)


def _finite(rows: Tensor) -> Tensor:
    return rows[rows.isfinite().all(1)]
