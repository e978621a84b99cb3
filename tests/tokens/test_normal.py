"""From written tokens to bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checks.tokens.normal import byte_alphabet, byte_level, is_byte_level, looks_special, metaspace, wordpiece


def test_the_byte_alphabet_is_that_of_the_tokenizers_library() -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    assert set(byte_alphabet()) == set(ByteLevel.alphabet())
    assert sorted(byte_alphabet().values()) == list(range(256))


@given(st.text(max_size=20))
def test_byte_level_text_is_what_the_library_wrote(text: str) -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    pieces = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    assert b"".join(byte_level(piece) for piece, _ in pieces) == text.encode()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("▁the", b" the"), ("▁▁", b"  "), ("<0x0A>", b"\n"), ("<0xff>", b"\xff"), ("<0x1>", b"<0x1>"), ("Ġ", b"\xc4\xa0")],
)
def test_metaspace(text: str, expected: bytes) -> None:
    assert metaspace(text) == expected


def test_added_text_outside_the_byte_alphabet_is_utf8() -> None:
    assert byte_level("한") == "한".encode()
    assert byte_level("a b") == b"a b"


def test_lone_surrogates_do_not_stop_a_reader() -> None:
    assert metaspace("\ud800") == b"\xed\xa0\x80"
    assert wordpiece("##\ud800") == b"\xed\xa0\x80"


def test_byte_level_vocabularies_are_told_from_others() -> None:
    alphabet = list(byte_alphabet())
    assert is_byte_level([*alphabet, "Ġthe", "ing"])
    assert not is_byte_level([*alphabet, "▁the", "ing"])
    assert not is_byte_level([*alphabet, *("한국어" * 200)])
    assert not is_byte_level(["a", "b", "Ġa"])
    assert not is_byte_level([])


@pytest.mark.parametrize("text", ["<s>", "</s>", "<|im_end|>", "[MASK]", "[extra_id_7]", "[|endofturn|]", "<pad>"])
def test_special_tokens_by_look(text: str) -> None:
    assert looks_special(text)


@pytest.mark.parametrize("text", ["the", "<", "<0x0A>", "[0]", "<a b>", "[]", ">>>", "<|>"])
def test_ordinary_tokens_by_look(text: str) -> None:
    assert not looks_special(text)
