"""The last step of every reader: from a file's tokens to a Vocabulary, with the bounds that all files share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from checks.tokens.vocabulary import Vocabulary

MOST_TOKENS = 2_000_000  # the largest public vocabularies have about 260,000
LONGEST_TOKEN = 100_000  # bytes


class UnreadableTokenizer(ValueError):
    """The file is not a tokenizer of the format that its name says."""


@dataclass
class Tokens:
    """What a reader found: ordinary tokens by id, special ones by text, ranks by id, byte-fallback ids."""

    kind: str
    ordinary: dict[int, bytes] = field(default_factory=dict)
    special: dict[str, int] = field(default_factory=dict)
    ranks: dict[int, int] = field(default_factory=dict)
    ranks_from: str = "ids"  # as in Vocabulary
    fallback: set[int] = field(default_factory=set)
    merges: int | None = None
    byte_level: bool = True
    roles: dict[str, str] = field(default_factory=dict)

    def add(self, index: Any, text: bytes) -> None:
        """An ordinary token. Raises UnreadableTokenizer for an id or a size beyond the bounds."""
        if len(text) > LONGEST_TOKEN:
            raise UnreadableTokenizer(f"token {index} has {len(text)} bytes; at most {LONGEST_TOKEN} are read")
        if text:
            self.ordinary[checked_id(index)] = text

    def add_special(self, index: Any, text: str) -> None:
        """A special token; it is no ordinary one, whatever the vocabulary says."""
        self.special[text[:LONGEST_TOKEN]] = checked_id(index)

    def build(self, sha256: Mapping[str, str]) -> Vocabulary:
        """The vocabulary. Raises UnreadableTokenizer when there is no ordinary token."""
        for index in self.special.values():
            self.ordinary.pop(index, None)
            self.fallback.discard(index)
        written = {text for index, text in self.ordinary.items() if index not in self.fallback}
        for index in self.fallback & self.ordinary.keys():
            if self.ordinary[index] in written:
                del self.ordinary[index]
        if not self.ordinary:
            raise UnreadableTokenizer("there is no ordinary token in it")
        size = 1 + max(*self.ordinary, *self.special.values(), 0)
        texts: list[bytes | None] = [None] * size
        for index, text in self.ordinary.items():
            texts[index] = text
        return Vocabulary(
            kind=self.kind,
            texts=tuple(texts),
            ranks=tuple(self._ranks(texts)),
            ranks_from=self.ranks_from,
            special=MappingProxyType(dict(sorted(self.special.items(), key=lambda item: item[1]))),
            roles=MappingProxyType(dict(self.roles)),
            merges=self.merges,
            byte_level=self.byte_level,
            sha256=MappingProxyType(dict(sha256)),
        )

    def _ranks(self, texts: Sequence[bytes | None]) -> list[int | None]:
        """Ranks by id. Single bytes are no merges, so that a file's order of them is nobody's choice of merges."""
        return [
            self.ranks.get(index) if text is not None and len(text) > 1 else None for index, text in enumerate(texts)
        ]


def checked_id(index: Any) -> int:
    """An id within the bounds. Raises UnreadableTokenizer."""
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < MOST_TOKENS:
        raise UnreadableTokenizer(f"{index!r:.40} is no token id; expected a whole number below {MOST_TOKENS}")
    return index
