"""Until when does a model know what happened? From right and wrong answers to dated questions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# A drop of the log likelihood by this much is outside of the interval: 95 % for one parameter (half of 3.84).
INTERVAL_DROP = 1.92
# An estimate must be likelier than guessing by this much, in nats: e^-6 times 50 months is about one in ten at worst.
MINIMUM_GAIN = 6.0


@dataclass(frozen=True)
class DatedAnswer:
    """month: counted from year 0 (12·year + month - 1). chance: an upper bound of guessing right."""

    month: int
    right: bool
    chance: float


@dataclass(frozen=True)
class Knowledge:
    """Answers of a period. p: of so many right ones by guessing alone, one-sided and exact (Poisson binomial)."""

    questions: int
    right: int
    share: float
    by_chance: float
    p: float

    @property
    def above_chance(self) -> float:
        """Share of the questions that was known rather than guessed, as far as the bound of guessing tells."""
        return max(0.0, (self.share - self.by_chance) / (1 - self.by_chance))


@dataclass(frozen=True)
class CutoffEstimate:
    """Last month of which the model knows, most likely, and the interval of months that are nearly as likely."""

    month: int
    earliest: int
    latest: int


def month_number(date: str) -> int:
    """ "2025-05-31", "2025-05" or "2025" as a month number; a year alone is its December. Raises ValueError."""
    parts = [int(part) for part in date.split("-")]
    month = parts[1] if len(parts) > 1 else 12
    if not 1 <= month <= 12:
        raise ValueError(f"{date} has no month {month}")
    return 12 * parts[0] + month - 1


def month_name(month: int) -> str:
    """A month number as "2025-05"."""
    return f"{month // 12:04d}-{month % 12 + 1:02d}"


def knowledge(answers: Sequence[DatedAnswer]) -> Knowledge:
    """How many answers are right, and could that be guessing? No answers: nothing is known, p = 1."""
    if not answers:
        return Knowledge(0, 0, 0.0, 0.0, 1.0)
    right = sum(one.right for one in answers)
    chances = [one.chance for one in answers]
    return Knowledge(len(answers), right, right / len(answers), sum(chances) / len(answers), at_least(right, chances))


def at_least(successes: int, chances: Sequence[float]) -> float:
    """Probability of at least so many successes of independent trials with these chances (Poisson binomial, exact)."""
    distribution = np.zeros(len(chances) + 1)
    distribution[0] = 1.0
    for count, chance in enumerate(chances, start=1):
        if not 0 <= chance <= 1:
            raise ValueError(f"{chance} is no probability")
        distribution[1 : count + 1] = distribution[1 : count + 1] * (1 - chance) + distribution[:count] * chance
        distribution[0] *= 1 - chance
    return float(min(1.0, distribution[max(0, successes) :].sum()))


def estimate_cutoff(answers: Sequence[DatedAnswer]) -> CutoffEstimate | None:
    """The most likely last month of a model that knows a constant share up to it and guesses after it.

    Maximum likelihood over all months between the questions, with the share estimated for each. None without answers,
    and when guessing alone is nearly as likely.
    """
    if not answers:
        return None
    first, last = min(one.month for one in answers), max(one.month for one in answers)
    guessing = _log_likelihood(answers, first - 1)
    months = range(first - 1, last + 1)
    likelihoods = [_log_likelihood(answers, month) for month in months]
    highest = max(likelihoods)
    if highest - guessing <= MINIMUM_GAIN:
        return None
    near = [month for month, value in zip(months, likelihoods, strict=True) if highest - value <= INTERVAL_DROP]
    # Of equally likely months the last: nothing was asked between them.
    best = max(month for month, value in zip(months, likelihoods, strict=True) if highest - value <= 1e-9)
    return CutoffEstimate(best, min(near), max(near))


def _log_likelihood(answers: Sequence[DatedAnswer], cutoff: int) -> float:
    before = [one for one in answers if one.month <= cutoff]
    right = sum(one.right for one in before)
    # A share of exactly 0 or 1 would make one surprise impossible.
    known = (right + 0.5) / (len(before) + 1)
    total = 0.0
    for one in answers:
        # A model that knows is right at least as often as one that guesses.
        share = max(known, one.chance) if one.month <= cutoff else one.chance
        total += math.log(share if one.right else 1 - share)
    return total
