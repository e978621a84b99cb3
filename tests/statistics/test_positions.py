from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checks.statistics.positions import sample_positions


@given(total=st.integers(0, 5000), count=st.integers(0, 300), seed=st.integers(0, 99))
def test_distinct_rising_and_in_range(total: int, count: int, seed: int) -> None:
    found = sample_positions(total, count, seed)
    assert len(found) == min(total, count)
    assert bool((found.diff() > 0).all())
    if len(found):
        assert int(found[0]) >= 0
        assert int(found[-1]) < total
    assert torch.equal(found, sample_positions(total, count, seed))


def test_every_position_can_be_drawn_and_evenly() -> None:
    counts = torch.zeros(30)
    for seed in range(3000):
        counts[sample_positions(30, 9, seed)] += 1
    # Binomial around 900, sd 25; stretches of 3 and 4 positions give 1000 and 750.
    assert float(counts.min()) > 650
    assert float(counts.max()) < 1100
    assert len(set(sample_positions(10**12, 4, 1).tolist()) & set(sample_positions(10**12, 4, 2).tolist())) == 0


def test_errors() -> None:
    for total, count in ((-1, 3), (3, -1)):
        with pytest.raises(ValueError, match="need total"):
            sample_positions(total, count, 0)
