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


class CommonFrame:
    """The common basis of two residual streams, and what layers look like in it: small, and made once of each layer.

    `transform`: which change of basis takes one embedding to the other. `tokens`: how many shared ones were used.
    """

    def __init__(
        self,
        sides: tuple[CanonicalModel, CanonicalModel],
        directions: tuple[Tensor, Tensor],
        columns: tuple[Tensor, Tensor, Tensor],
        transform: Transform,
        tokens: int,
    ) -> None:
        self.sides = sides
        self.transform = transform
        self.tokens = tokens
        self._directions = directions
        self._columns = columns
        self._kernels: dict[tuple[int, str, int], Tensor | None] = {}
        self._scores: dict[tuple[int, int], float | None] = {}

    def kernel(self, side: int, part: str, layer: int) -> Tensor | None:
        """What a part of a layer reads, or writes, of each direction: [k, k] on the CPU; None if there is no such part.

        Raises CheckpointUnavailable.
        """
        from checks.statistics.alignment import kernel

        if (side, part, layer) not in self._kernels:
            matrix = _matrix(self.sides[side], part, layer, folded=True)
            try:
                found = None if matrix is None else kernel(matrix, self._directions[side]).cpu()
            except ValueError as error:
                raise CheckpointUnavailable(f"{part} of some layer: {error}") from error
            self._kernels[side, part, layer] = found
        return self._kernels[side, part, layer]

    def awm(self, ours: int, theirs: int) -> float | None:
        """Unbiased CKA of queries and keys of two layers, channels paired by the best signed permutation; None without
        both. Raises CheckpointUnavailable."""
        from checks.statistics.rows import unbiased_linear_cka

        if (ours, theirs) not in self._scores:
            kept, taken, signs = self._columns
            scores = []
            for part in ("q", "k"):
                one, other = _matrix(self.sides[0], part, ours, False), _matrix(self.sides[1], part, theirs, False)
                if one is None or other is None:
                    continue
                score = unbiased_linear_cka((one[:, kept].double() * signs).T, other[:, taken].double().T)
                scores += [] if score is None else [score]
            self._scores[ours, theirs] = sum(scores) / 2 if len(scores) == 2 else None
        return self._scores[ours, theirs]

    def visit(self, layer: int) -> None:
        """Take what `align_in` wants of this layer of either model while it is at hand."""
        for side, model in enumerate(self.sides):
            for part in (*READERS, "o") if layer in model.layers else ():
                self.kernel(side, part, layer)
        if layer in _awm_layers(self.sides[0].layers) and layer in self.sides[1].layers:
            self.awm(layer, layer)


def common_frame(
    candidate: CanonicalModel, reference: CanonicalModel, ids: tuple[Sequence[int], Sequence[int]], seed: int = 0
) -> CommonFrame | None:
    """Procrustes alignment of two embeddings by shared tokens; None with fewer than 64 of them.

    `ids`: of shared tokens in both vocabularies; four or more for each dimension of the narrower model determine the
    alignment. Raises CheckpointUnavailable, ValueError for lists of different lengths.
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
    columns = signed_permutation(rows_a.double(), rows_b.double())
    return CommonFrame(sides, (basis.a, basis.b), columns, transform, int(used.sum()))


def align_in(frame: CommonFrame, layer_map: Mapping[int, int]) -> Aligned:
    """Unbiased CKA of mapped layers in a common frame (T3).

    `layer_map`: the reference's layer for each of the candidate's.
    AWM: arXiv 2510.06738; its layers are the mapped ones, its weights those as stored, without norms.
    Raises CheckpointUnavailable.
    """
    ours, theirs = (model.layers for model in frame.sides)
    pairs = {one: other for one, other in layer_map.items() if one in ours and other in theirs}
    readers, writers = (_test(frame, pairs, parts) for parts in (READERS, ("o",)))
    found = [frame.awm(layer, pairs[layer]) for layer in _awm_layers(sorted(pairs))]
    scores = [score for score in found if score is not None]
    awm = sum(scores) / len(scores) if scores else None
    return Aligned(readers, writers, frame.transform, awm, len(scores), frame.tokens)


def _awm_layers(layers: Sequence[int]) -> Sequence[int]:
    """The layers on which the AWM score is computed."""
    return layers[:: max(1, len(layers) // AWM_LAYERS)][:AWM_LAYERS]


def _test(frame: CommonFrame, pairs: Mapping[int, int], parts: Sequence[str]) -> AlignmentTest:
    """The test over all layers of both models that have a part."""
    import torch

    from checks.statistics.alignment import alignment_test, layer_similarities

    rows, columns = sorted(pairs), sorted(set(pairs.values()))
    tables = []
    for part in parts if rows else ():
        kernels = []
        for side, layers in enumerate((rows, columns)):
            found = [frame.kernel(side, part, layer) for layer in layers]
            if any(one is None for one in found):
                break
            kernels.append(torch.stack([one for one in found if one is not None]))
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
