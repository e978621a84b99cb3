"""tokenizer.model of SentencePiece: a serialised ModelProto (sentencepiece_model.proto), read without the library."""

from __future__ import annotations

from checks.tokens.build import MOST_TOKENS, Tokens, UnreadableTokenizer
from checks.tokens.normal import looks_special, metaspace, with_spaces
from checks.tokens.vocabulary import BPE, UNIGRAM
from checks.wire import WireError, as_bytes, as_int, fields

# Field numbers and values of sentencepiece_model.proto.
PIECES, TRAINER_SPEC = 1, 2
PIECE_TEXT, PIECE_TYPE = 1, 3
MODEL_TYPE = 3
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
MODEL_TYPES = {1: UNIGRAM, 2: BPE}


def from_sentencepiece(data: bytes) -> Tokens:
    """The vocabulary of a SentencePiece model. Pieces stand by falling score, so that their order is the merges'.

    Raises UnreadableTokenizer.
    """
    try:
        return _read(data)
    except (WireError, UnicodeDecodeError) as error:
        raise UnreadableTokenizer(f"it is neither a SentencePiece model nor a tiktoken file ({error})") from error


def _read(data: bytes) -> Tokens:
    tokens = Tokens(UNIGRAM, byte_level=False)
    index = 0
    for number, value in fields(data):
        if number == TRAINER_SPEC:
            tokens.kind = _kind(as_bytes(value))
        if number != PIECES:
            continue
        if index >= MOST_TOKENS:
            raise UnreadableTokenizer(f"it has more than {MOST_TOKENS} pieces")
        text, kind = _piece(as_bytes(value))
        if kind == BYTE:
            tokens.fallback.add(index)
        if kind in (UNKNOWN, CONTROL) or (kind == USER_DEFINED and looks_special(text)):
            tokens.add_special(index, text)
        elif kind != UNUSED:
            tokens.add(index, metaspace(text) if kind in (NORMAL, BYTE) else with_spaces(text))
        if kind == NORMAL:
            tokens.ranks[index] = index
        index += 1
    return tokens


def _piece(message: bytes) -> tuple[str, int]:
    text, kind = "", NORMAL
    for number, value in fields(message):
        if number == PIECE_TEXT:
            text = as_bytes(value).decode("utf-8")
        elif number == PIECE_TYPE:
            kind = as_int(value)
    return text, kind


def _kind(message: bytes) -> str:
    """The model's type; Unigram is the format's default."""
    found = 1
    for number, value in fields(message):
        if number == MODEL_TYPE:
            found = as_int(value)
    if found not in MODEL_TYPES:
        raise UnreadableTokenizer(f"its model is of type {found}; Unigram (1) and BPE (2) are read")
    return MODEL_TYPES[found]
