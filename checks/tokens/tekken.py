"""tekken.json: Mistral's byte-level BPE. Tokens in base64 by rank; special tokens have the ids before them."""

from __future__ import annotations

import binascii
from typing import Any

from checks.tokens.build import MOST_TOKENS, Tokens, UnreadableTokenizer, checked_id
from checks.tokens.huggingface import json_object
from checks.tokens.vocabulary import BPE


def from_tekken(data: bytes) -> Tokens:
    """The vocabulary of a tekken.json. Raises UnreadableTokenizer.

    The file lists more tokens than its model has: those beyond the stated size are left out. Special tokens of older
    files stand in code and are not seen.
    """
    document = json_object(data)
    config, listed = document.get("config"), document.get("vocab")
    if not isinstance(config, dict) or not isinstance(listed, list):
        raise UnreadableTokenizer("it has no config beside a vocab")
    first = checked_id(config.get("default_num_special_tokens"))
    count = checked_id(config.get("default_vocab_size")) - first
    if not 0 < count <= len(listed) <= MOST_TOKENS:
        raise UnreadableTokenizer(f"it lists {len(listed)} tokens and states {count} beside {first} special ones")
    tokens = Tokens(BPE, ranks_from="ranks")
    for rank, entry in enumerate(listed[:count]):
        if not isinstance(entry, dict) or entry.get("rank") != rank:
            raise UnreadableTokenizer(f"entry {rank} of its vocab is no token of that rank")
        tokens.add(first + rank, _text(rank, entry.get("token_bytes")))
        tokens.ranks[first + rank] = rank
    special = document.get("special_tokens") or []
    if not isinstance(special, list):
        raise UnreadableTokenizer("its special tokens are no list")
    for entry in special:
        if not isinstance(entry, dict) or not isinstance(entry.get("token_str"), str):
            raise UnreadableTokenizer("one of its special tokens has no text")
        index = checked_id(entry.get("rank"))
        if index >= first:
            raise UnreadableTokenizer(f"a special token has the id {index}; {first} of them are stated")
        tokens.add_special(index, entry["token_str"])
    return tokens


def _text(rank: int, written: Any) -> bytes:
    try:
        return binascii.a2b_base64(written, strict_mode=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise UnreadableTokenizer(f"token {rank} is not base64 ({error})") from error
