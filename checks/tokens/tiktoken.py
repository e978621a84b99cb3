"""Files of tiktoken: one token a line, base64 and rank. Llama-3 and Qwen publish theirs in this form."""

from __future__ import annotations

import binascii
import re

from checks.tokens.build import MOST_TOKENS, Tokens, UnreadableTokenizer
from checks.tokens.vocabulary import BPE

LINE = re.compile(rb"([A-Za-z0-9+/]+={0,2}) (\d{1,9})\r?")


def is_tiktoken(data: bytes) -> bool:
    """Does the first line look like tiktoken's?"""
    return LINE.fullmatch(data[:1000].split(b"\n", 1)[0]) is not None


def from_tiktoken(data: bytes) -> Tokens:
    """The vocabulary of a tiktoken file; its special tokens stand in code elsewhere. Raises UnreadableTokenizer."""
    lines = data.split(b"\n")
    if len(lines) > MOST_TOKENS + 1:
        raise UnreadableTokenizer(f"it has more than {MOST_TOKENS} lines")
    tokens = Tokens(BPE, ranks_from="ranks")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        match = LINE.fullmatch(line)
        if match is None:
            raise UnreadableTokenizer(f"line {number} is not a token in base64 and its rank")
        try:
            text = binascii.a2b_base64(match[1], strict_mode=True)
        except binascii.Error as error:
            raise UnreadableTokenizer(f"line {number} is not base64 ({error})") from error
        rank = int(match[2])
        tokens.add(rank, text)
        tokens.ranks[rank] = rank
    return tokens
