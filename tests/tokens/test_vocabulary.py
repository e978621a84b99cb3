"""Common tokens of two vocabularies."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checks.tokens import Vocabulary, shared_tokens

TEXTS = st.lists(st.one_of(st.none(), st.binary(min_size=1, max_size=4)), max_size=40)


def vocabulary(texts: list[bytes | None]) -> Vocabulary:
    return Vocabulary("BPE", tuple(texts), tuple(range(len(texts))), "ids")


@given(TEXTS, TEXTS, st.integers(0, 50))
def test_shared_tokens_are_the_same_bytes_on_both_sides(
    a: list[bytes | None], b: list[bytes | None], count: int
) -> None:
    ours, theirs = shared_tokens(vocabulary(a), vocabulary(b), count)
    assert [a[index] for index in ours] == [b[index] for index in theirs]
    assert None not in [a[index] for index in ours]
    assert len(set(ours)) == len(ours) == min(count, len((set(a) & set(b)) - {None}))


@given(TEXTS, TEXTS, st.randoms(use_true_random=False))
def test_the_order_depends_on_the_texts_alone(
    a: list[bytes | None], b: list[bytes | None], shuffler: random.Random
) -> None:
    ours, _ = shared_tokens(vocabulary(a), vocabulary(b), 10)
    shuffled = list(b)
    shuffler.shuffle(shuffled)
    again, _ = shared_tokens(vocabulary(a), vocabulary(shuffled), 10)
    assert ours == again


def test_another_seed_is_another_choice() -> None:
    texts: list[bytes | None] = [bytes([one, two]) for one in range(30) for two in range(30)]
    a = vocabulary(texts)
    first, second = shared_tokens(a, a, 50)[0], shared_tokens(a, a, 50, seed=1)[0]
    assert len(set(first) & set(second)) < 20
    # Not the first ids either: the choice is spread over the vocabulary.
    assert 200 < sum(first) / 50 < 700


def test_a_negative_count_is_an_error() -> None:
    with pytest.raises(ValueError, match="negative"):
        shared_tokens(vocabulary([b"a"]), vocabulary([b"a"]), -1)


def test_of_tokens_for_the_same_bytes_the_first_counts() -> None:
    one = Vocabulary("BPE", (b"ab", b"ab", None), (5, 3, None), "merges")
    assert one.ids() == {b"ab": 0}
    assert one.rank_of() == {b"ab": 3}
