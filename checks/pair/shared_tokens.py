"""Tokens that both vocabularies have, and the tables with their rows: known from small files and headers alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from checks.checkpoint.canonical import CanonicalModel
from checks.checkpoint.checkpoint import Checkpoint
from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.model import Model
from checks.checkpoint.parts import Parts
from checks.checkpoint.stored_weight import stored_weight
from checks.streaming.read_plan import ReadPlan
from checks.tokens import shared_tokens, vocabulary_of

# Tokens for statistics of rows, per dimension of the narrower model, so that a rotation could be fitted; at least; and
# at most.
TOKENS_PER_DIMENSION = 4
FEWEST_TOKENS, MOST_TOKENS = 2048, 8192
SEED = 0


@dataclass(frozen=True)
class SharedTokens:
    """Ids of tokens that both vocabularies have, in one order; none, with the reason, if they are not to be had."""

    ids: tuple[Sequence[int], Sequence[int]]
    reason: str | None = None

    def __len__(self) -> int:
        return len(self.ids[0])

    def as_read(self, plan: ReadPlan) -> SharedTokens:
        """Those of them whose rows a plan reads."""
        if plan.tokens or not len(self):
            return SharedTokens((self.ids[0][: plan.tokens], self.ids[1][: plan.tokens]), self.reason)
        reason = (
            f"--read {plan.request.mode} reads no rows of the {len(self)} shared tokens: the budget has no room for "
            "them, or they are quantised; read more with a larger --budget, or all with --read full"
        )
        return SharedTokens(((), ()), reason)


def shared_tokens_of(candidate: Model, reference: Model) -> SharedTokens:
    """Tokens that both vocabularies have, by their text; none where a model has no tokenizer.

    Of one seed: neither model's order of ids has a say. Ids beyond a table have no part in the draw, since a tokenizer
    may know more tokens than the checkpoint has rows for. Raises CheckpointUnavailable when a tokenizer or a header
    cannot be had or read.
    """
    ours, theirs = (vocabulary_of(model) for model in (candidate, reference))
    if ours is None or theirs is None:
        missing = [model.name for model, one in ((candidate, ours), (reference, theirs)) if one is None]
        return SharedTokens(((), ()), f"no tokenizer of {' and '.join(missing)}")
    checkpoints = candidate.checkpoint, reference.checkpoint
    width = min(CanonicalModel(checkpoint).hidden_size for checkpoint in checkpoints)
    count = min(MOST_TOKENS, max(FEWEST_TOKENS, TOKENS_PER_DIMENSION * width))
    with_rows = [
        replace(vocabulary, texts=vocabulary.texts[:rows], ranks=vocabulary.ranks[:rows])
        for vocabulary, rows in zip((ours, theirs), map(_rows, checkpoints), strict=True)
    ]
    return SharedTokens(shared_tokens(with_rows[0], with_rows[1], count, SEED))


def token_tables(candidate: Checkpoint, reference: Checkpoint) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Stored names of embedding and, where it is stored by itself, head of both models; none if not all can be read by
    rows: a model has no embedding, or a table is quantised or transposed.
    """
    sides = [_tables(checkpoint) for checkpoint in (candidate, reference)]
    return (sides[0], sides[1]) if all(sides) else ((), ())


def _tables(checkpoint: Checkpoint) -> tuple[str, ...]:
    parts = Parts(checkpoint)
    if not parts.holds("embedding"):
        return ()
    holders = [parts.find(part) for part in ("embedding", "head") if parts.holds(part)]
    for holder in holders:
        try:
            weight = stored_weight(checkpoint, holder.name)
        except CheckpointUnavailable:
            return ()
        if weight.form != "plain" or len(weight.shape) != 2 or holder.role.layout.transposed:
            return ()
    return tuple(checkpoint.tensors[holder.name].stored_name for holder in holders)


def _rows(checkpoint: Checkpoint) -> int:
    """Rows of the shorter one of embedding and head: tables of positions, or of patches, have no row for a token."""
    parts = Parts(checkpoint)
    tables = [parts.shape(parts.find(part), part)[0] for part in ("embedding", "head") if parts.holds(part)]
    return min(tables, default=0)
