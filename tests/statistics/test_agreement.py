"""Tests of answers: counts against known values, exactness under the null, and both directions."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from checks.statistics.agreement import (
    ControlledAgreement,
    alike_wording,
    equal_answers,
    first_word,
    larger_proportion,
    says,
    sign_flip_p,
    wording_similarity,
    words,
)

TEXTS = st.lists(st.sampled_from("abcd"), max_size=12)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (" international law", "international"),
        ("\n\nThe", "the"),
        (", and", ","),
        (" 서울입니다.", "서울입니다"),
        ("3.5", "3"),
        ("   ", ""),
        ("", ""),
        ("**bold", "*"),
    ],
)
def test_first_word(text: str, word: str) -> None:
    assert first_word(text) == word


@pytest.mark.parametrize(
    ("answer", "accepted", "expected"),
    [
        ("It was Iga Świątek.", ["Swiatek"], True),
        ("MÅNESKIN, from Italy", ["Maneskin"], True),
        ("Paris Saint\u2011Germain", ["Paris Saint-Germain"], True),
        ("Laid", ["Lai"], False),
        ("Cote d\u2019Ivoire", ["Cote d'Ivoire"], True),
        ("I do not know.", ["Lai", "Faye"], False),
        ("", ["Lai"], False),
        ("anything", [""], False),
        ("anything", [], False),
    ],
)
def test_says(answer: str, accepted: list[str], expected: bool) -> None:
    assert says(answer, accepted) is expected


@given(TEXTS, TEXTS)
def test_wording_similarity_is_a_similarity(first: list[str], second: list[str]) -> None:
    value = wording_similarity(first, second)
    assert 0 <= value <= 1
    assert value == wording_similarity(second, first)
    assert (value == 1) == (first == second and bool(first))
    assert value == pytest.approx(wording_similarity(first[::-1], second[::-1]))


@given(TEXTS, TEXTS)
def test_wording_similarity_counts_edits(first: list[str], second: list[str]) -> None:
    def distance(one: list[str], other: list[str]) -> int:
        if not one or not other:
            return len(one) + len(other)
        table = np.zeros((len(one) + 1, len(other) + 1), dtype=int)
        table[:, 0], table[0] = range(len(one) + 1), range(len(other) + 1)
        for i, j in product(range(1, len(one) + 1), range(1, len(other) + 1)):
            substitution = table[i - 1, j - 1] + (one[i - 1] != other[j - 1])
            table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, substitution)
        return int(table[-1, -1])

    longest = max(len(first), len(second))
    expected = 1 - distance(first, second) / longest if longest else 0.0
    assert wording_similarity(first, second) == pytest.approx(expected)


def test_words() -> None:
    assert words("Árvíztűrő tükör-fúró, 2_3!") == ["arvizturo", "tukor", "furo", "2", "3"]


@given(st.integers(20, 400), st.data())
def test_larger_proportion_is_the_textbook_test(trials: int, data: st.DataObject) -> None:
    hits, control = data.draw(st.integers(0, trials)), data.draw(st.integers(0, trials))
    test = larger_proportion(hits, control, trials)
    assert test.z == pytest.approx(-larger_proportion(control, hits, trials).z)
    if test.exact:
        table = [[hits, trials - hits], [control, trials - control]]
        assert test.p == pytest.approx(stats.fisher_exact(table, alternative="greater")[1])
    else:
        chi_squared = stats.chi2_contingency([[hits, trials - hits], [control, trials - control]], correction=False)
        assert test.z**2 == pytest.approx(chi_squared.statistic, abs=1e-9)
        assert test.p == pytest.approx(stats.norm.sf(test.z))


@pytest.mark.parametrize(("hits", "control", "trials"), [(1, 0, 0), (5, 1, 4), (-1, 0, 4), (1, 5, 4)])
def test_counts_that_are_no_proportions(hits: int, control: int, trials: int) -> None:
    with pytest.raises(ValueError, match="no proportions"):
        larger_proportion(hits, control, trials)


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=8))
def test_sign_flips_agree_with_all_of_them(differences: list[float]) -> None:
    values = np.array(differences)
    sums = np.array([np.dot(signs, values) for signs in product((-1, 1), repeat=len(values))])
    exact = float((sums >= values.sum() - 1e-9 * (1 + np.abs(values).sum())).mean())
    assert sign_flip_p(values, draws=9_999) == pytest.approx(exact, abs=0.03)


def test_sign_flips_are_repeatable_and_never_zero() -> None:
    values = np.full(30, 0.5)
    assert sign_flip_p(values, draws=999) == sign_flip_p(values, draws=999) == 1 / 1000


# Against controls


def answers(seed: int, prompts: int = 300, common: float = 0.3) -> list[str]:
    """What a model says: a word that all say, or one of its own."""
    shared = np.random.default_rng(0).random(prompts) < common
    own = np.random.default_rng(seed).integers(0, 50, prompts)
    return ["the" if one else f"w{word}" for one, word in zip(shared, own, strict=True)]


def derived_from(base: list[str], kept: float, seed: int) -> list[str]:
    keep = np.random.default_rng(seed).random(len(base)) < kept
    other = answers(seed + 1000, len(base))
    return [one if stays else new for one, new, stays in zip(base, other, keep, strict=True)]


def nearest(found: list[ControlledAgreement]) -> ControlledAgreement:
    return min(found, key=lambda one: one.p)


def test_a_derived_model_is_found_and_the_innocent_is_not() -> None:
    references = {f"r{seed}": answers(seed) for seed in range(1, 6)}
    found = nearest(equal_answers(derived_from(references["r3"], 0.6, 7), references, 1e-3))
    assert found.reference == "r3"
    assert found.corrected_p(5) < 1e-6
    assert found.excess > 0.3
    assert found.controls == 4
    innocent = nearest(equal_answers(answers(99), references, 1e-3))
    assert innocent.corrected_p(5) > 0.05


def test_false_alarms_stay_below_the_level() -> None:
    """Common answers make the proportions rise and fall together, which only lowers the rate."""
    below = 0
    for trial in range(200):
        references = {f"r{seed}": answers(1000 * trial + seed, 100) for seed in range(1, 5)}
        below += nearest(equal_answers(answers(1000 * trial + 999, 100), references, 1e-3)).corrected_p(4) < 0.05
    assert below <= 10


def test_prompts_without_an_answer_do_not_count() -> None:
    references = {"a": ["x", "y", "", ""], "b": ["x", "z", "", ""]}
    found = {one.reference: one for one in equal_answers(["x", "y", "", ""], references, 1e-3)}
    assert found["a"].agreement == 1.0
    assert found["b"].agreement == 0.5
    assert equal_answers([""] * 4, references, 1e-3) == []


def test_relatives_are_no_controls() -> None:
    references = {f"r{seed}": answers(seed) for seed in range(1, 5)}
    references["sibling"] = derived_from(references["r1"], 0.9, 3)
    candidate = derived_from(references["r1"], 0.7, 5)
    hidden = {one.reference: one for one in equal_answers(candidate, references, 1e-3)}
    seen = {one.reference: one for one in equal_answers(candidate, references, 1e-3, {frozenset(("r1", "sibling"))})}
    assert hidden["r1"].p > 1e-3, "its sibling hides it"
    assert seen["r1"].p < 1e-9
    assert seen["r1"].controls == 3


def test_without_controls_nothing_is_said() -> None:
    assert equal_answers(["x"], {"a": ["x"]}, 1e-3) == []
    assert alike_wording([["x"]], {"a": [["x"]]}, 1e-3) == []


def test_unequal_numbers_of_answers_are_a_mistake() -> None:
    with pytest.raises(ValueError, match="a has 1 answers and the candidate 2"):
        equal_answers(["x", "y"], {"a": ["x"]}, 1e-3)
    with pytest.raises(ValueError, match="a has 1 answers and the candidate 2"):
        alike_wording([["x"], ["y"]], {"a": [["x"]]}, 1e-3)


def sentences(seed: int, prompts: int = 24) -> list[list[str]]:
    generator = np.random.default_rng(seed)
    return [[f"w{word}" for word in generator.integers(0, 30, 20)] for _ in range(prompts)]


def reworded(base: list[list[str]], seed: int) -> list[list[str]]:
    keep = np.random.default_rng(seed).random((len(base), 20)) < 0.7
    other = sentences(seed + 1000, len(base))
    return [
        [one if stays else new for one, new, stays in zip(ours, theirs, kept, strict=True)]
        for ours, theirs, kept in zip(base, other, keep, strict=True)
    ]


def test_wording_of_a_derived_model_is_found_and_the_innocent_is_not() -> None:
    references = {f"r{seed}": sentences(seed) for seed in range(1, 5)}
    found = nearest(alike_wording(reworded(references["r2"], 8), references, 1e-3))
    assert found.reference == "r2"
    assert found.corrected_p(4) < 1e-3
    assert found.excess > 0.3
    innocent = nearest(alike_wording(sentences(77), references, 1e-3))
    assert innocent.corrected_p(4) > 0.01
    assert abs(innocent.excess) < 0.05


def test_one_prompt_is_no_finding() -> None:
    references = {name: [[name, "b", "c"]] for name in "xyz"}
    found = nearest(alike_wording([["x", "b", "c"]], references, 1e-3))
    assert found.p > 0.3
