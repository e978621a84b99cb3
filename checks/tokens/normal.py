"""From the text that a file writes for a token to the bytes that the token stands for."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache

METASPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # SentencePiece's sign for a space
CONTINUATION = "##"  # WordPiece's sign for a token inside a word
BYTE_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")
BYTE_LEVEL_FROM = 0.99

# Special tokens by the look of their text, for files that do not mark them.
SPECIAL = re.compile(r"<\|[^\s<>]{1,60}\|>|</?[A-Za-z_][A-Za-z0-9_]{0,40}>|\[(?:\|?[a-zA-Z]{3,10}\|?|[a-z_]+\d+)\]")


@cache
def byte_alphabet() -> dict[str, int]:
    """The printable character that byte-level BPE writes for each byte (Radford et al., 2019: GPT-2's encoder).

    Printable bytes of Latin-1 stand for themselves; the others take the characters from U+0100 on, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + index): byte for index, byte in enumerate(others)}


def is_byte_level(texts: Iterable[str]) -> bool:
    """Are these the texts of a byte-level vocabulary?

    Nearly all tokens consist of the byte alphabet's characters, which has neither the metaspace nor any script beyond
    Latin, and every byte of ASCII that text is made of has a token.
    """
    alphabet = byte_alphabet()
    texts = list(texts)
    if any(text.startswith(METASPACE) for text in texts):
        return False
    whole = set(texts)
    written = sum(all(character in alphabet for character in text) for text in texts)
    letters = sum(chr(letter) in whole for letter in range(0x21, 0x7F))
    return bool(texts) and written >= BYTE_LEVEL_FROM * len(texts) and letters >= 90 and _has_spaces(whole)


def _has_spaces(texts: set[str]) -> bool:
    return any(text.startswith("Ġ") for text in texts)


def byte_level(text: str) -> bytes:
    """A token of a byte-level vocabulary; text outside the alphabet (added tokens) is UTF-8."""
    alphabet = byte_alphabet()
    try:
        return bytes(alphabet[character] for character in text)
    except KeyError:
        return encoded(text)


def metaspace(text: str) -> bytes:
    """A token of a SentencePiece vocabulary: the metaspace is a space, `<0x0A>` is a byte."""
    fallback = BYTE_FALLBACK.fullmatch(text)
    if fallback:
        return bytes([int(fallback[1], 16)])
    return with_spaces(text)


def with_spaces(text: str) -> bytes:
    """The bytes of a text in which the metaspace stands for a space."""
    return encoded(text.replace(METASPACE, " "))


def wordpiece(text: str) -> bytes:
    """A token of a WordPiece vocabulary: a word's beginning follows a space, a continuation does not."""
    if text.startswith(CONTINUATION):
        return encoded(text[len(CONTINUATION) :])
    return encoded(" " + text)


def encoded(text: str) -> bytes:
    """UTF-8, also of the lone surrogates that JSON can smuggle in."""
    return text.encode("utf-8", "surrogatepass")


def looks_special(text: str) -> bool:
    """Is this text, by its look, a special token (`<s>`, `<|im_end|>`, `[CLS]`)? A byte token is not."""
    return SPECIAL.fullmatch(text) is not None and BYTE_FALLBACK.fullmatch(text) is None
