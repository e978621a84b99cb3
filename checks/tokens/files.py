"""Which files make a tokenizer, and which reader reads them."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Mapping
from typing import Protocol

from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.gguf_header import HEADER_NAME
from checks.tokens.build import Tokens, UnreadableTokenizer
from checks.tokens.gguf import from_gguf, has_tokenizer
from checks.tokens.huggingface import (
    add_companions,
    from_tokenizer_json,
    from_vocabulary_and_merges,
    from_word_list,
)
from checks.tokens.sentencepiece import from_sentencepiece
from checks.tokens.tekken import from_tekken
from checks.tokens.tiktoken import from_tiktoken, is_tiktoken
from checks.tokens.vocabulary import Vocabulary

LARGEST_FILE = 64_000_000  # bytes

# Files that hold a vocabulary, in the order in which one is chosen: tokenizer.json says most.
VOCABULARY_FILES = (
    "tokenizer.json",
    "vocab.json",
    "tokenizer.model",
    "tiktoken.model",
    "qwen.tiktoken",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.txt",
    "tekken.json",
)
OTHER_FILES = (".tiktoken", ".model", ".gguf")
COMPANIONS = ("merges.txt", "added_tokens.json", "special_tokens_map.json", "tokenizer_config.json")


class HasSmallFiles(Protocol):
    """A model whose small files can be read: `checks.checkpoint.model.Model`."""

    @property
    def name(self) -> str:
        """The model's name in cases."""

    def small_file(self, name: str, largest: int = LARGEST_FILE) -> bytes | None:
        """The bytes of a small file of the checkpoint; None when it has none of this name."""


_read: weakref.WeakKeyDictionary[HasSmallFiles, Vocabulary | CheckpointUnavailable | None] = weakref.WeakKeyDictionary()


def read_vocabulary(files: Mapping[str, bytes]) -> Vocabulary:
    """The vocabulary that these files of a tokenizer make, by name.

    One file of `VOCABULARY_FILES`, or one that ends in `.tiktoken`, `.model` or `.gguf` (of which the header is
    enough), with the companions that there are.
    Raises CheckpointUnavailable when no file holds a vocabulary, or when one cannot be read: it names the file.
    """
    name = _chosen(files)
    if name is None:
        raise CheckpointUnavailable(
            f"no file of a tokenizer among {', '.join(sorted(files)) or 'no files'}; expected one of "
            f"{', '.join(VOCABULARY_FILES)}, *.tiktoken or *.gguf"
        )
    used = [name, *(one for one in COMPANIONS if one in files)]
    for one in used:
        if len(files[one]) > LARGEST_FILE:
            raise CheckpointUnavailable(f"{one}: {len(files[one])} bytes; a tokenizer has at most {LARGEST_FILE}")
    try:
        tokens = _tokens(name, files)
        add_companions(tokens, files)
        return tokens.build({one: hashlib.sha256(files[one]).hexdigest() for one in used})
    except UnreadableTokenizer as error:
        raise CheckpointUnavailable(f"{name}: cannot be read as a tokenizer: {error}; fetch it again") from error


def vocabulary_of(model: HasSmallFiles) -> Vocabulary | None:
    """The vocabulary of a model, read once; None when the checkpoint has no tokenizer file that is read.

    Raises CheckpointUnavailable when the files cannot be had or read, the same way every time.
    """
    if model not in _read:
        try:
            _read[model] = _vocabulary_of(model)
        except CheckpointUnavailable as error:
            _read[model] = error
    found = _read[model]
    if isinstance(found, CheckpointUnavailable):
        raise type(found)(str(found)) from found.__cause__
    return found


def _vocabulary_of(model: HasSmallFiles) -> Vocabulary | None:
    for name in (*VOCABULARY_FILES, HEADER_NAME):
        data = model.small_file(name, LARGEST_FILE)
        if data is None or (name == HEADER_NAME and not has_tokenizer(data)):
            continue
        wanted = ("merges.txt", "added_tokens.json") if name == "vocab.json" else ()
        files = {name: data}
        for companion in (*wanted, "special_tokens_map.json", "tokenizer_config.json"):
            found = model.small_file(companion, LARGEST_FILE)
            if found is not None:
                files[companion] = found
        try:
            return read_vocabulary(files)
        except CheckpointUnavailable as error:
            raise CheckpointUnavailable(f"{model.name}: {error}") from error
    return None


def _chosen(files: Mapping[str, bytes]) -> str | None:
    for name in VOCABULARY_FILES:
        if name in files:
            return name
    return next((name for name in sorted(files) if name.endswith(OTHER_FILES)), None)


def _tokens(name: str, files: Mapping[str, bytes]) -> Tokens:
    data = files[name]
    if name == "tokenizer.json":
        return from_tokenizer_json(data)
    if name == "vocab.json":
        return from_vocabulary_and_merges(data, files.get("merges.txt"))
    if name == "vocab.txt":
        return from_word_list(data)
    if name == "tekken.json":
        return from_tekken(data)
    if name.endswith(".gguf"):
        return from_gguf(data)
    return from_tiktoken(data) if is_tiktoken(data) else from_sentencepiece(data)
