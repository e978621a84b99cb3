"""The table of accelerators: found by the names that people write, with figures that hang together."""

from __future__ import annotations

import pytest

from checks.catalog.accelerators import (
    PRECISIONS,
    accelerator_called,
    accelerators,
    precisions_in,
    published_utilisations,
)


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("B200", "B200"),
        ("NVIDIA B200", "B200"),
        ("GB200 NVL72", "GB200"),
        ("H100 80GB PCIe", "H100 PCIe"),
        ("NVIDIA H100 SXM5 80GB", "H100 SXM"),
        ("H100", "H100 SXM"),
        ("H800", "H800"),
        ("h200s", "H200"),
        ("A100-SXM4-80GB", "A100"),
        ("TPU v5p", "TPU v5p"),
        ("AMD MI300X", "MI300X"),
        ("Gaudi 2", "Gaudi 2"),
        ("2,048 Gaudi 3", "Gaudi 3"),
        ("2'048 Gaudi 3", "Gaudi 3"),
        ("2 Gaudi 3", "Gaudi 3"),
        ("3x Gaudi 2", "Gaudi 2"),
        ("3 \N{MULTIPLICATION SIGN} Gaudi 2", "Gaudi 2"),
        ("2,048 x Gaudi 3", "Gaudi 3"),
        ("1,016 H100 80GB PCIe", "H100 PCIe"),
        ("my own chip", None),
        ("", None),
    ],
)
def test_names(written: str, name: str | None) -> None:
    found = accelerator_called(written)
    assert (found and found.name) == name


@pytest.mark.parametrize(
    ("stated", "found"),
    [
        ("FP8 and bf16", ("fp8", "bf16")),
        ("BFloat16", ("bf16",)),
        ("fp8-e4m3", ("fp8",)),
        ("mixed", ()),
        ("float16", ("fp16",)),
        ("FP32", ("fp32",)),
        ("float32 and TF32", ("tf32", "fp32")),
    ],
)
def test_precisions(stated: str, found: tuple[str, ...]) -> None:
    assert precisions_in(stated) == found


def test_peaks_double_with_half_the_bits() -> None:
    """Where a matrix unit has both, eight bits are twice as fast as sixteen: a sparse figure would stand out."""
    for one in accelerators():
        assert one.source
        assert set(one.peaks) <= set(PRECISIONS)
        assert all(1e13 < peak < 2e16 for peak in one.peaks.values())
        if "fp8" in one.peaks and one.name != "Gaudi 3":
            assert one.peaks["fp8"] == pytest.approx(2 * one.peaks["bf16"], rel=0.01), one.name
        if "fp16" in one.peaks and "bf16" in one.peaks:
            assert one.peaks["fp16"] == one.peaks["bf16"]


def test_figures_of_documents_that_were_not_seen_say_so() -> None:
    """As in the catalogue of models: unverified unless the vendor's own document was seen."""
    verified = {one.name for one in accelerators() if not one.unverified}
    assert verified == {
        *("V100", "A100", "H100 SXM", "H100 PCIe", "B200"),
        *("MI250X", "MI300X", "MI325X"),
        *("TPU v4", "TPU v5e", "TPU v5p", "TPU v6e"),
        "Gaudi 3",
    }
    for one in accelerators():
        hearsay = "not seen" in one.source or "secondary" in one.source or one.name == "H800"
        assert one.unverified is hearsay, one.name


def test_published_utilisations_stay_below_the_bound() -> None:
    from checks.evidence.thresholds import threshold

    values = [one.value for one in published_utilisations()]
    assert values == sorted(values, reverse=True)
    bound = threshold("compute.flops").supports_below
    assert bound is not None
    assert values[0] < bound
