"""Reading a tokenizer's files: one vocabulary in four formats, and files that nobody vouches for."""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checks.checkpoint.errors import CheckpointUnavailable
from checks.tokens import Vocabulary, read_vocabulary, vocabulary_of
from checks.tokens.build import UnreadableTokenizer
from checks.tokens.huggingface import MOST_SPACES, merges_of
from checks.tokens.normal import byte_alphabet
from checks.tokens.segment import can_segment

# A small byte-level vocabulary: the bytes, then tokens in the order of their merges.
WORDS = [b"th", b" th", b" the", b"er", b" \xea", b" \xea\xb0", b" \xea\xb0\x80", b"\n\n", b"12"]
BYTES = [bytes([byte]) for byte in range(256)]
MERGES = {b"th": (b"t", b"h"), b" th": (b" ", b"th"), b" the": (b" th", b"e"), b"er": (b"e", b"r")}
MERGES |= {b" \xea": (b" ", b"\xea"), b" \xea\xb0": (b" \xea", b"\xb0"), b"\n\n": (b"\n", b"\n")}
MERGES |= {b" \xea\xb0\x80": (b" \xea\xb0", b"\x80"), b"12": (b"1", b"2")}


def written(text: bytes) -> str:
    """`text` as byte-level BPE writes it."""
    characters = {byte: character for character, byte in byte_alphabet().items()}
    return "".join(characters[byte] for byte in text)


def vocabulary_json() -> dict[str, int]:
    return {written(text): index for index, text in enumerate([*BYTES, *WORDS])}


def merge_pairs() -> list[list[str]]:
    return [[written(left), written(right)] for left, right in (MERGES[text] for text in WORDS)]


def tokenizer_json(**changes: Any) -> bytes:
    model = {"type": "BPE", "vocab": vocabulary_json(), "merges": merge_pairs(), **changes}
    return json.dumps({"model": model, "added_tokens": [{"id": 265, "content": "<|end|>", "special": True}]}).encode()


def tiktoken_lines(texts: list[bytes]) -> bytes:
    return b"".join(base64.b64encode(text) + b" %d\n" % rank for rank, text in enumerate(texts))


def field(number: int, value: int | bytes) -> bytes:
    def varint(one: int) -> bytes:
        return bytes([one]) if one < 0x80 else bytes([one & 0x7F | 0x80]) + varint(one >> 7)

    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def sentencepiece(pieces: list[tuple[str, int]], model_type: int = 2) -> bytes:
    message = b""
    for index, (text, kind) in enumerate(pieces):
        score = b"\x15" + struct.pack("<f", -float(index))
        message += field(1, field(1, text.encode()) + score + field(3, kind))
    return message + field(2, field(3, model_type))


PIECES = [("<unk>", 2), ("<s>", 3), ("<0x0A>", 6), ("<0x41>", 6), ("▁t", 1), ("▁the", 1), ("A", 1), ("한국", 1)]


class FakeModel:
    name = "fake"

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.files = files
        self.asked: list[str] = []

    def small_file(self, name: str, largest: int = 0) -> bytes | None:
        self.asked.append(name)
        return self.files.get(name)


def formats() -> dict[str, Vocabulary]:
    merges = "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merge_pairs())
    return {
        "pairs": read_vocabulary({"tokenizer.json": tokenizer_json()}),
        "strings": read_vocabulary(
            {"tokenizer.json": tokenizer_json(merges=[" ".join(pair) for pair in merge_pairs()])}
        ),
        "two files": read_vocabulary(
            {"vocab.json": json.dumps(vocabulary_json()).encode(), "merges.txt": merges.encode()}
        ),
        "tiktoken": read_vocabulary({"x.tiktoken": tiktoken_lines([*BYTES, *WORDS])}),
        "tokenizer.model": read_vocabulary({"tokenizer.model": tiktoken_lines([*BYTES, *WORDS])}),
    }


def test_one_vocabulary_in_every_format_is_the_same() -> None:
    read = formats()
    expected = read["pairs"]
    assert expected.texts[256:265] == tuple(WORDS)
    assert expected.special == {"<|end|>": 265}
    assert expected.texts[265] is None
    for name, one in read.items():
        assert one.byte_level, name
        assert one.texts[:265] == expected.texts[:265], name
        order = sorted(one.rank_of(), key=one.rank_of().__getitem__)
        assert order == WORDS, name


def test_sentencepiece_is_read_as_the_text_that_pieces_stand_for() -> None:
    read = read_vocabulary({"tokenizer.model": sentencepiece(PIECES)})
    assert read.kind == "BPE"
    assert not read.byte_level
    # <0x41> is the byte of the ordinary token A, which is what text is encoded with.
    assert read.texts == (None, None, b"\n", None, b" t", b" the", b"A", "한국".encode())
    assert read.special == {"<unk>": 0, "<s>": 1}
    assert [rank for rank in read.ranks if rank is not None] == [4, 5, 7]


def test_the_same_pieces_as_json_are_the_same_texts() -> None:
    vocabulary = {text: index for index, (text, _) in enumerate(PIECES)}
    document = {
        "model": {"type": "BPE", "vocab": vocabulary, "merges": ["▁ t", "▁t he"]},
        "added_tokens": [{"id": 0, "content": "<unk>", "special": True}, {"id": 1, "content": "<s>", "special": True}],
    }
    read = read_vocabulary({"tokenizer.json": json.dumps(document).encode()})
    assert read.texts == read_vocabulary({"tokenizer.model": sentencepiece(PIECES)}).texts


def test_the_unigram_list_is_read() -> None:
    document = {"model": {"type": "Unigram", "vocab": [["<unk>", 0.0], ["▁a", -1.0], ["b", -2.0]]}}
    read = read_vocabulary({"tokenizer.json": json.dumps(document).encode()})
    assert read.kind == "unigram"
    assert read.texts[1:] == (b" a", b"b")
    assert read_vocabulary({"tokenizer.model": sentencepiece(PIECES, model_type=1)}).kind == "unigram"


def test_wordpiece_words_follow_a_space() -> None:
    read = read_vocabulary({"vocab.txt": b"[PAD]\n[unused0]\nthe\n##re\n"})
    assert read.kind == "WordPiece"
    assert read.texts == (None, None, b" the", b"re")
    assert set(read.special) == {"[PAD]", "[unused0]"}


def test_text_that_a_merge_makes_is_no_special_token() -> None:
    """`<s>` is an ordinary token of vocabularies that were trained on HTML."""
    texts = [*BYTES, b"<s", b"<s>"]
    vocabulary = {written(text): index for index, text in enumerate(texts)} | {"<|end|>": 258}
    merges = b"#version: 0.2\n< s\n<s >\n"
    read = read_vocabulary({"vocab.json": json.dumps(vocabulary).encode(), "merges.txt": merges})
    assert read.texts[257] == b"<s>"
    assert read.special == {"<|end|>": 258}


def test_spaces_of_a_piece_that_a_user_defined() -> None:
    """Gemma's runs of spaces are pieces of this kind."""
    read = read_vocabulary({"tokenizer.model": sentencepiece([("▁▁", 4), ("<0x41>", 4), ("<|x|>", 4), ("a", 1)])})
    assert read.texts == (b"  ", b"<0x41>", None, b"a")


def test_companions_name_special_tokens_and_roles() -> None:
    files = {
        "tokenizer.json": tokenizer_json(),
        "tokenizer_config.json": json.dumps(
            {
                "eos_token": "<|end|>",
                "bos_token": {"content": "12"},
                "added_tokens_decoder": {"300": {"content": "<|x|>", "special": True}, "nine": {"content": "y"}},
            }
        ).encode(),
    }
    read = read_vocabulary(files)
    assert read.roles == {"eos": "<|end|>", "bos": "12"}
    assert dict(read.special) == {"12": 264, "<|end|>": 265, "<|x|>": 300}
    assert read.texts[264] is None
    assert set(read.sha256) == set(files)


def test_all_splits_of_a_converter_keep_the_first_rank() -> None:
    """Converters from tiktoken list every split of a token; its rank is that of the first."""
    pairs = [*merge_pairs(), ["Ġt", "he"], ["Ġ", "the"]]
    read = read_vocabulary({"tokenizer.json": tokenizer_json(merges=pairs)})
    assert read.rank_of() == formats()["pairs"].rank_of()
    assert read.merges == len(WORDS) + 2


def test_spaces_inside_the_tokens_of_a_merge() -> None:
    """Some converters write metaspaces as spaces: the separator is the space between two tokens."""
    vocabulary = {"  ": 0, " ": 1, "▁a": 2, "    ": 3, "▁": 4, "a": 5}
    document = {"model": {"type": "BPE", "vocab": vocabulary, "merges": ["▁ a", "     "]}}
    read = read_vocabulary({"tokenizer.json": json.dumps(document).encode()})
    assert read.ranks[3] == 1


def test_the_examples_are_read(examples: Path) -> None:
    from tokenizers import Tokenizer

    file = examples / "base" / "tokenizer.json"
    read = read_vocabulary({"tokenizer.json": file.read_bytes()})
    library = Tokenizer.from_file(str(file))
    assert len(read.texts) == library.get_vocab_size() == 1024
    for index in range(1, 1024):
        text = read.texts[index]
        assert text is not None
        if text.isascii():
            assert library.decode([index]) == text.decode()


DEEP = b'{"model":' + b"[" * 100_000


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "no file of a tokenizer"),
        ({"config.json": b"{}"}, "no file of a tokenizer"),
        ({"tokenizer.json": b"\xff"}, "not JSON"),
        ({"tokenizer.json": DEEP}, "not JSON"),
        ({"tokenizer.json": b"[]"}, "not a JSON object"),
        ({"tokenizer.json": b"{}"}, "no model"),
        ({"tokenizer.json": b'{"model": {"type": "Lattice", "vocab": {}}}'}, "Lattice"),
        ({"tokenizer.json": b'{"model": {"type": "BPE", "vocab": {}}}'}, "no ordinary token"),
        ({"tokenizer.json": b'{"model": {"type": "BPE", "vocab": {"a": -1}}}'}, "no token id"),
        ({"tokenizer.json": b'{"model": {"type": "BPE", "vocab": {"a": 99999999999}}}'}, "no token id"),
        ({"tokenizer.json": b'{"model": {"type": "BPE", "vocab": {"a": true}}}'}, "no token id"),
        ({"tokenizer.json": b'{"model": {"type": "BPE", "vocab": [1, 2]}}'}, "neither a mapping"),
        ({"tokenizer.json": b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a"]}}'}, "not a merge"),
        ({"tokenizer.json": b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": 7}}'}, "not a list"),
        ({"vocab.json": b'{"a": 0}', "merges.txt": b"\xff"}, "not UTF-8"),
        ({"vocab.json": b'{"a": 0}', "added_tokens.json": b"7"}, "not a JSON object"),
        ({"vocab.txt": b"\n\n"}, "no ordinary token"),
        ({"tokenizer.model": b""}, "no ordinary token"),
        ({"tokenizer.model": b"\x0a\xff"}, "neither a SentencePiece model nor a tiktoken file"),
        ({"tokenizer.model": sentencepiece(PIECES, model_type=9)}, "type 9"),
        ({"x.tiktoken": b"IQ== 0\n!!!! 1\n"}, "line 2"),
        ({"x.tiktoken": b"IQ== 0\nIQ= 1\n"}, "line 2"),
        ({"x.tiktoken": b"IQ== 0\nIQ== 999999999\n"}, "no token id"),
    ],
)
def test_hostile_files_are_unavailable(files: dict[str, bytes], says: str) -> None:
    with pytest.raises(CheckpointUnavailable, match=says):
        read_vocabulary(files)


def test_files_beyond_the_bound_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("checks.tokens.files.LARGEST_FILE", 10)
    with pytest.raises(CheckpointUnavailable, match="at most 10"):
        read_vocabulary({"tokenizer.json": tokenizer_json()})


@given(
    st.sampled_from(
        ["tokenizer.json", "vocab.json", "tokenizer.model", "vocab.txt", "a.tiktoken", "tekken.json", "a.gguf"]
    ),
    st.binary(max_size=200),
)
def test_any_bytes_are_a_vocabulary_or_unavailable(name: str, data: bytes) -> None:
    try:
        read = read_vocabulary({name: data})
    except CheckpointUnavailable as error:
        assert name in str(error)  # noqa: PT017
        return
    assert read.ids()


def test_a_model_is_read_once_and_only_what_is_needed() -> None:
    model = FakeModel({"tokenizer.json": tokenizer_json(), "vocab.json": b"broken"})
    assert vocabulary_of(model) is vocabulary_of(model)
    assert model.asked == ["tokenizer.json", "special_tokens_map.json", "tokenizer_config.json"]


def test_a_model_without_a_tokenizer_has_none() -> None:
    assert vocabulary_of(FakeModel({"config.json": b"{}"})) is None


def test_the_model_is_named_when_its_tokenizer_cannot_be_read() -> None:
    with pytest.raises(CheckpointUnavailable, match=r"fake: tokenizer\.json: .*not JSON"):
        vocabulary_of(FakeModel({"tokenizer.json": b"{"}))


def test_a_hub_that_does_not_answer_is_unavailable() -> None:
    class Unreachable(FakeModel):
        def small_file(self, name: str, largest: int = 0) -> bytes | None:
            super().small_file(name)
            raise CheckpointUnavailable(f"{name}: the hub does not answer")

    model = Unreachable({})
    for _ in range(2):
        with pytest.raises(CheckpointUnavailable, match="does not answer"):
            vocabulary_of(model)
    assert model.asked == ["tokenizer.json"]  # asked once


def test_a_bpe_vocabulary_without_its_merges_has_no_ranks() -> None:
    """Ids are no order of merges: OPT gave every token of GPT-2 a new one."""
    for files in (
        {"vocab.json": json.dumps(vocabulary_json()).encode()},
        {"tokenizer.json": tokenizer_json(merges=[])},
        {"tokenizer.json": tokenizer_json(merges=None)},
    ):
        read = read_vocabulary(files)
        assert (read.kind, read.ranks_from, read.merges) == ("BPE", "none", None)
        assert not read.rank_of()
        assert not can_segment(read)


def test_of_a_merge_full_of_spaces_few_places_are_tried() -> None:
    class Counted(dict[str, int]):
        asked = 0

        def __contains__(self, text: object) -> bool:
            type(self).asked += 1
            return super().__contains__(text)

    with pytest.raises(UnreadableTokenizer, match="not a merge"):
        merges_of(["a" + " " * 50_000], Counted())
    assert Counted.asked <= 2 * MOST_SPACES
    assert merges_of([" " * 33], {" " * 16: 0}) == [(" " * 16, " " * 16)]
