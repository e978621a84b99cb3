"""Embedding and head of two models, rows paired by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from checks.checkpoint.canonical import CanonicalModel
from checks.checkpoint.errors import CheckpointUnavailable

if TYPE_CHECKING:
    from torch import Tensor

    from checks.statistics.clusters import CentroidSimilarity
    from checks.statistics.moments import MomentComparison
    from checks.statistics.rows import RowSimilarity

# An orthogonal map of more dimensions is fitted only on an accelerator: its decomposition is cubic.
LARGEST_ALIGNMENT_ON_CPU = 2048


@dataclass(frozen=True)
class TableComparison:
    """What two tables (`table`: embedding or head) have in common; centroids are None for different widths."""

    table: str
    rows: RowSimilarity
    centroids: CentroidSimilarity | None
    moments: MomentComparison


def compare_tables(
    candidate: CanonicalModel, reference: CanonicalModel, tokens: tuple[Sequence[int], Sequence[int]], seed: int = 0
) -> tuple[TableComparison, ...]:
    """Embedding and, where one of the models has its own, head, on tokens that both vocabularies share.

    `tokens`: ids of the same tokens in both vocabularies, see `checks.tokens.vocabulary.shared_tokens`; about four
    times as many as the smaller width, so that rotated copies can be aligned. Tables that are not there are left out.
    Raises CheckpointUnavailable for ids beyond a table and for values that are not finite.
    """
    from checks.statistics.clusters import centroid_similarity
    from checks.statistics.moments import compare_moments
    from checks.statistics.rows import row_similarity

    models = (candidate, reference)
    names = ["embedding"] if all(model.has("embedding") for model in models) else []
    if any(model.has("head") for model in models) and all(model.has("head") or names for model in models):
        names.append("head")
    found = []
    for name in names:
        ours, theirs = (_rows(model, name, ids) for model, ids in zip(models, tokens, strict=True))
        widths = ours.shape[1], theirs.shape[1]
        align = min(widths) <= LARGEST_ALIGNMENT_ON_CPU or ours.device.type != "cpu"
        centroids = centroid_similarity(ours, theirs, seed=seed) if widths[0] == widths[1] else None
        found.append(
            TableComparison(
                name, row_similarity(ours, theirs, seed, align), centroids, compare_moments(ours, theirs, paired=True)
            )
        )
    return tuple(found)


def _rows(model: CanonicalModel, table: str, ids: Sequence[int]) -> Tensor:
    import torch

    rows = torch.tensor(list(ids), dtype=torch.int64)
    try:
        values = model.embedding(rows) if table == "embedding" else model.head(rows)
    except IndexError as error:
        raise CheckpointUnavailable(
            f"the {table} has no row for token {max(ids)}; its tokenizer does not fit the checkpoint ({error})"
        ) from error
    if not bool(values.isfinite().all()):
        raise CheckpointUnavailable(f"the {table} holds non-finite values; no row statistic is defined")
    return values
