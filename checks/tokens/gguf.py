"""The tokenizer in the header of a GGUF file: tokens, merges and kinds of tokens among its key-value pairs.

Read by a walk that believes no length (checks/checkpoint/gguf_header.py), without the gguf library.
"""

from __future__ import annotations

import re
from typing import Any

from checks.checkpoint.gguf_header import gguf_values
from checks.tokens.build import MOST_TOKENS, Tokens, UnreadableTokenizer
from checks.tokens.huggingface import LONGEST_ROLE, mark_by_look, merges_of, rank_by_merges
from checks.tokens.normal import byte_level, looks_special, metaspace, with_spaces
from checks.tokens.sentencepiece import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED
from checks.tokens.vocabulary import BPE, UNIGRAM, WORDPIECE

START = "tokenizer.ggml."
# What llama.cpp names by the model that had it first: byte-level BPE, SentencePiece's BPE and Unigram, and WordPiece,
# whose words it writes with SentencePiece's sign for a space.
KINDS = {"gpt2": BPE, "llama": BPE, "t5": UNIGRAM, "bert": WORDPIECE}
NO_TOKENIZER = (None, "none", "no_vocab")
# What converters write for rows of the embedding that stand for no token.
FILLER = re.compile(r"\[PAD\d+\]")
# The keys of ids by role; one is spelt so in the format.
ROLES = {
    "bos_token_id": "bos",
    "eos_token_id": "eos",
    "padding_token_id": "pad",
    "unknown_token_id": "unk",
    "seperator_token_id": "sep",
    "cls_token_id": "cls",
    "mask_token_id": "mask",
}


def has_tokenizer(data: bytes) -> bool:
    """Does a GGUF file that begins with these bytes say which tokenizer it has? True for what is no such file."""
    try:
        return gguf_values(data, [f"{START}model"]).get(f"{START}model") not in NO_TOKENIZER
    except ValueError:
        return True  # whoever reads it finds out what is wrong with it


def from_gguf(data: bytes) -> Tokens:
    """The vocabulary in a GGUF file that begins with these bytes. Raises UnreadableTokenizer."""
    wanted = ("model", "tokens", "token_type", "merges", *ROLES)
    try:
        values = gguf_values(data, [START + name for name in wanted])
    except ValueError as error:
        raise UnreadableTokenizer(f"it is no header of a GGUF file ({error})") from error
    found = {name.removeprefix(START): value for name, value in values.items()}
    model = found.get("model")
    if model not in KINDS:
        raise UnreadableTokenizer(f"its tokenizer is of type {str(model)[:40]!r}; {', '.join(KINDS)} are read")
    texts = _texts(found.get("tokens"))
    types = _types(found.get("token_type"), len(texts))
    tokens = Tokens(KINDS[model], byte_level=model == "gpt2")
    for index, (text, kind) in enumerate(zip(texts, types, strict=True)):
        if kind == UNUSED or (kind != NORMAL and FILLER.fullmatch(text)):
            continue
        if kind in (UNKNOWN, CONTROL) or (kind == USER_DEFINED and looks_special(text)):
            tokens.add_special(index, text)
        elif kind == USER_DEFINED:
            tokens.add(index, with_spaces(text))
        else:
            tokens.add(index, byte_level(text) if tokens.byte_level else metaspace(text))
        if kind == BYTE:
            tokens.fallback.add(index)
    if "merges" in found or model == "gpt2":
        written = {text: index for index, text in enumerate(texts) if index in tokens.ordinary}
        rank_by_merges(tokens, written, merges_of(found.get("merges"), written))
    else:
        tokens.ranks = {index: index for index in tokens.ordinary if types[index] == NORMAL}
    if "token_type" not in found:
        mark_by_look(tokens)
    for key, role in ROLES.items():
        at = found.get(key)
        if isinstance(at, int) and 0 <= at < len(texts):
            tokens.roles[role] = texts[at][:LONGEST_ROLE]
    return tokens


def _texts(found: Any) -> list[str]:
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        raise UnreadableTokenizer(f"its {START}tokens is no list of texts; the file holds no vocabulary")
    if len(found) > MOST_TOKENS:
        raise UnreadableTokenizer(f"it has {len(found)} tokens; at most {MOST_TOKENS} are read")
    return found


def _types(found: Any, count: int) -> list[int]:
    """The kind of each token; all are ordinary where the file does not say."""
    if found is None:
        return [NORMAL] * count
    if not isinstance(found, list) or len(found) != count:
        raise UnreadableTokenizer(f"its {START}token_type is no list with the kind of each of {count} tokens")
    return found
