"""What two models share beyond their initial weights."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from checks.statistics.origin import beyond_start, without_start
from checks.statistics.units import unit_permutation_test

UNITS, WIDTH = 96, 32


def views(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(UNITS, WIDTH, generator=generator) for _ in range(3)]


def trained(start: list[Tensor], seed: int, share: float = 0.7) -> list[Tensor]:
    """`share` of the start, and something learned."""
    return [share * view + learned for view, learned in zip(start, views(seed), strict=True)]


def test_models_that_only_share_their_start_have_nothing_in_common_beyond_it() -> None:
    start = views(0)
    twins = trained(start, 1), trained(start, 2)
    alike = unit_permutation_test(*twins)
    assert alike.z is not None
    assert alike.z > 20
    test = beyond_start(start, *twins)
    assert test.z is not None
    assert abs(test.z) < 4


def test_a_derived_model_shares_what_its_parent_learned() -> None:
    start = views(0)
    parent = trained(start, 1)
    child = [view + 0.3 * step for view, step in zip(parent, views(3), strict=True)]
    test = beyond_start(start, child, parent)
    assert test.effect is not None
    assert test.effect > 0.8


@given(st.floats(0, 0.9))
@settings(max_examples=20, deadline=None)
def test_the_effect_of_a_merge_is_the_share_of_the_reference(share: float) -> None:
    """Twins that learned equally much: the cosine of (1 - w)·x + w·y and y, for x and y at right angles."""
    start = views(0)
    twin, parent = trained(start, 1), trained(start, 2)
    merged = [(1 - share) * ours + share * theirs for ours, theirs in zip(twin, parent, strict=True)]
    test = beyond_start(start, merged, parent)
    assert test.effect == pytest.approx(share / ((1 - share) ** 2 + share**2) ** 0.5, abs=0.05)


def test_a_forged_start_does_not_hide_what_is_shared_with_the_reference() -> None:
    """Initial weights made from the reference and noise leave the noise beyond them on neither side."""
    parent = views(1)
    forged = [view + step for view, step in zip(parent, views(5), strict=True)]
    child = [view + 0.3 * step for view, step in zip(parent, views(3), strict=True)]
    start = unit_permutation_test(forged, child)
    assert start.z is not None
    assert start.z > 20, "it looks like a start, which is why only a regenerated one counts"
    test = beyond_start(forged, child, parent)
    assert test.effect is not None
    assert test.effect > 0.8


@given(st.integers(0, 1000), st.floats(0.01, 100), st.sampled_from([torch.float32, torch.float64]))
@settings(max_examples=25, deadline=None)
def test_without_start_is_orthogonal_to_it_and_scales_with_the_rows(
    seed: int, scale: float, dtype: torch.dtype
) -> None:
    rows, start = (view.to(dtype) for view in views(seed)[:2])
    rest = without_start(rows, start)
    assert rest.dtype == torch.float64
    torch.testing.assert_close(
        (rest * start.double()).sum(1), torch.zeros(UNITS, dtype=torch.float64), atol=1e-9, rtol=0
    )
    torch.testing.assert_close(without_start(rows, start * scale), rest, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(without_start(rows * 2, start), rest * 2)


def test_a_row_that_started_at_zero_stays_as_it_is() -> None:
    rows, start = views(0)[:2]
    start[3] = 0
    assert torch.equal(without_start(rows, start)[3], rows[3].double())


def test_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="equal shapes"):
        without_start(torch.ones(2, 3), torch.ones(2, 4))
