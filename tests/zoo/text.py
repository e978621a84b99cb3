"""The zoo's text: the source of the standard library and the help topics, both shipped with the interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from inspect import cleandoc

import torch
from transformers import PreTrainedTokenizerFast

from examples.train import docstrings, library_files, train_tokenizer

HOLD_OUT_EVERY = 16
TEXTS = ("a", "b", "docs_a", "docs_b", "code_a", "code_b")


def documents(text: str) -> Iterator[str]:
    """The documents of one text in a fixed order; `a` and `b` take turns through topics and files."""
    from pydoc_data.topics import topics

    if text not in TEXTS:
        raise ValueError(f"text {text!r}, expected one of {', '.join(TEXTS)}")
    half = slice("ab".index(text[-1]), None, 2)
    if not text.startswith("code"):
        yield from (cleandoc(topics[name]) for name in sorted(topics)[half])
    for path in library_files()[half]:
        source = path.read_text(encoding="utf-8")
        if found := docstrings(source) if text.startswith("docs") else source:
            yield found


@cache
def read_text(text: str, characters: int | None = None) -> tuple[str, ...]:
    """The first documents of a text, up to a number of characters."""
    found: list[str] = []
    left = characters
    for document in documents(text):
        if left is not None and left <= 0:
            break
        found.append(document if left is None else document[:left])
        left = None if left is None else left - len(document)
    return tuple(found)


@cache
def make_tokenizer(text: str, size: int, characters: int | None = None) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on one text; the same arguments make the same tokenizer."""
    return train_tokenizer(list(read_text(text, characters)), size)


@cache
def _token_stream(tokenizer_json: str, text: str, characters: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(tokenizer_json)
    streams: list[list[int]] = [[], []]
    for index, encoding in enumerate(tokenizer.encode_batch(list(read_text(text, characters)))):
        streams[index % HOLD_OUT_EVERY == HOLD_OUT_EVERY - 1] += [0, *encoding.ids]
    return torch.tensor(streams[0], dtype=torch.long), torch.tensor(streams[1], dtype=torch.long)


def token_streams(
    tokenizer: PreTrainedTokenizerFast, text: str, characters: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A text as two rows of token ids: for training, and every sixteenth document for validation."""
    return _token_stream(tokenizer.backend_tokenizer.to_str(), text, characters)
