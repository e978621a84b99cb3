from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from checks.statistics.student import t_quantile


@given(probability=st.floats(0.51, 0.9999), freedom=st.floats(1, 2000))
@settings(deadline=None, max_examples=100)
def test_quantiles_of_t(probability: float, freedom: float) -> None:
    assert t_quantile(probability, freedom) == pytest.approx(stats.t.ppf(probability, freedom), rel=1e-7)


def test_quantiles_of_t_at_the_edges() -> None:
    assert t_quantile(0.975, 1e9) == pytest.approx(1.959964, abs=1e-6)
    for probability, freedom in ((0.5, 3.0), (1.0, 3.0), (0.975, 0.5)):
        with pytest.raises(ValueError, match="quantile"):
            t_quantile(probability, freedom)
