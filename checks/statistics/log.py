"""What the numbers of a training log say about how the run began and whether it is one run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

Series = Sequence[tuple[int, float]]

WINDOW = 8  # records on each side of a place, of which each side's line is made

# A jump of the loss must stand out from the noise beside it and be worth naming: anywhere in a log, where as many
# places are tried as there are records, and at a place that another series names already, where one is.
NOISE_FACTOR = 8.0
NOISE_FACTOR_NAMED = 4.0
SMALLEST_JUMP = 0.1  # of the loss before it

# What is usual in a log may be passed so many times before it is named.
GAP_FACTOR = 3.0
RATE_FACTOR = 2.0

# A count of all tokens begins with at most so many records' worth.
FIRST_RECORDS = 3
SMALLEST_RATE_CHANGE = 0.1  # of the peak learning rate


@dataclass(frozen=True)
class Discontinuity:
    """A place, between two logged steps, at which a log is not what one uninterrupted run writes.

    signs: "step" (the steps go back), "gap", "tokens" (they go back, or another number a step), "learning rate",
    "loss" (it jumps).
    """

    before: int
    after: int
    signs: tuple[str, ...]
    details: tuple[str, ...]


def shortfall(first_loss: float, vocabulary: int) -> float:
    """How far below ln V does a loss lie, as a share of ln V? 0 for random weights, 1 for a loss of 0.

    A model that knows nothing gives each of V tokens the probability 1/V, a loss of ln V nats. Raises ValueError unless
    the loss is finite and V at least 2.
    """
    if not math.isfinite(first_loss) or vocabulary < 2:
        raise ValueError(f"a finite loss and at least two tokens are needed, got {first_loss} and {vocabulary}")
    return 1 - first_loss / math.log(vocabulary)


def discontinuities(loss: Series, tokens: Series = (), learning_rate: Series = ()) -> tuple[Discontinuity, ...]:
    """Where is the log not that of one uninterrupted run? Each series has steps and values in the order of the log.

    Places of different series that are at most one logged interval apart are one place with several signs. A loss that
    jumps where the steps go back is compared with what was logged of the same steps before.
    """
    loss, tokens, learning_rate = (
        [(step, value) for step, value in series if math.isfinite(value)] for series in (loss, tokens, learning_rate)
    )
    places = [*_step_places(loss), *_token_places(tokens), *_rate_places(learning_rate)]
    return _joined([*places, *_loss_places(loss, places)], _interval(loss))


def not_all_tokens(tokens: Series) -> str | None:
    """Why is this series no count of all tokens since the run began? None if it may be one.

    Such a count grows with every step, by at least a token, and begins with what the first few records add. Steps that
    were logged again after a restart count once, as they were logged last.
    """
    last = sorted(dict(tokens).items())
    if len(last) < 2:
        return "one record does not tell whether it counts all tokens or those of a step"
    added = [after - before for (_, before), (_, after) in _pairs(last)]
    if min(added) <= 0:
        return "the logged tokens do not grow from record to record, as those of single steps or of several phases"
    if last[-1][1] - last[0][1] < last[-1][0] - last[0][0]:
        return "the logged tokens grow by less than one a step: they are in another unit"
    if last[0][1] > FIRST_RECORDS * _usual(added):
        return f"the log begins at {last[0][1]:.4g} tokens: what came before is not in it"
    return None


_Place = tuple[int, int, str, str]


def _pairs(series: Series) -> list[tuple[tuple[int, float], tuple[int, float]]]:
    return list(pairwise(series))


def _usual(values: Sequence[float]) -> float:
    """The median of the positive values; 0 where there is none."""
    positive = [value for value in values if value > 0]
    return float(np.median(positive)) if positive else 0.0


def _interval(series: Series) -> float:
    return _usual([later - earlier for (earlier, _), (later, _) in _pairs(series)])


def _is_gap(before: int, after: int, usual: float) -> bool:
    return usual > 0 and after - before > GAP_FACTOR * usual


def _step_places(loss: Series) -> list[_Place]:
    usual = _interval(loss)
    places: list[_Place] = []
    if len(loss) > 1 and _is_gap(0, loss[0][0], max(usual, 1.0)):
        places.append((0, loss[0][0], "gap", f"the log begins at step {loss[0][0]}"))
    for (before, _), (after, _) in _pairs(loss):
        if after <= before:
            places.append((before, after, "step", f"the steps go from {before} back to {after}"))
        elif _is_gap(before, after, usual):
            places.append((before, after, "gap", f"no record between steps {before} and {after}"))
    return places


def _token_places(tokens: Series) -> list[_Place]:
    """Tokens must grow with the steps. Their number a step may change (a larger batch), and is named."""
    rates = [(b - a) / (later - earlier) if later > earlier else 0.0 for (earlier, a), (later, b) in _pairs(tokens)]
    usual = _usual(rates)
    places: list[_Place] = []
    for ((before, a), (after, b)), rate in zip(_pairs(tokens), rates, strict=True):
        if b < a:
            places.append((before, after, "tokens", f"the tokens go from {a:g} back to {b:g}"))
        elif after > before and usual and not usual / GAP_FACTOR <= rate <= GAP_FACTOR * usual:
            places.append((before, after, "tokens", f"{rate:g} tokens a step, and {usual:g} usually"))
    return places


def _rate_places(learning_rate: Series) -> list[_Place]:
    """A schedule is smooth after its warm-up: from record to record it does not halve or double, except near zero."""
    values = np.array([value for _, value in learning_rate], dtype=np.float64)
    if len(values) < 3 or values.max() <= 0:
        return []
    usual = _interval(learning_rate)
    warmed_up = int(np.argmax(np.diff(values) < 0)) if (np.diff(values) < 0).any() else len(values)
    places: list[_Place] = []
    for index in range(warmed_up, len(values) - 1):
        (before, old), (after, new) = learning_rate[index], learning_rate[index + 1]
        large = abs(new - old) > SMALLEST_RATE_CHANGE * values.max()
        if large and not old / RATE_FACTOR <= new <= RATE_FACTOR * old and not _is_gap(before, after, usual):
            text = f"the learning rate goes from {old:g} to {new:g} between {before} and {after}"
            places.append((before, after, "learning rate", text))
    return places


def _loss_places(loss: Series, named: Sequence[_Place]) -> list[_Place]:
    """Where the lines through the losses before and after a place do not meet (a regression discontinuity)."""
    usual = _interval(loss)
    values = np.array([value for _, value in loss], dtype=np.float64)
    suspected = {(before, after) for before, after, _, _ in named}
    found: dict[int, tuple[float, float]] = {}  # index of the first record after the place → jump, in nats and in noise
    for index in range(WINDOW, len(loss) - WINDOW + 1):
        before, after = loss[index - 1][0], loss[index][0]
        if not _is_gap(before, after, usual):
            jump, noise = _jump(loss, values, index) if after > before else _jump_back(loss, values, index)
            factor = NOISE_FACTOR_NAMED if (before, after) in suspected else NOISE_FACTOR
            if abs(jump) > factor * noise and abs(jump) > SMALLEST_JUMP * abs(float(values[index - 1])):
                found[index] = (jump, abs(jump) / noise if noise else math.inf)
    places: list[_Place] = []
    for index, (jump, size) in found.items():
        if all(size >= found[near][1] for near in range(index - WINDOW, index + WINDOW) if near in found):
            before, after = loss[index - 1][0], loss[index][0]
            places.append((before, after, "loss", f"the loss jumps by {jump:+.3f} between {before} and {after}"))
    return places


def _jump(loss: Series, values: np.ndarray, index: int) -> tuple[float, float]:
    """Difference at a place of the lines through the records on both sides, and the standard error of it."""
    left, left_error = _at_end(values[index - WINDOW : index])
    right, right_error = _at_end(values[index : index + WINDOW][::-1])
    return right - left, math.hypot(left_error, right_error)


def _jump_back(loss: Series, values: np.ndarray, index: int) -> tuple[float, float]:
    """Where the steps go back: mean difference to the losses logged of the same steps before, and the noise."""
    steps = np.array([step for step, _ in loss[:index]], dtype=np.float64)
    order = np.argsort(steps, kind="stable")
    repeated = [at for at in range(index, min(index + WINDOW, len(loss))) if loss[at][0] <= steps.max()]
    again = np.array([loss[at][0] for at in repeated], dtype=np.float64)
    differences = values[repeated] - np.interp(again, steps[order], values[:index][order])
    noise = float(np.median(np.abs(np.diff(values[max(0, index - WINDOW) : index])))) or 1e-12
    return float(np.mean(differences)), noise


def _at_end(values: np.ndarray) -> tuple[float, float]:
    """The line through evenly spaced values, half an interval after the last, and its standard error there."""
    count = len(values)
    places = np.arange(count, dtype=np.float64)
    slope, start = np.polyfit(places, values, 1)
    residuals = values - (slope * places + start)
    end, middle = count - 0.5, (count - 1) / 2
    spread = 1 / count + (end - middle) ** 2 / float(np.sum((places - middle) ** 2))
    return float(start + slope * end), math.sqrt(float(np.sum(residuals**2)) / (count - 2) * spread)


def _joined(places: list[_Place], interval: float) -> tuple[Discontinuity, ...]:
    joined: list[list[_Place]] = []
    for place in sorted(places, key=lambda one: (max(one[0], one[1]), one[2])):
        last = joined[-1][-1] if joined else None
        if last is not None and max(place[0], place[1]) - max(last[0], last[1]) <= interval:
            joined[-1].append(place)
        else:
            joined.append([place])
    return tuple(
        Discontinuity(
            group[0][0],
            group[0][1],
            tuple(dict.fromkeys(one[2] for one in group)),
            tuple(one[3] for one in group),
        )
        for group in joined
    )
