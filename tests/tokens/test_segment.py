"""Cutting text with a vocabulary and its ranks, against the tokenizers library."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checks.tokens import Vocabulary, read_vocabulary
from checks.tokens.segment import fixed_text, learnt_words, segment, segment_text, words


@given(st.text(max_size=80))
def test_words_are_the_text(text: str) -> None:
    assert "".join(words(text)) == text


def test_words_are_those_of_byte_level_tokenizers() -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    splitter = ByteLevel(add_prefix_space=False)
    for text in fixed_text().values():
        expected = [text[start:end] for _, (start, end) in splitter.pre_tokenize_str(text)]
        assert words(text) == expected


def test_pieces_are_those_of_the_library(examples: Path) -> None:
    from tokenizers import Tokenizer

    file = examples / "base" / "tokenizer.json"
    library, vocabulary = Tokenizer.from_file(str(file)), read_vocabulary({"tokenizer.json": file.read_bytes()})
    for text in fixed_text().values():
        ours = [piece for word in segment_text(text, vocabulary) for piece in word]
        assert ours == [vocabulary.texts[index] for index in library.encode(text).ids]


def test_the_pair_of_lowest_rank_is_merged_first() -> None:
    ranks = {b"ab": 1, b"bc": 0, b"abc": 2}
    assert segment("abc", ranks, byte_level=True) == [b"abc"]
    assert segment("abc", {b"ab": 1, b"bc": 0}, byte_level=True) == [b"a", b"bc"]
    assert segment("abab", {b"ab": 1}, byte_level=True) == [b"ab", b"ab"]


def test_characters_are_not_cut_by_vocabularies_of_characters() -> None:
    assert segment("한국", {}, byte_level=False) == ["한".encode(), "국".encode()]
    assert len(segment("한국", {}, byte_level=True)) == 6


@given(st.text(max_size=30), st.booleans())
def test_pieces_are_the_word(word: str, byte_level: bool) -> None:
    try:
        word.encode()
    except UnicodeEncodeError:
        return
    ranks = {b"ab": 0, b"\xed\x95": 1, b"aa": 2}
    assert b"".join(segment(word, ranks, byte_level)) == word.encode()


def test_characters_that_a_vocabulary_lacks_fall_back_on_bytes() -> None:
    vocabulary = Vocabulary("BPE", ("한".encode(), b" a"), (None, 0), "ids", byte_level=False)
    assert segment_text("한국 a", vocabulary) == [["한".encode(), b"\xea", b"\xb5", b"\xad"], [b" a"]]


def test_the_fixed_text_has_its_parts_and_power() -> None:
    text = fixed_text()
    assert list(text) == ["korean", "english", "code", "digits"]
    assert all(len(words(one)) >= 80 for one in text.values())
    assert sum("가" <= character <= "힣" for character in text["korean"]) > 400


@pytest.mark.parametrize("part", ["english", "code", "digits"])
def test_other_parts_are_ascii(part: str) -> None:
    assert fixed_text()[part].isascii()


def test_a_script_that_neither_has_learnt_does_not_count() -> None:
    ours = Vocabulary("BPE", (b"ab", b"un"), (0, 1), "ids")
    theirs = Vocabulary("BPE", (b"bc", b"nd"), (0, 1), "ids")
    assert learnt_words("한국 abc xyz", ours, theirs) == ([[b" ", b"ab", b"c"]], [[b" ", b"a", b"bc"]])


def test_a_character_of_several_bytes_is_learnt_by_vocabularies_of_bytes_alone() -> None:
    texts = ("가".encode()[:2], "가".encode())
    of_bytes = Vocabulary("BPE", texts, (0, 1), "ids")
    of_characters = Vocabulary("BPE", texts, (0, 1), "ids", byte_level=False)
    assert len(learnt_words("가", of_bytes, of_bytes)[0]) == 1
    assert len(learnt_words("가", of_characters, of_characters)[0]) == 0
