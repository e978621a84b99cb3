"""A tokenizer's vocabulary in one form, whatever file it came from."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

BPE = "BPE"
UNIGRAM = "unigram"
WORDPIECE = "WordPiece"


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id as the bytes that they stand for.

    texts: by id; None for special and unused ids. A space is a space, whether the file wrote it as byte-level `Ġ` or as
    metaspace `▁`; a byte-fallback token `<0x0A>` is its byte, or None where an ordinary token stands for that byte too.
    ranks: by id, the order in which tokens were learnt; None for what is no merge. ranks_from: "merges", the first that
    makes the token; "ranks", as the file has them; "ids", their order in a file whose kind needs no merges; or "none"
    for a BPE vocabulary whose merges are not at hand, so that no token has a rank. special: special tokens by text.
    roles: "bos", "eos" and so on, where the files name them. merges: how many merges the file lists.
    byte_level: tokens are built from single bytes, not from characters. sha256: of the files that were read, by name.
    """

    kind: str
    texts: tuple[bytes | None, ...]
    ranks: tuple[int | None, ...]
    ranks_from: str
    special: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    roles: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    merges: int | None = None
    byte_level: bool = True
    sha256: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))

    def ids(self) -> dict[bytes, int]:
        """The id of every ordinary token; the first one where several stand for the same bytes."""
        found: dict[bytes, int] = {}
        for index, text in enumerate(self.texts):
            if text is not None:
                found.setdefault(text, index)
        return found

    def numbered(self) -> dict[bytes, int]:
        """The id of every ordinary and every special token, by its bytes."""
        return self.ids() | {text.encode("utf-8", "surrogatepass"): index for text, index in self.special.items()}

    def rank_of(self) -> dict[bytes, int]:
        """The rank of every ordinary token that has one; the lowest where several stand for the same bytes."""
        found: dict[bytes, int] = {}
        for text, rank in zip(self.texts, self.ranks, strict=True):
            if text is not None and rank is not None and rank < found.get(text, rank + 1):
                found[text] = rank
        return found


def shared_tokens(a: Vocabulary, b: Vocabulary, count: int, seed: int = 0) -> tuple[list[int], list[int]]:
    """Ids, in `a` and in `b`, of at most `count` ordinary tokens that both have.

    The choice and its order follow a keyed hash of the token's bytes: it depends on nothing else than the set of common
    texts and the seed, so that neither model's order of ids has a say. Raises ValueError for a negative count.
    """
    if count < 0:
        raise ValueError(f"count must not be negative, got {count}")
    ours, theirs = a.ids(), b.ids()
    key = seed.to_bytes(8, "little", signed=True)

    def by_hash(text: bytes) -> tuple[bytes, bytes]:
        return hashlib.blake2b(text, digest_size=8, key=key).digest(), text

    chosen = sorted(ours.keys() & theirs.keys(), key=by_hash)[:count]
    return [ours[text] for text in chosen], [theirs[text] for text in chosen]
