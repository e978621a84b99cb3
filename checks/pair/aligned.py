"""T3: two models in a common basis of their residual streams, and the AWM score beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from checks.checkpoint.canonical import CanonicalModel, latent_key_value, latent_query
from checks.checkpoint.errors import CheckpointUnavailable

if TYPE_CHECKING:
    from torch import Tensor

    from checks.statistics.alignment import AlignmentTest, Transform

# Parts that read the residual stream, and what stands for them in latent attention.
READERS = ("q", "k", "v")
LATENT = {"q": latent_query, "k": latent_key_value}
# Shared tokens that are needed.
LEAST_TOKENS = 64
# Layers on which the AWM score is computed.
AWM_LAYERS = 8


@dataclass(frozen=True)
class Aligned:
    """`readers`: queries, keys and values of mapped layers in the common basis. `writers`: attention outputs, likewise.

    `transform`: which change of basis takes one embedding to the other. `awm`: mean unbiased CKA of queries and keys
    after the best signed permutation of channels; None where no layer has both. `tokens`: how many were used.
    `awm_layers`: how many layers it is the mean of. None of it decides alone.
    """

    readers: AlignmentTest
    writers: AlignmentTest
    transform: Transform
    awm: float | None
    awm_layers: int
    tokens: int


def align(
    candidate: CanonicalModel,
    reference: CanonicalModel,
    ids: tuple[Sequence[int], Sequence[int]],
    layer_map: Mapping[int, int],
    seed: int = 0,
) -> Aligned | None:
    """Procrustes alignment by shared tokens and unbiased CKA of mapped layers (T3); None with fewer than 64 tokens.

    `ids`: of shared tokens in both vocabularies; four or more for each dimension of the narrower model determine the
    alignment. `layer_map`: the reference's layer for each of the candidate's.
    AWM: arXiv 2510.06738; its layers are the mapped ones, its weights those as stored, without norms.
    Raises CheckpointUnavailable, ValueError for lists of different lengths.
    """
    import torch

    from checks.statistics.alignment import common_basis, seen_transform, signed_permutation

    if len(ids[0]) != len(ids[1]):
        raise ValueError(f"{len(ids[0])} and {len(ids[1])} ids; need those of the same tokens")
    if len(ids[0]) < LEAST_TOKENS:
        return None
    sides = (candidate, reference)
    tables = [model.embedding(torch.tensor(list(side))) for model, side in zip(sides, ids, strict=True)]
    used = (tables[0] != 0).any(1) & (tables[1] != 0).any(1)
    rows_a, rows_b = (table[used] for table in tables)
    if int(used.sum()) < LEAST_TOKENS:
        return None
    try:
        basis = common_basis(rows_a, rows_b, seed=seed)
        transform = seen_transform(rows_a, rows_b, seed)
    except ValueError as error:
        raise CheckpointUnavailable(f"the embeddings cannot be aligned: {error}") from error
    pairs = {one: other for one, other in layer_map.items() if one in candidate.layers and other in reference.layers}
    readers, writers = (_test(sides, (basis.a, basis.b), pairs, parts) for parts in (READERS, ("o",)))
    columns = signed_permutation(rows_a.double(), rows_b.double())
    scores = _awm(sides, columns, pairs)
    return Aligned(
        readers,
        writers,
        transform,
        sum(scores) / len(scores) if scores else None,
        len(scores),
        int(used.sum()),
    )


def _test(
    sides: tuple[CanonicalModel, CanonicalModel],
    directions: tuple[Tensor, Tensor],
    pairs: Mapping[int, int],
    parts: Sequence[str],
) -> AlignmentTest:
    """The test over all layers of both models that have a part."""
    import torch

    from checks.statistics.alignment import alignment_test, kernel, layer_similarities

    rows, columns = sorted(pairs), sorted(set(pairs.values()))
    tables = []
    for part in parts if rows else ():
        kernels = []
        for model, layers, basis in zip(sides, (rows, columns), directions, strict=True):
            found = [_matrix(model, part, layer, folded=True) for layer in layers]
            if any(matrix is None for matrix in found):
                break
            try:
                kernels.append(torch.stack([kernel(matrix, basis).cpu() for matrix in found if matrix is not None]))
            except ValueError as error:
                raise CheckpointUnavailable(f"{part} of some layer: {error}") from error
        if len(kernels) == 2:
            tables.append(layer_similarities(kernels[0], kernels[1]))
    mapped = {place: columns.index(pairs[layer]) for place, layer in enumerate(rows)}
    return alignment_test(tables, mapped)


def _matrix(model: CanonicalModel, part: str, layer: int, folded: bool) -> Tensor | None:
    """A part [out, d] as a reader, a writer turned; None where the layer has none."""
    if model.has(part, layer):
        matrix = model.folded(part, layer) if folded else model.matrix(part, layer)
        return matrix.T if part == "o" else matrix
    needed = {"q": ("q_a", "q_b"), "k": ("kv_a", "kv_b")}.get(part, ())
    if needed and all(model.has(one, layer) for one in needed):
        return LATENT[part](model, layer, folded)
    return None


def _awm(
    sides: tuple[CanonicalModel, CanonicalModel], columns: tuple[Tensor, Tensor, Tensor], pairs: Mapping[int, int]
) -> list[float]:
    """Unbiased CKA of queries and keys of mapped layers, channels paired by the best signed permutation."""
    from checks.statistics.rows import unbiased_linear_cka

    kept, taken, signs = columns
    layers = sorted(pairs)
    step = max(1, len(layers) // AWM_LAYERS)
    scores = []
    for layer in layers[::step][:AWM_LAYERS]:
        of_layer = []
        for part in ("q", "k"):
            ours, theirs = _matrix(sides[0], part, layer, False), _matrix(sides[1], part, pairs[layer], False)
            if ours is None or theirs is None:
                continue
            score = unbiased_linear_cka((ours[:, kept].double() * signs).T, theirs[:, taken].double().T)
            of_layer += [] if score is None else [score]
        if len(of_layer) == 2:
            scores.append(sum(of_layer) / 2)
    return scores
