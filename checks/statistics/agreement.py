"""Do two models answer alike more often than unrelated models do? Tests on answers to the same prompts.

Pure functions of texts and counts. The control group is what "unrelated" means: without one, agreement says nothing,
since all models continue much of ordinary language alike.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

# Below this many successes or failures of either side the normal approximation gives way to Fisher's exact test.
FEWEST_FOR_NORMAL = 5

_FIRST_WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class ProportionTest:
    """One-sided test of a larger proportion. z: pooled statistic; p: from it, or `exact` for few counts."""

    z: float
    p: float
    exact: bool


@dataclass(frozen=True)
class ControlledAgreement:
    """How much more a candidate agrees with one reference than with the control that comes closest to it.

    agreement: mean over prompts, 0 to 1. excess: over the best control. spread: between the best and the worst control,
    what unrelated models differ by. p: one-sided, against the best control. detectable: the excess that would have
    reached `p_wanted`.
    """

    reference: str
    agreement: float
    best_control: str
    control_agreement: float
    excess: float
    spread: float
    controls: int
    p: float
    detectable: float
    z: float | None = None

    def corrected_p(self, tests: int) -> float:
        """Bonferroni's correction for so many tested references."""
        return min(1.0, self.p * max(1, tests))


def first_word(text: str) -> str:
    """The first word or punctuation mark of a continuation, casefolded; "" when there is none.

    A word, not a token: tokenizers cut words differently, and the comparison is of text.
    """
    found = _FIRST_WORD.search(unicodedata.normalize("NFKC", text))
    return found.group().casefold() if found else ""


def words(text: str) -> list[str]:
    """The words of a text without case, accents and punctuation."""
    plain = "".join(one for one in unicodedata.normalize("NFKD", text) if not unicodedata.combining(one))
    return re.findall(r"\w+", plain.casefold().replace("_", " "))


def says(answer: str, accepted: Sequence[str]) -> bool:
    """Does one of the accepted names stand in the answer, as whole words in a row?"""
    said = f" {' '.join(words(answer))} "
    return any(wanted and f" {' '.join(wanted)} " in said for wanted in map(words, accepted))


def wording_similarity(first: Sequence[str], second: Sequence[str]) -> float:
    """Share of the longer text's words that need no edit: 1 - Levenshtein distance in words / words of the longer.

    0 to 1, symmetric, 1 for equal texts. Two empty texts have nothing in common: 0.
    """
    longest = max(len(first), len(second))
    if not longest:
        return 0.0
    row = list(range(len(second) + 1))
    for position, word in enumerate(first, start=1):
        diagonal, row[0] = row[0], position
        for column, other in enumerate(second, start=1):
            diagonal, row[column] = (
                row[column],
                min(row[column] + 1, row[column - 1] + 1, diagonal + (word != other)),
            )
    return 1 - row[-1] / longest


def larger_proportion(hits: int, control_hits: int, trials: int) -> ProportionTest:
    """Is the first proportion of `trials` larger than the second, of as many?

    Pooled two-proportion z-test, one-sided, and Fisher's exact test for few counts, as in model provenance testing
    (Nikolic, Baluta, Saxena, arXiv 2502.00706, whose code takes the two-sided p). It treats both proportions as
    independent; on the same prompts they rise and fall together, which makes the test conservative.
    Raises ValueError for counts outside of the trials.
    """
    if trials < 1 or not 0 <= hits <= trials or not 0 <= control_hits <= trials:
        raise ValueError(f"{hits} and {control_hits} hits of {trials} trials are no proportions")
    pooled = (hits + control_hits) / (2 * trials)
    spread = math.sqrt(pooled * (1 - pooled) * 2 / trials)
    z = (hits - control_hits) / trials / spread if spread else 0.0
    if min(hits, control_hits, trials - hits, trials - control_hits) >= FEWEST_FOR_NORMAL:
        return ProportionTest(z, float(stats.norm.sf(z)), exact=False)
    table = [[hits, trials - hits], [control_hits, trials - control_hits]]
    return ProportionTest(z, float(stats.fisher_exact(table, alternative="greater")[1]), exact=True)


def equal_answers(
    candidate: Sequence[str],
    references: Mapping[str, Sequence[str]],
    p_wanted: float,
    related: Collection[frozenset[str]] = (),
) -> list[ControlledAgreement]:
    """Model provenance testing: agreement of each reference's answers against the best of its controls.

    candidate, references: answers to the same prompts, in order; equal ones agree, prompts to which the candidate has
    no answer ("") are left out. Controls of a reference: the other references but those in `related` with it. Nothing
    is returned for a reference without a control. Raises ValueError for unequal numbers of answers.
    """
    counted = [index for index, answer in enumerate(candidate) if answer]
    _require_equal_length(candidate, references)
    if not counted:
        return []
    hits = {name: sum(candidate[index] == answers[index] for index in counted) for name, answers in references.items()}
    trials, found = len(counted), []
    for name in references:
        controls = _controls(name, references, related)
        if not controls:
            continue
        best = max(controls, key=hits.__getitem__)
        test = larger_proportion(hits[name], hits[best], trials)
        share = hits[best] / trials
        found.append(
            ControlledAgreement(
                reference=name,
                agreement=hits[name] / trials,
                best_control=best,
                control_agreement=share,
                excess=(hits[name] - hits[best]) / trials,
                spread=(hits[best] - min(hits[one] for one in controls)) / trials,
                controls=len(controls),
                p=test.p,
                detectable=float(stats.norm.isf(p_wanted))
                * math.sqrt(2 * max(share * (1 - share), 1 / trials) / trials),
                z=test.z,
            )
        )
    return found


def alike_wording(
    candidate: Sequence[Sequence[str]],
    references: Mapping[str, Sequence[Sequence[str]]],
    p_wanted: float,
    related: Collection[frozenset[str]] = (),
    seed: int = 0,
    draws: int = 99_999,
) -> list[ControlledAgreement]:
    """Is the candidate's wording nearer to a reference's than to that of every control?

    candidate, references: the words of the answers to the same prompts, in order. Statistic: mean excess of
    `wording_similarity` over the control. p: permutation test that flips the signs of the prompts' differences, exact
    where a prompt is as likely to favour either side, the largest over the controls; never below 1/(draws + 1).
    Raises ValueError for unequal numbers of answers.
    """
    _require_equal_length(candidate, references)
    if not candidate:
        return []
    similarity = {
        name: np.array([wording_similarity(ours, theirs) for ours, theirs in zip(candidate, answers, strict=True)])
        for name, answers in references.items()
    }
    found = []
    for name in references:
        controls = _controls(name, references, related)
        if not controls:
            continue
        means = {one: float(similarity[one].mean()) for one in controls}
        best = max(controls, key=means.__getitem__)
        differences = {one: similarity[name] - similarity[one] for one in controls}
        against_best = differences[best]
        deviation = float(against_best.std(ddof=1)) if len(against_best) > 1 else 1.0
        found.append(
            ControlledAgreement(
                reference=name,
                agreement=float(similarity[name].mean()),
                best_control=best,
                control_agreement=means[best],
                excess=float(against_best.mean()),
                spread=means[best] - min(means.values()),
                controls=len(controls),
                p=max(sign_flip_p(one, seed, draws) for one in differences.values()),
                detectable=float(stats.norm.isf(p_wanted)) * deviation / math.sqrt(len(candidate)),
            )
        )
    return found


def sign_flip_p(differences: np.ndarray, seed: int = 0, draws: int = 99_999) -> float:
    """One-sided p of a mean above 0, if each difference were as likely to have the other sign."""
    signs = np.random.default_rng(seed).integers(0, 2, (draws, len(differences)), dtype=np.int8) * 2 - 1
    flipped = signs @ differences
    # The same sum in another order may differ in the last digit.
    reached = flipped >= differences.sum() - 1e-9 * (1 + np.abs(differences).sum())
    return float((1 + np.count_nonzero(reached)) / (draws + 1))


def _controls(reference: str, references: Mapping[str, object], related: Collection[frozenset[str]]) -> list[str]:
    return [one for one in references if one != reference and frozenset((one, reference)) not in related]


def _require_equal_length(candidate: Sequence[object], references: Mapping[str, Sequence[object]]) -> None:
    for name, answers in references.items():
        if len(answers) != len(candidate):
            raise ValueError(f"{name} has {len(answers)} answers and the candidate {len(candidate)}")
