"""Does a question arise for a pair at all? No family of checks of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from checks.checkpoint.model import Model
    from checks.evidence.judge import Judge
    from checks.pair.pair import Pair


def require_text_decoder(model: Model, judge: Judge, what: str) -> None:
    """Not applicable to a component beside the text decoder, as a vision encoder or a projector."""
    if model.component not in (None, "text", "model"):
        judge.not_applicable(f"{what} is judged with the text decoder")


def have_layers(pair: Pair) -> bool:
    """Has each model layers of its own? Raises CheckpointUnavailable."""
    return all(model.layers for model in pair.canonical)


def have_embeddings(pair: Pair) -> bool:
    """Has each model a token embedding? Raises CheckpointUnavailable."""
    return all(model.has("embedding") for model in pair.canonical)


def require_layers(pair: Pair, judge: Judge) -> None:
    """Not applicable where a model has no layers of its own. Raises CheckpointUnavailable."""
    if not have_layers(pair):
        judge.not_applicable("a model has no layers of its own", read=pair.read())


def require_embeddings(pair: Pair, judge: Judge) -> None:
    """Not applicable where a model has no token embedding. Raises CheckpointUnavailable."""
    if not have_embeddings(pair):
        judge.not_applicable("a model has no token embedding", read=pair.read())
