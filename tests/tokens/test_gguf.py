"""Tokenizers in the headers of GGUF files: the vocabulary of other files, and lengths that nobody vouches for."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.gguf_header import HEADER_NAME
from checks.tokens import Vocabulary, read_vocabulary, vocabulary_of
from tests.tokens.test_files import BYTES, PIECES, WORDS, FakeModel, formats, merge_pairs, sentencepiece, written

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
TEXTS = [*map(written, [*BYTES, *WORDS]), "<|end|>"]
TYPES = [NORMAL] * 265 + [CONTROL]
MERGES = [" ".join(pair) for pair in merge_pairs()]
START = "tokenizer.ggml."


def packed(value: Any) -> bytes:
    """The type of a value and the value, as GGUF has them."""
    if isinstance(value, str):
        text = value.encode("utf-8", "surrogateescape")
        return struct.pack("<IQ", 8, len(text)) + text
    if isinstance(value, int):
        return struct.pack("<Ii", 5, value)
    inner = packed(value[0])[:4] if value else struct.pack("<I", 8)
    return struct.pack("<I", 9) + inner + struct.pack("<Q", len(value)) + b"".join(packed(one)[4:] for one in value)


def gguf(**pairs: Any) -> bytes:
    """The header of a GGUF file without tensors; `tokens` stands for tokenizer.ggml.tokens."""
    found = {"general.architecture": "llama", **{START + name: value for name, value in pairs.items()}}
    body = b"".join(packed(name)[4:] + packed(value) for name, value in found.items() if value is not None)
    count = sum(value is not None for value in found.values())
    return b"GGUF" + struct.pack("<IQQ", 3, 0, count) + body


def byte_level_file(**changes: Any) -> bytes:
    return gguf(**{"model": "gpt2", "tokens": TEXTS, "token_type": TYPES, "merges": MERGES, **changes})


def read(data: bytes) -> Vocabulary:
    return read_vocabulary({"model.gguf": data})


def test_a_byte_level_vocabulary_is_that_of_its_other_files() -> None:
    found, expected = read(byte_level_file(eos_token_id=265, bos_token_id=-1)), formats()["pairs"]
    assert (found.kind, found.byte_level, found.texts, found.ranks) == ("BPE", True, expected.texts, expected.ranks)
    assert (dict(found.special), found.merges) == ({"<|end|>": 265}, len(MERGES))
    assert dict(found.roles) == {"eos": "<|end|>"}
    assert list(found.sha256) == ["model.gguf"]


def test_a_sentencepiece_vocabulary_is_that_of_its_model_file() -> None:
    texts, types = [text for text, _ in PIECES], [kind for _, kind in PIECES]
    found = read(gguf(model="llama", tokens=texts, token_type=types))
    expected = read_vocabulary({"tokenizer.model": sentencepiece(PIECES)})
    assert (found.kind, found.byte_level) == ("BPE", False)
    assert (found.texts, found.ranks, found.special) == (expected.texts, expected.ranks, expected.special)


def test_fillers_unused_and_added_tokens() -> None:
    more = {"[PAD266]": USER_DEFINED, "[PAD267]": UNKNOWN, "gone": UNUSED, "   ": USER_DEFINED, "<|x|>": USER_DEFINED}
    found = read(byte_level_file(tokens=[*TEXTS, *more], token_type=[*TYPES, *more.values()]))
    assert found.texts[266:] == (None, None, None, b"   ", None)
    assert dict(found.special) == {"<|end|>": 265, "<|x|>": 270}
    assert read(byte_level_file(tokens=[*TEXTS, "[PAD266]"], token_type=[*TYPES, NORMAL])).texts[266] == b"[PAD266]"


def test_without_kinds_special_tokens_are_told_by_their_look() -> None:
    found = read(byte_level_file(token_type=None))
    assert dict(found.special) == {"<|end|>": 265}
    assert found.texts[:265] == formats()["pairs"].texts[:265]


def test_without_merges_no_token_has_a_rank() -> None:
    found = read(byte_level_file(merges=None))
    assert (found.ranks_from, found.merges) == ("none", None)
    assert not found.rank_of()


def test_words_of_wordpiece_begin_with_a_space() -> None:
    tokens = ["[CLS]", "▁word", "ing"]
    found = read(gguf(model="bert", tokens=tokens, token_type=[CONTROL, NORMAL, NORMAL]))
    assert (found.kind, found.texts) == ("WordPiece", (None, b" word", b"ing"))


def test_a_model_whose_tokenizer_stands_in_its_gguf_file() -> None:
    model = FakeModel({HEADER_NAME: byte_level_file()})
    found = vocabulary_of(model)
    assert found is not None
    assert found.texts[256:265] == tuple(WORDS)
    assert vocabulary_of(FakeModel({HEADER_NAME: gguf()})) is None
    assert vocabulary_of(FakeModel({HEADER_NAME: gguf(model="no_vocab")})) is None
    with pytest.raises(CheckpointUnavailable, match=r"fake: header\.gguf: .* no header of a GGUF file"):
        vocabulary_of(FakeModel({HEADER_NAME: byte_level_file()[:-3]}))


def test_what_the_gguf_library_writes(tmp_path: Path) -> None:
    library = pytest.importorskip("gguf")
    writer = library.GGUFWriter(tmp_path / "vocab.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TEXTS)
    writer.add_token_types(TYPES)
    writer.add_token_merges(MERGES)
    writer.add_eos_token_id(265)
    writer.add_sep_token_id(264)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    found = read((tmp_path / "vocab.gguf").read_bytes())
    assert (found.texts, found.ranks) == (formats()["pairs"].texts, formats()["pairs"].ranks)
    assert dict(found.roles) == {"eos": "<|end|>", "sep": TEXTS[264]}


def with_length(value: int, after: bytes) -> bytes:
    """A good file in which the length behind some bytes is another."""
    data = byte_level_file()
    at = data.index(after) + len(after)
    return data[:at] + struct.pack("<Q", value) + data[at + 8 :]


TOKENS = b"tokenizer.ggml.tokens" + struct.pack("<II", 9, 8)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "no header of a GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "at least 12 bytes"),
        (with_length(2**60, TOKENS), "at most 8388608 are read"),
        (with_length(2**22, TOKENS), "at least 8 bytes"),
        (with_length(2**63, TOKENS + struct.pack("<Q", len(TEXTS))), "entries of at least"),
        (with_length(2**62, b"tokenizer.ggml.model" + struct.pack("<I", 8)), "entries of at least"),
        (gguf(model="gpt2", tokens=TEXTS, token_type=TYPES[1:]), "kind of each of 266 tokens"),
        (gguf(model="gpt2", tokens=TEXTS, token_type=7), "kind of each of 266 tokens"),
        (gguf(model="gpt2", tokens=[1, 2]), "no list of texts"),
        (gguf(model="gpt2", tokens=[]), "no ordinary token"),
        (gguf(model="gpt2"), "no list of texts"),
        (gguf(model="rwkv", tokens=TEXTS), "type 'rwkv'"),
        (gguf(tokens=TEXTS), "type 'None'"),
        (byte_level_file(merges=["a"]), "not a merge"),
        (byte_level_file(merges=[3]), "not a merge"),
        (byte_level_file(merges=3), "not a list"),
    ],
)
def test_hostile_headers_are_unavailable(data: bytes, says: str) -> None:
    with pytest.raises(CheckpointUnavailable, match=says):
        read(data)


def test_a_key_that_stands_twice_and_too_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model = packed(f"{START}model")[4:] + packed("gpt2")
    with pytest.raises(CheckpointUnavailable, match="stands twice"):
        read(b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + model * 2)
    monkeypatch.setattr("checks.tokens.gguf.MOST_TOKENS", 10)
    with pytest.raises(CheckpointUnavailable, match="at most 10"):
        read(byte_level_file())


SMALL = gguf(model="gpt2", tokens=["a", "b", "ab", "<|end|>"], token_type=[1, 1, 1, 3], merges=["a b"], eos_token_id=3)


@given(at=st.integers(0, len(SMALL) - 1), damage=st.binary(min_size=1, max_size=8), cut=st.integers(0, len(SMALL)))
def test_any_damage_is_a_vocabulary_or_unavailable(at: int, damage: bytes, cut: int) -> None:
    for data in (SMALL[:at] + damage + SMALL[at + len(damage) :], SMALL[:cut], damage):
        try:
            found = read(data)
        except CheckpointUnavailable as error:
            assert "model.gguf" in str(error)  # noqa: PT017
        else:
            assert found.ids()
