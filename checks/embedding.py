"""Embeddings and heads, rows paired by the text of their token, whatever the vocabularies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from checks.applicable import require_embeddings
from checks.evidence.decisions import Score
from checks.pair import measures

if TYPE_CHECKING:
    from checks.evidence.judge import Judge
    from checks.pair.embedding_rows import TableComparison
    from checks.pair.pair import Pair

FEWEST_TOKENS = 64


def rows(pair: Pair, judge: Judge) -> None:
    """Do the rows of tokens that both vocabularies have agree channel by channel?

    Null hypothesis: independent initialisation; any renumbering of the residual channels was as likely as the one
    found, whatever both models learned about the tokens.
    Statistic: exact permutation z of the channels over centred rows of shared tokens, of embedding and head; the effect
    is the mean centred cosine of channels. Recorded beside it: mean row cosine, the same after the best rotation,
    linear CKA (well above 0 between any two models that learned the same language).
    Documented: weight-analysis.md, "Embedding"; test: Zhu et al., arXiv 2502.12292, theorem 1, over channels.
    Known false positives: a shared initialisation seed.
    Blind to: rotated or permuted residual streams; embeddings that were replaced; fewer than 64 shared tokens.
    """
    tables = _tables(pair, judge)
    scores = [
        Score(one.table, one.rows.channel_z, one.rows.channel_effect, abs(one.rows.channel_z / one.rows.channel_effect))
        for one in tables
        if one.rows.channel_z is not None and one.rows.channel_effect
    ]
    details: dict[str, Any] = {"read": pair.read(), "rows": {one.table: _of_rows(one) for one in tables}}
    if not scores:
        widths = {one.rows.width_a for one in tables} ^ {one.rows.width_b for one in tables}
        if widths:
            judge.not_applicable("the residual streams differ in width", **details)
        judge.inconclusive("no power: " + "; ".join(str(one.rows.reason) for one in tables), **details)
    judge.scores(scores, **details, note="a shared initialisation seed trips this test too")


def centroids(pair: Pair, judge: Judge) -> None:
    """Do k-means centroids of the shared tokens' rows lie in the same places?

    Null hypothesis: independent training; after a random permutation of the channels centroids match as well.
    Statistic: mean cosine of centroids after the best assignment, -1 to 1.
    Documented: weight-analysis.md, "Embedding" (clustering); k and null of this suite.
    Blind to: rotated or permuted residual streams, replaced embeddings. Not calibrated.
    """
    tables = [one for one in _tables(pair, judge) if one.table == "embedding"]
    found = tables[0].centroids if tables else None
    if found is None:
        judge.not_applicable("the residual streams differ in width", read=pair.read())
    judge(
        found.cosine,
        read=pair.read(),
        z=found.z,
        null_mean=found.null_mean,
        null_sd=found.null_sd,
        clusters=found.clusters,
        seed=found.seed,
    )


def moments(pair: Pair, judge: Judge) -> None:
    """Do the lengths of the shared tokens' rows follow each other?

    Null hypothesis: none that is exact: frequent tokens have other lengths than rare ones in any model.
    Statistic: correlation of the log L2 norms of paired rows, -1 to 1; beside it the relative differences of mean norm
    and variance that the documents compare.
    Documented: weight-analysis.md, "Embedding" (L2 norm, variance). Blind to: almost everything.
    """
    tables = [one for one in _tables(pair, judge) if one.table == "embedding"]
    if not tables:
        judge.not_applicable("a model has no embedding", read=pair.read())
    found = tables[0].moments
    judge(
        found.norm_correlation,
        read=pair.read(),
        pairs=found.pairs,
        norm_difference=found.norm_difference,
        variance_difference=found.variance_difference,
    )


def _tables(pair: Pair, judge: Judge) -> tuple[TableComparison, ...]:
    """The tables of the pair; without enough shared tokens the case is inconclusive."""
    require_embeddings(pair, judge)
    shared = pair.once(measures.tokens)
    if len(shared) < FEWEST_TOKENS:
        judge.inconclusive(
            shared.reason or f"no power: {len(shared)} tokens are shared, {FEWEST_TOKENS} are needed", read=pair.read()
        )
    return pair.once(measures.tables)


def _of_rows(one: TableComparison) -> dict[str, Any]:
    names = ("tokens", "cosine", "token_z", "cka", "aligned_cosine", "residual", "reason")
    return {name: getattr(one.rows, name) for name in names}
