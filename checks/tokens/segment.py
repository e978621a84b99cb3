"""Cuts a text into words and each word into tokens, with nothing of a tokenizer but its vocabulary and its ranks.

Words are found alike for every tokenizer, by GPT-2's rule, so that what differs is what was learnt. A tokenizer's own
rule for words (digits one by one or in threes, say) shows only as far as its vocabulary does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import yaml

from checks.tokens.vocabulary import BPE, Vocabulary

TEXT_FILE = Path(__file__).with_name("text.yaml")
LETTER = r"[^\W\d_]"
WORDS = re.compile(
    rf"'s|'t|'re|'ve|'m|'ll|'d| ?{LETTER}+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+",
)


@cache
def fixed_text() -> Mapping[str, str]:
    """The text that `tokenizer.segmentation` cuts, by part: Korean, English, code, digits."""
    document = yaml.safe_load(TEXT_FILE.read_text(encoding="utf-8"))
    return {str(name): str(text) for name, text in document["parts"].items()}


def words(text: str) -> list[str]:
    """The words of a text; joined, they are the text."""
    return WORDS.findall(text)


def can_segment(vocabulary: Vocabulary) -> bool:
    """Are there ranks, and are they those of merges? Unigram and WordPiece choose their pieces in another way."""
    return vocabulary.kind == BPE and vocabulary.ranks_from != "none"


def segment(word: str, ranks: Mapping[bytes, int], byte_level: bool) -> list[bytes]:
    """The pieces of one word: from bytes (or characters) on, the pair of lowest rank is merged until none is left.

    `ranks`: token → rank, without single bytes (and, for characters, with or without single characters).
    """
    pieces = [bytes([byte]) for byte in word.encode()] if byte_level else [character.encode() for character in word]
    while len(pieces) > 1:
        best, at = None, 0
        for index in range(len(pieces) - 1):
            rank = ranks.get(pieces[index] + pieces[index + 1])
            if rank is not None and (best is None or rank < best):
                best, at = rank, index
        if best is None:
            break
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    return pieces


def segment_text(text: str, vocabulary: Vocabulary) -> list[list[bytes]]:
    """The pieces of every word of a text; a character that a vocabulary of characters lacks falls back on its bytes."""
    ranks = vocabulary.rank_of()
    found = [segment(word, ranks, vocabulary.byte_level) for word in words(text)]
    if vocabulary.byte_level:
        return found
    known = vocabulary.ids()
    return [[part for piece in word for part in _with_fallback(piece, known)] for word in found]


def _with_fallback(piece: bytes, known: Mapping[bytes, int]) -> list[bytes]:
    return [piece] if piece in known or len(piece) == 1 else [piece[at : at + 1] for at in range(len(piece))]


def learnt_words(
    text: str, candidate: Vocabulary, reference: Vocabulary
) -> tuple[list[list[bytes]], list[list[bytes]]]:
    """The pieces of every word of a text in which at least one of both joins anything.

    A word that both leave in single bytes (or characters) is cut alike because neither has learnt its script.
    """
    found = [
        (ours, theirs)
        for ours, theirs in zip(segment_text(text, candidate), segment_text(text, reference), strict=True)
        if any(_is_joined(piece, candidate.byte_level) for piece in ours)
        or any(_is_joined(piece, reference.byte_level) for piece in theirs)
    ]
    return [ours for ours, _ in found], [theirs for _, theirs in found]


def _is_joined(piece: bytes, byte_level: bool) -> bool:
    return len(piece) > 1 and (byte_level or len(piece.decode()) > 1)
