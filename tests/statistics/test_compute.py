"""Training compute: formulas against published figures, and their scaling."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checks.statistics.compute import (
    accelerator_hours,
    attention_flops,
    hardware_flops,
    mean_context,
    parameter_flops,
    share_of_compute_optimal,
    tokens_per_parameter,
    utilisation,
)

POSITIVE = st.floats(1e-3, 1e30)
H800_BF16 = 989.4e12


def test_deepseek_v3_as_published() -> None:
    """37B active, 14.8T tokens, 2.664M H800 hours: 3.29e24 operations, 35 % of the bf16 peak."""
    needed = parameter_flops(37e9, 14.8e12)
    assert needed == pytest.approx(3.29e24, rel=0.01)
    assert utilisation(needed, 2.664e6, H800_BF16) == pytest.approx(0.346, abs=0.001)


def test_gpt3_as_published() -> None:
    """3.14e23 operations (Brown et al. 2020, Table D.1: 174.6B parameters, 300B tokens)."""
    assert parameter_flops(174.6e9, 300e9) == pytest.approx(3.14e23, rel=0.01)


@given(POSITIVE, POSITIVE, st.floats(1e-3, 1e3))
def test_more_of_anything_is_more_in_proportion(hours: float, peak: float, factor: float) -> None:
    needed = hardware_flops(hours, peak)
    assert utilisation(needed, hours, peak) == pytest.approx(1)
    assert utilisation(factor * needed, hours, peak) == pytest.approx(factor)
    assert utilisation(needed, factor * hours, peak) == pytest.approx(1 / factor)


@given(st.integers(1, 2000), st.integers(1, 2000))
def test_mean_context_is_the_mean_over_positions(length: int, window: int) -> None:
    """The formula is the integral; summed over positions the difference is at most half a token."""
    summed = sum(min(position, window) for position in range(length)) / length
    assert mean_context(length, window) == pytest.approx(summed, abs=0.5 + 1e-9)
    assert mean_context(length) == length / 2
    assert mean_context(length, window) <= mean_context(length)


def test_attention_is_half_of_what_full_context_would_take() -> None:
    """12·L·H·Q·T a token for full context (PaLM, appendix B), half of it for causal."""
    layers, heads, head, length, tokens = 118, 48, 256, 2048, 1e9
    causal = attention_flops(tokens, [mean_context(length)] * layers, heads, head, head)
    assert causal == pytest.approx(12 * layers * heads * head * length * tokens / 2)


def test_attention_grows_with_the_sequence_and_overtakes_the_weights() -> None:
    """DeepSeek-V3's shapes: a tenth of the weights' operations at 4k, more than they at 64k."""
    shares = [
        attention_flops(1e12, [mean_context(length)] * 61, 128, 192, 128) / parameter_flops(37e9, 1e12)
        for length in (4096, 65536)
    ]
    assert shares == [pytest.approx(0.138, abs=0.001), pytest.approx(2.21, abs=0.01)]


def test_hours_and_tokens_per_parameter() -> None:
    assert accelerator_hours(1024, 75) == 1_843_200
    assert tokens_per_parameter(19.7e12, 12e9) == pytest.approx(1641.7, abs=0.1)
    assert share_of_compute_optimal(20e9, 1e9) == 1
    assert share_of_compute_optimal(2e9, 1e9) == 10


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf])
def test_what_is_no_amount_is_an_error(value: float) -> None:
    for call in (
        lambda: parameter_flops(value, 1),
        lambda: parameter_flops(1, value),
        lambda: hardware_flops(1, value),
        lambda: utilisation(value, 1, 1),
        lambda: mean_context(value),
        lambda: mean_context(10, min(value, 5)) if value <= 0 else mean_context(value),
        lambda: tokens_per_parameter(1, value),
        lambda: attention_flops(1, [value], 1, 1, 1),
    ):
        with pytest.raises(ValueError, match="must be positive and finite"):
            call()
