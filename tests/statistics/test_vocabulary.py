"""Vocabularies: counts against sets, orders against definitions, and the derivations that leave each pattern."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from checks.statistics.vocabulary import (
    contained,
    fingerprint,
    numbering,
    overlap,
    rank_agreement,
    segmentation_agreement,
)

TOKENS = st.sets(st.binary(min_size=1, max_size=3), max_size=30)


def numbered(count: int, start: int = 0, prefix: bytes = b"t") -> dict[bytes, int]:
    return {b"%s%d" % (prefix, index): index + start for index in range(count)}


def shuffled(vocabulary: dict[bytes, int], seed: int = 0) -> dict[bytes, int]:
    ids = list(vocabulary.values())
    random.Random(seed).shuffle(ids)
    return dict(zip(vocabulary, ids, strict=True))


@given(TOKENS, TOKENS)
def test_overlap_is_that_of_sets_and_its_directions_swap(a: set[bytes], b: set[bytes]) -> None:
    found, back = overlap(a, b), overlap(b, a)
    assert found.common == len(a & b)
    assert (found.of_candidate, found.of_reference) == (back.of_reference, back.of_candidate)
    assert found.jaccard == back.jaccard
    if a:
        assert found.of_candidate == len(a & b) / len(a)
    if a | b:
        assert found.jaccard == len(a & b) / len(a | b)


def test_overlap_of_nothing_is_undefined() -> None:
    found = overlap([], [])
    assert (found.of_candidate, found.of_reference, found.jaccard) == (None, None, None)


@pytest.mark.parametrize(
    ("candidate", "reference", "pattern", "prefix"),
    [
        (numbered(100), numbered(100), "same ids", 100),
        (numbered(100) | numbered(9, 100, b"new"), numbered(100), "extended at the end", 100),
        (numbered(100, 4096), numbered(100), "shifted ids", 0),
        (shuffled(numbered(100)), numbered(100), "renumbered", 0),
        (numbered(100), numbered(100, prefix=b"other"), "none", 0),
        (numbered(80), numbered(100), "none", 80),
        (numbered(95), numbered(100), "same ids", 95),
        ({}, numbered(3), "none", 0),
    ],
)
def test_numberings(candidate: dict[bytes, int], reference: dict[bytes, int], pattern: str, prefix: int) -> None:
    found = numbering(candidate, reference, order_kept=1.0)
    assert (found.pattern, found.prefix) == (pattern, prefix)


@pytest.mark.parametrize("order_kept", [None, 0.0, 0.0005, 0.9])
def test_other_ids_in_another_order_are_not_renumbered(order_kept: float | None) -> None:
    """Mistral's tekken holds 92 % of Phi-3's tokens, and is unrelated."""
    reference = numbered(100)
    assert numbering(shuffled(reference), reference, order_kept).pattern == "none"
    assert numbering(reference, reference, order_kept).pattern == "same ids"


def test_a_shift_of_one_block_alone_is_no_shifted_vocabulary() -> None:
    """Solar's ASCII stands 4096 after GLM's and nothing else does: once misread as a shift of the whole."""
    reference = numbered(1000)
    candidate = shuffled(numbered(1000, 50_000), seed=1) | {
        token: index + 4096 for token, index in list(reference.items())[:100]
    }
    found = numbering(candidate, reference, order_kept=1.0)
    assert found.shift == 4096
    assert found.shifted == pytest.approx(0.1, abs=0.01)
    assert found.pattern == "renumbered"


def test_unused_ids_do_not_end_the_prefix() -> None:
    reference = {b"a": 0, b"b": 2, b"c": 3}
    assert numbering(reference | {b"x": 1}, reference).prefix == 3


@given(st.permutations(range(12)), st.randoms(use_true_random=False))
def test_ranks_agree_with_their_definitions(order: list[int], shuffler: random.Random) -> None:
    tokens = [b"%d" % index for index in range(12)]
    reference = dict(zip(tokens, range(12), strict=True))
    candidate = dict(zip(tokens, order, strict=True))
    found = rank_agreement(candidate, reference)
    assert found.spearman == pytest.approx(spearmanr(order, range(12)).statistic)
    ours = sorted(tokens, key=candidate.__getitem__)
    following = dict(pairwise(ours))
    kept = [following.get(one) == other for one, other in pairwise(tokens)]
    assert found.order_kept == pytest.approx(sum(kept) / 11)
    # Neither the numbers themselves nor the order of the mappings matters.
    items = [(token, 7 * rank + 3) for token, rank in candidate.items()]
    shuffler.shuffle(items)
    assert rank_agreement(dict(items), reference) == found


def test_one_merge_list_inside_another_keeps_its_order() -> None:
    reference = numbered(500)
    candidate = {token: 2 * rank for token, rank in reference.items()} | {
        token: 2 * rank + 1 for token, rank in numbered(500, prefix=b"other").items()
    }
    found = rank_agreement(candidate, reference)
    assert (found.common, found.order_kept) == (500, 1)
    assert found.spearman == pytest.approx(1)


def test_similar_frequencies_alone_keep_no_order() -> None:
    """Two trainings on like text: ranks correlate highly, and neighbours still differ."""
    source = random.Random(0)
    reference = numbered(20_000)
    noisy = sorted(reference, key=lambda token: reference[token] + source.gauss(0, 3000))
    found = rank_agreement({token: rank for rank, token in enumerate(noisy)}, reference)
    assert found.spearman is not None
    assert found.spearman > 0.7
    assert found.order_kept is not None
    assert found.order_kept < 0.01


@pytest.mark.parametrize("tokens", [0, 1])
def test_ranks_of_nothing_are_undefined(tokens: int) -> None:
    found = rank_agreement(numbered(tokens), numbered(tokens))
    assert (found.common, found.spearman, found.order_kept) == (tokens, None, None)


CUT = st.lists(st.lists(st.binary(min_size=1, max_size=2), min_size=1, max_size=4), max_size=6)


@given(CUT)
def test_equal_cuts_agree_wholly(words: list[list[bytes]]) -> None:
    found = segmentation_agreement(words, words)
    assert found.jaccard in (1, None)
    assert found.cut_words == sum(len(word) > 1 for word in words)


@given(CUT)
def test_whole_words_share_no_cut(words: list[list[bytes]]) -> None:
    found = segmentation_agreement([[b"".join(word)] for word in words], words)
    assert found.jaccard in (0, None)


def test_cuts_are_counted_by_their_place_in_the_word() -> None:
    ours = [[b" un", b"kind"], [b" the"], [b"a", b"bc"]]
    theirs = [[b" un", b"ki", b"nd"], [b" the"], [b"ab", b"c"]]
    found = segmentation_agreement(ours, theirs)
    assert (found.words, found.cut_words) == (3, 2)
    assert found.jaccard == pytest.approx(1 / 4)
    assert found.same_words == 0


def test_other_words_are_an_error() -> None:
    with pytest.raises(ValueError, match="same words"):
        segmentation_agreement([[b"a"]], [[b"b"]])


def test_a_fingerprint_finds_its_vocabulary_inside_others() -> None:
    base, other = set(numbered(5000)), set(numbered(5000, prefix=b"other"))
    sketch = fingerprint(base, 200)
    assert len(sketch) == 200
    assert contained(sketch, base | other) == 1
    assert contained(sketch, other) == 0
    half = contained(sketch, {token for token in base if int(token[1:]) % 2})
    assert half == pytest.approx(0.5, abs=5 / (2 * 200**0.5))
    assert contained((), base) is None


@given(TOKENS)
def test_a_fingerprint_has_no_order(texts: set[bytes]) -> None:
    assert fingerprint(sorted(texts), 10) == fingerprint(sorted(texts, reverse=True), 10)
