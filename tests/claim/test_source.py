"""YAML with marks: types, duplicate keys, places."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checks.claim.source import ClaimError, Mark, read_source, suggestion


@pytest.fixture
def read(tmp_path: Path) -> Callable[[str], object]:
    def read_text(text: str) -> object:
        path = tmp_path / "claim.yaml"
        path.write_text(text, encoding="utf-8")
        return read_source(path).data

    return read_text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("102.6e9", 102.6e9),
        ("19.7e+12", 19.7e12),
        ("1e6", 1e6),
        ("48", 48),
        ("-3", -3),
        ("no", "no"),
        ("on", "on"),
        ("2025-05", "2025-05"),
        ("2025-05-01", "2025-05-01"),
        ("true", True),
        ("~", None),
        ("0x10", "0x10"),
        ("1_000", "1_000"),
        ("'48'", "48"),
    ],
)
def test_scalars_have_the_types_of_yaml_1_2(read: Callable[[str], object], text: str, value: object) -> None:
    assert read(f"key: {text}") == {"key": value}
    assert type(read(f"key: {text}")["key"]) is type(value)  # type: ignore[index]


def test_every_key_and_value_has_its_place(tmp_path: Path) -> None:
    path = tmp_path / "claim.yaml"
    path.write_text("claim: x\nreferences:\n  - a\n  - {name: b, path: c}\n")
    source = read_source(path)
    assert source.mark(("claim",)) == Mark(1, 1)
    assert source.value_mark(("claim",)) == Mark(1, 8)
    assert source.value_mark(("references", 0)) == Mark(3, 5)
    assert source.mark(("references", 1, "path")) == Mark(4, 15)
    assert source.mark(("references", 1, "absent")) == Mark(4, 5)


def test_duplicate_keys_are_all_named_with_their_first_place(read: Callable[[str], object]) -> None:
    with pytest.raises(ClaimError) as caught:
        read("claim: a\nmodel: m\nclaim: b\ncomponents:\n  text: {prefix: a, prefix: b}\n")
    messages = [(problem.mark, problem.message) for problem in caught.value.problems]
    assert messages == [
        (Mark(3, 1), "duplicate key 'claim'; it stands first in line 1"),
        (Mark(5, 21), "duplicate key 'prefix'; it stands first in line 5"),
    ]


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("claim: [a\n", Mark(2, 1), "not valid YAML"),
        ("a: 1\n---\nb: 2\n", Mark(2, 1), "not valid YAML"),
        ("a: &x 1\nb: *x\n", Mark(1, 4), "aliases"),
        ("? [a]\n: 1\n", Mark(1, 3), "a key must be text"),
    ],
)
def test_what_is_no_plain_yaml_is_refused_at_its_place(
    read: Callable[[str], object], text: str, place: Mark, message: str
) -> None:
    with pytest.raises(ClaimError) as caught:
        read(text)
    assert message in caught.value.problems[0].message
    assert caught.value.problems[0].mark == place


def test_a_python_tag_is_not_constructed(read: Callable[[str], object]) -> None:
    with pytest.raises(ClaimError, match=r"the tag .* is not used"):
        read("a: !!python/object/apply:os.getcwd []")


@pytest.mark.parametrize("number", [".nan", ".inf", "-.inf", "1e999"])
def test_numbers_must_be_finite(read: Callable[[str], object], number: str) -> None:
    with pytest.raises(ClaimError, match="a number must be finite"):
        read(f"a: {number}")


def test_numbers_that_other_readers_stumble_over(read: Callable[[str], object]) -> None:
    assert read("a: 08") == {"a": 8}
    with pytest.raises(ClaimError, match="not a number that can be used"):
        read("a: " + 5000 * "9")


def test_a_file_that_is_no_text_is_a_claim_error(tmp_path: Path) -> None:
    path = tmp_path / "claim.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ClaimError, match="cannot be read as UTF-8"):
        read_source(path)


@given(st.text(max_size=60))
def test_no_text_makes_anything_but_data_or_a_claim_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("any") / "claim.yaml"
    path.write_text(text, encoding="utf-8", newline="")
    with contextlib.suppress(ClaimError):
        read_source(path)


def test_suggestions_name_the_nearest_word_only() -> None:
    assert suggestion("similarity.maen", ["similarity.mean", "identity.mse"]) == "; did you mean 'similarity.mean'?"
    assert suggestion("zzz", ["similarity.mean"]) == ""
