"""Mistral's tekken.json."""

from __future__ import annotations

import base64
import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checks.checkpoint.errors import CheckpointUnavailable
from checks.tokens import read_vocabulary
from tests.tokens.test_files import BYTES, WORDS

SPECIAL = 10


def entries(texts: list[bytes]) -> list[dict[str, Any]]:
    return [
        {"rank": rank, "token_bytes": base64.b64encode(text).decode(), "token_str": None}
        for rank, text in enumerate(texts)
    ]


def tekken(**changes: Any) -> bytes:
    """A file that lists one token more than its model has."""
    config = {"pattern": "", "default_vocab_size": SPECIAL + 265, "default_num_special_tokens": SPECIAL}
    special = [{"rank": 1, "token_str": "<s>", "is_control": True}, {"rank": 2, "token_str": "[INST]"}]
    vocabulary = entries([*BYTES, *WORDS, b"beyond"])
    return json.dumps({"config": config, "vocab": vocabulary, "special_tokens": special, **changes}).encode()


def test_ids_begin_after_the_special_tokens() -> None:
    found = read_vocabulary({"tekken.json": tekken()})
    assert (found.kind, found.byte_level, found.ranks_from) == ("BPE", True, "ranks")
    assert found.texts[SPECIAL:] == (*BYTES, *WORDS)
    assert set(found.texts[:SPECIAL]) == {None}
    assert dict(found.special) == {"<s>": 1, "[INST]": 2}
    assert sorted(found.rank_of(), key=found.rank_of().__getitem__) == WORDS


def test_older_files_list_no_special_tokens() -> None:
    for special in (None, []):
        assert read_vocabulary({"tekken.json": tekken(special_tokens=special)}).special == {}


def config(size: Any, special: Any = SPECIAL) -> dict[str, Any]:
    return {"default_vocab_size": size, "default_num_special_tokens": special}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"config": None}, "no config"),
        ({"vocab": {}}, "no config beside a vocab"),
        ({"config": config(10**9)}, "no token id"),
        ({"config": config(300, -1)}, "no token id"),
        ({"config": config(300, True)}, "no token id"),
        ({"config": config(SPECIAL + 267)}, "lists 266 tokens and states 267"),
        ({"config": config(SPECIAL)}, "states 0"),
        ({"vocab": entries(BYTES)[::-1] + entries(BYTES)}, "entry 0"),
        ({"vocab": ["a"] * 300}, "entry 0"),
        ({"vocab": [{"rank": 0, "token_bytes": "!"}] * 300}, "token 0 is not base64"),
        ({"vocab": [{"rank": 0, "token_bytes": 7}] * 300}, "token 0 is not base64"),
        ({"vocab": [{"rank": 0, "token_bytes": "é"}] * 300}, "token 0 is not base64"),
        ({"special_tokens": [7]}, "has no text"),
        ({"special_tokens": 7}, "no list"),
        ({"special_tokens": [{"rank": SPECIAL, "token_str": "<s>"}]}, "has the id 10"),
        ({"special_tokens": [{"rank": "1", "token_str": "<s>"}]}, "no token id"),
    ],
)
def test_hostile_files_are_unavailable(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(CheckpointUnavailable, match=rf"tekken\.json: .*{says}"):
        read_vocabulary({"tekken.json": tekken(**changes)})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda one: st.lists(one, max_size=3) | st.dictionaries(st.sampled_from(["rank", "token_bytes"]), one, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from(["config", "vocab", "special_tokens"]), JSON))
def test_any_document_is_a_vocabulary_or_unavailable(changes: dict[str, Any]) -> None:
    with contextlib.suppress(CheckpointUnavailable):
        assert read_vocabulary({"tekken.json": tekken(**changes)}).ids()
