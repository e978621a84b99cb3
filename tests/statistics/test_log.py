"""Where a log is not one run's: innocent curves are left alone, joints of two are found."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checks.statistics.log import Discontinuity, discontinuities, not_all_tokens, shortfall

Series = list[tuple[int, float]]


def run(
    records: int = 200, noise: float = 0.05, seed: int = 0, start: int = 10, interval: int = 10, floor: float = 2.0
) -> tuple[Series, Series, Series]:
    """Loss, tokens and learning rate of a made-up run: a power law with noise, warm-up and cosine."""
    source = np.random.default_rng(seed)
    steps = [start + interval * index for index in range(records)]
    losses = [floor + 8 * (1 + step / 150) ** -0.6 + source.normal(0, noise) for step in steps]
    last = start + interval * records
    rates = [
        1e-3 * step / 200 if step < 200 else 1e-3 * (0.1 + 0.45 * (1 + math.cos(math.pi * (step - 200) / last)))
        for step in steps
    ]
    zipped = list(zip(steps, losses, strict=True))
    return zipped, [(step, 1000.0 * step) for step in steps], list(zip(steps, rates, strict=True))


def later(series: Series, steps: int, more: float = 0.0) -> Series:
    return [(step + steps, value + more) for step, value in series]


@given(st.integers(2, 300_000))
def test_random_weights_have_no_shortfall(vocabulary: int) -> None:
    assert shortfall(math.log(vocabulary), vocabulary) == pytest.approx(0)
    assert shortfall(0, vocabulary) == 1
    assert shortfall(2 * math.log(vocabulary), vocabulary) == pytest.approx(-1)


@pytest.mark.parametrize(("loss", "vocabulary"), [(math.nan, 10), (math.inf, 10), (1.0, 1), (1.0, 0)])
def test_shortfall_of_what_is_no_loss_is_an_error(loss: float, vocabulary: int) -> None:
    with pytest.raises(ValueError, match="finite loss"):
        shortfall(loss, vocabulary)


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.sampled_from([0.005, 0.05, 0.2]), st.sampled_from([20, 100, 400]))
def test_one_run_has_no_discontinuity(seed: int, noise: float, records: int) -> None:
    assert discontinuities(*run(records, noise, seed)) == ()


@pytest.mark.parametrize("scale", [1, 100])
def test_the_unit_of_steps_does_not_matter(scale: int) -> None:
    first, second = run(60), run(60, seed=1, floor=1.0)
    joined = [first[0] + later(second[0], 600), first[1] + later(second[1], 600, 6e5), first[2] + later(second[2], 600)]
    found = discontinuities(*joined)
    scaled = discontinuities(*([(step * scale, value) for step, value in series] for series in joined))
    assert [(one.before * scale, one.after * scale, one.signs) for one in found] == [
        (one.before, one.after, one.signs) for one in scaled
    ]


def test_two_runs_joined_by_new_numbers_are_found() -> None:
    first, second = run(100), run(100, seed=1, floor=1.0)
    found = discontinuities(
        first[0] + later(second[0], 1000), first[1] + later(second[1], 1000, 1e6), first[2] + later(second[2], 1000)
    )
    assert [(one.before, one.after) for one in found] == [(1000, 1010)]
    assert set(found[0].signs) == {"loss", "learning rate"}


def test_a_run_continued_from_other_weights_is_found_by_its_loss() -> None:
    """The loss of a better model, the schedule carried on: one sign."""
    loss, tokens, rate = run(200)
    found = discontinuities(loss[:100] + [(step, value - 1.0) for step, value in loss[100:]], tokens, rate)
    assert [(one.before, one.after, one.signs) for one in found] == [(1000, 1010, ("loss",))]


def test_a_restart_that_repeats_its_losses_is_named_without_a_jump() -> None:
    loss, tokens, rate = run(200)
    again, more, rates = run(200, seed=5)
    found = discontinuities(loss[:100] + again[90:], tokens[:100] + more[90:], rate[:100] + rates[90:])
    assert [(one.before, one.after, one.signs) for one in found] == [(1000, 910, ("step", "tokens"))]


def test_a_restart_with_other_losses_jumps() -> None:
    loss, tokens, rate = run(200)
    other = [(step, value - 0.8) for step, value in loss]
    (found,) = discontinuities(loss[:100] + other[90:], tokens[:100] + tokens[90:], rate[:100] + rate[90:])
    assert set(found.signs) == {"step", "tokens", "loss"}


def test_a_gap_is_a_gap_and_nothing_else() -> None:
    loss, tokens, rate = run(200)
    found = discontinuities(*(series[:80] + series[120:] for series in (loss, tokens, rate)))
    assert found == (Discontinuity(800, 1210, ("gap",), ("no record between steps 800 and 1210",)),)


def test_a_log_that_begins_late_says_so() -> None:
    (found,) = discontinuities(*(series[50:] for series in run(200)))
    assert found.signs == ("gap",)
    assert found.details == ("the log begins at step 510",)


def test_another_number_of_tokens_a_step_is_named() -> None:
    loss, tokens, rate = run(200)
    reset = tokens[:100] + [(step, count - 1e6) for step, count in tokens[100:]]
    (found,) = discontinuities(loss, reset, rate)
    assert found.signs == ("tokens",)
    assert "back to" in found.details[0]
    leap = tokens[:100] + [(step, count + 1e6) for step, count in tokens[100:]]
    (found,) = discontinuities(loss, leap, rate)
    assert "tokens a step" in found.details[0]


def test_a_step_of_the_learning_rate_is_named_and_warm_up_is_not() -> None:
    loss, tokens, rate = run(200)
    (found,) = discontinuities(loss, tokens, [(step, value * (0.3 if step > 1000 else 1)) for step, value in rate])
    assert (found.before, found.signs) == (1000, ("learning rate",))


def test_a_spike_of_one_record_is_no_jump() -> None:
    loss, tokens, rate = run(200)
    loss[100] = (loss[100][0], loss[100][1] + 3)
    assert discontinuities(loss, tokens, rate) == ()


def test_values_that_are_not_finite_are_passed_over() -> None:
    loss, tokens, rate = run(200)
    loss[50] = (loss[50][0], math.nan)
    rate[60] = (rate[60][0], math.inf)
    assert discontinuities(loss, tokens, rate) == ()


@pytest.mark.parametrize("records", [0, 1, 2, 5])
def test_short_logs_have_no_power_and_no_error(records: int) -> None:
    assert discontinuities(*run(records)) == ()


def test_constant_series_have_no_discontinuity() -> None:
    steps = range(10, 1000, 10)
    constant = [(step, 3.0) for step in steps]
    assert discontinuities(constant, constant, constant) == ()


@given(st.integers(1, 50), st.integers(1, 10**7), st.integers(4, 40), st.integers(0, 3))
def test_a_count_of_all_tokens_is_one_and_its_parts_are_not(every: int, batch: int, records: int, again: int) -> None:
    """`again`: a restart repeats the last records, which changes nothing."""
    steps = [every * (index + 1) for index in range(records)]
    whole: Series = [(step, float(batch * step)) for step in steps]
    assert not_all_tokens([*whole, *whole[records - again :]]) is None
    assert "begins at" in (not_all_tokens(later(whole, 0, 4.0 * batch * every)) or "")
    assert "single steps" in (not_all_tokens([(step, float(batch)) for step in steps]) or "")
    assert "another unit" in (not_all_tokens([(step, 0.5 * step) for step in steps]) or "")
