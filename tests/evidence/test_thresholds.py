"""Thresholds as data: documented, ordered, overridable."""

from __future__ import annotations

import pytest

from checks.evidence.thresholds import ThresholdError, families, threshold, thresholds


@pytest.mark.parametrize("check", list(thresholds()))
def test_every_threshold_says_where_it_is_documented_and_why(check: str) -> None:
    one = threshold(check)
    assert one.documented
    assert len(one.reason) > 40
    assert one.unit
    assert one.family in families()


@pytest.mark.parametrize("check", list(thresholds()))
def test_what_supports_lies_below_what_contradicts(check: str) -> None:
    one = threshold(check)
    if one.supports_below is not None and one.contradicts_from is not None:
        assert one.supports_below <= one.contradicts_from
    assert one.calibrated or one.supports_below is not None


def test_the_cosine_bands_are_the_strictest_scratch_and_the_loosest_derivation_bound() -> None:
    assert (threshold("similarity.mean").supports_below, threshold("similarity.mean").contradicts_from) == (0.1, 0.8)
    assert threshold("similarity.embedding").contradicts_from == 0.98
    assert threshold("architecture.identical").contradicts_from == 5


@pytest.mark.parametrize(
    ("value", "means"),
    [
        (5, "same architecture; fine-tuning suspected"),
        (4, "similar architecture; possibly a model to follow"),
        (3, "similar architecture; possibly a model to follow"),
        (1, "probably an independent design"),
        (0, "an entirely different architecture"),
    ],
)
def test_the_five_key_rule_has_the_documented_bands(value: int, means: str) -> None:
    assert threshold("architecture.identical").band(value) == means


def test_a_check_without_an_entry_is_an_error() -> None:
    with pytest.raises(ThresholdError, match=r"no entry for 'similarity\.absent'"):
        threshold("similarity.absent")


def test_an_override_of_a_field_that_the_check_lacks_is_an_error() -> None:
    with pytest.raises(ThresholdError, match="has no 'alpha'; it has contradicts_from, coverage_from, supports_below"):
        threshold("similarity.mean").overridden({"alpha": 0.1})


def test_loosening_is_recognised_in_both_directions() -> None:
    mean, units = threshold("similarity.mean"), threshold("independence.units")
    assert mean.loosened_by({"supports_below": 0.2, "contradicts_from": 0.7}) == ("supports_below",)
    assert mean.loosened_by({"supports_below": 0.1}) == ()
    assert units.loosened_by({"alpha": 1e-9}) == ("alpha",)
    assert units.loosened_by({"alpha": 1e-3, "minimum_effect": 0.5}) == ("minimum_effect",)
