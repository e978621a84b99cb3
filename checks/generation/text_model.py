"""What answers: the protocol of a text model, and how asking can fail."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Protocol, Self

from checks.checkpoint.errors import CheckpointUnavailable

LONGEST_ANSWER = 4_000  # characters of an answer that are kept
MOST_TOKENS = 512  # that are ever asked for at once


class ModelUnavailable(CheckpointUnavailable):
    """A model cannot be asked. Never evidence."""


class LocalModelUnavailable(ModelUnavailable):
    """The checkpoint cannot be run here."""


class EndpointUnreachable(ModelUnavailable):
    """Nothing answers at the endpoint's address."""


class EndpointTimedOut(ModelUnavailable):
    """The endpoint did not answer in time."""


class EndpointBusy(ModelUnavailable):
    """The endpoint asks to wait, for longer or more often than we are ready to."""


class EndpointRefused(ModelUnavailable):
    """The endpoint refuses the key, the model or the request."""


class MalformedAnswer(ModelUnavailable):
    """What the endpoint sent is not an answer of the protocol."""


class NotOffered(ModelUnavailable):
    """The model answers, and not in this form: a base model has no chat, some endpoints only have chat."""


class TextModel(Protocol):
    """Something that answers texts with texts, the same way every time as far as it can."""

    @property
    def description(self) -> dict[str, Any]:
        """What answered and how it was asked, for the record: no key, no machine."""

    def complete(self, text: str, tokens: int) -> str:
        """What follows `text`, of at most so many new tokens. Raises NotOffered, ModelUnavailable."""

    def complete_all(self, texts: Sequence[str], tokens: int) -> list[str]:
        """What follows each of the texts, in their order. Raises NotOffered, ModelUnavailable."""

    def reply(self, message: str, tokens: int) -> str:
        """The reply to a user's message in a new conversation. Raises NotOffered, ModelUnavailable."""

    def __enter__(self) -> Self:
        """The model, ready to be asked."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Gives back memory and connections."""


def bounded(tokens: int) -> int:
    """The number of tokens to ask for. Raises ValueError for one that nobody should ask for."""
    if not 1 <= tokens <= MOST_TOKENS:
        raise ValueError(f"{tokens} new tokens; expected 1 to {MOST_TOKENS}")
    return tokens


def kept(text: str) -> str:
    """An answer as it is kept: bounded, and without lone surrogates that no file could hold."""
    return text[:LONGEST_ANSWER].encode("utf-8", "replace").decode("utf-8")
