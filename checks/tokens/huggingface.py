"""tokenizer.json, and vocab.json with merges.txt or vocab.txt: the formats of the `tokenizers` library.

Only data is read. What the file says about normalisers, pre-tokenisers and post-processors is not executed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any

from checks.tokens.build import LONGEST_TOKEN, MOST_TOKENS, Tokens, UnreadableTokenizer
from checks.tokens.normal import BYTE_FALLBACK, byte_level, is_byte_level, looks_special, metaspace, wordpiece
from checks.tokens.vocabulary import BPE, UNIGRAM, WORDPIECE

MOST_MERGES = 4 * MOST_TOKENS  # converters list every split of a token
MOST_SPACES = 64  # in one merge, each tried as the separator; the longest runs in such files have 32
LONGEST_ROLE = 200  # characters
ROLES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


def from_tokenizer_json(data: bytes) -> Tokens:
    """The vocabulary of a tokenizer.json. Raises UnreadableTokenizer."""
    document = json_object(data)
    model = document.get("model")
    if not isinstance(model, dict):
        raise UnreadableTokenizer("it has no model")
    vocabulary = _vocabulary(model.get("vocab"))
    kind = _kind(model)
    tokens = _tokens(kind, vocabulary, merges_of(model.get("merges"), vocabulary) if kind == BPE else None)
    for added in _entries(document.get("added_tokens")):
        text = added.get("content")
        if isinstance(text, str) and text:
            _add(tokens, added.get("id"), text, special=added.get("special") is True)
    if kind == BPE:
        mark_by_look(tokens)
    return tokens


def from_vocabulary_and_merges(vocabulary: bytes, merges: bytes | None) -> Tokens:
    """vocab.json and merges.txt of a BPE tokenizer. Raises UnreadableTokenizer."""
    found = _vocabulary(json_object(vocabulary))
    tokens = _tokens(BPE, found, None if merges is None else _merge_lines(merges, found))
    mark_by_look(tokens)
    return tokens


def from_word_list(data: bytes) -> Tokens:
    """vocab.txt of a WordPiece tokenizer: one token a line, the line is the id. Raises UnreadableTokenizer."""
    lines = _text(data).split("\n")
    if len(lines) > MOST_TOKENS:
        raise UnreadableTokenizer(f"it has more than {MOST_TOKENS} lines")
    tokens = _tokens(WORDPIECE, {line.rstrip("\r"): index for index, line in enumerate(lines) if line.strip()}, None)
    mark_by_look(tokens)
    return tokens


def add_companions(tokens: Tokens, files: Mapping[str, bytes]) -> None:
    """Special tokens from added_tokens.json, tokenizer_config.json and special_tokens_map.json.

    Raises UnreadableTokenizer.
    """
    if "added_tokens.json" in files:
        for text, index in json_object(files["added_tokens.json"]).items():
            _add(tokens, index, text, special=looks_special(text))
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if name in files:
            _add_declared(tokens, json_object(files[name]))


def json_object(data: bytes) -> dict[str, Any]:
    """A JSON object. Raises UnreadableTokenizer."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise UnreadableTokenizer(f"it is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise UnreadableTokenizer("it is not a JSON object")
    return found


def _add_declared(tokens: Tokens, declared: dict[str, Any]) -> None:
    decoder = declared.get("added_tokens_decoder")
    for index, added in decoder.items() if isinstance(decoder, dict) else ():
        if isinstance(added, dict) and isinstance(added.get("content"), str) and index.isdecimal():
            _add(tokens, int(index[:12]), added["content"], special=added.get("special") is True)
    for role in ROLES:
        value = declared.get(role)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str) and text:
            tokens.roles[role.removesuffix("_token")] = text[:LONGEST_ROLE]
            if text not in tokens.special:
                _mark(tokens, text)


def _mark(tokens: Tokens, text: str) -> None:
    """Call an ordinary token special: a companion file says so."""
    wanted = text.encode("utf-8", "surrogatepass")
    for index, one in tokens.ordinary.items():
        if one == wanted:
            tokens.add_special(index, text)
            return


def mark_by_look(tokens: Tokens) -> None:
    """Call tokens special by their look, for files that do not say. What a merge makes is text: `<s>` is HTML."""
    merged = tokens.ranks if tokens.ranks_from == "merges" else {}
    for index, text in list(tokens.ordinary.items()):
        written = text.decode("utf-8", "replace")
        if index not in merged and looks_special(written.strip()):
            tokens.add_special(index, written.strip())


def _add(tokens: Tokens, index: Any, text: str, *, special: bool) -> None:
    if special:
        tokens.add_special(index, text)
    elif text not in tokens.special:
        tokens.add(index, text.encode("utf-8", "surrogatepass"))


def _kind(model: Mapping[str, Any]) -> str:
    """The kind of model; older files do not name it."""
    named = model.get("type")
    if named in (BPE, WORDPIECE):
        return str(named)
    if named == "Unigram" or isinstance(model.get("vocab"), list):
        return UNIGRAM
    if named is None:
        return BPE if "merges" in model else WORDPIECE
    raise UnreadableTokenizer(f"its model is of type {named!r:.40}; BPE, Unigram and WordPiece are read")


def _vocabulary(found: Any) -> dict[str, Any]:
    """Token text → id, from a mapping or from Unigram's list of [text, score]."""
    if isinstance(found, list):
        pairs = [one[0] if isinstance(one, list) and one else one for one in found]
        found = {text: index for index, text in enumerate(pairs)}
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found):
        raise UnreadableTokenizer("its vocabulary is neither a mapping of texts to ids nor a list of texts")
    if len(found) > MOST_TOKENS:
        raise UnreadableTokenizer(f"it has {len(found)} tokens; at most {MOST_TOKENS} are read")
    return found


def _tokens(kind: str, vocabulary: dict[str, Any], merges: list[tuple[str, str]] | None) -> Tokens:
    tokens = Tokens(kind, byte_level=kind != WORDPIECE and is_byte_level(vocabulary))
    normalise: Callable[[str], bytes] = byte_level if tokens.byte_level else metaspace
    if kind == WORDPIECE:
        normalise = wordpiece
    for text, index in vocabulary.items():
        tokens.add(index, normalise(text))
        if not tokens.byte_level and BYTE_FALLBACK.fullmatch(text):
            tokens.fallback.add(index)
    if kind == WORDPIECE:
        mark_by_look(tokens)
    if kind == BPE:
        rank_by_merges(tokens, vocabulary, merges or [])
    else:
        tokens.ranks = {index: index for index in tokens.ordinary}
    return tokens


def rank_by_merges(tokens: Tokens, vocabulary: Mapping[str, Any], merges: list[tuple[str, str]]) -> None:
    """Rank tokens by the first merge that makes them; without merges none has a rank, for ids may be in any order.

    `vocabulary`: ids by the texts that the merges are written in.
    """
    tokens.ranks_from, tokens.merges = ("merges", len(merges)) if merges else ("none", None)
    for rank, (left, right) in enumerate(merges):
        index = vocabulary.get(left + right)
        if index is not None:
            tokens.ranks.setdefault(index, rank)


def merges_of(found: Any, vocabulary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Merges as pairs; they are written as "a b" or as ["a", "b"]. Raises UnreadableTokenizer."""
    if found is None:
        return []
    if not isinstance(found, list) or len(found) > MOST_MERGES:
        raise UnreadableTokenizer(f"its merges are not a list of at most {MOST_MERGES}")
    return [_merge(one, vocabulary) for one in found]


def _merge(found: Any, vocabulary: Mapping[str, Any]) -> tuple[str, str]:
    if isinstance(found, str):
        left, space, right = found.partition(" ")
        if space and " " not in right:
            return left, right
        # Some converters leave spaces in tokens: the separator is the one between two tokens.
        for match in islice(re.finditer(" ", found[:LONGEST_TOKEN]), MOST_SPACES):
            left, right = found[: match.start()], found[match.end() :]
            if left in vocabulary and right in vocabulary:
                return left, right
    elif isinstance(found, list) and len(found) == 2 and all(isinstance(part, str) for part in found):
        return found[0], found[1]
    raise UnreadableTokenizer(f"{str(found)[:40]!r} is not a merge of two tokens")


def _merge_lines(data: bytes, vocabulary: Mapping[str, Any]) -> list[tuple[str, str]]:
    lines = (line.rstrip("\r") for line in _text(data).split("\n"))
    return merges_of([line for line in lines if line and not line.startswith("#version")], vocabulary)


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UnreadableTokenizer(f"it is not UTF-8 ({error})") from error


def _entries(found: Any) -> Iterable[dict[str, Any]]:
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []
