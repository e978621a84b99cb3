"""Accelerators and the peaks of their matrix units, by precision: data with sources."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

ACCELERATORS_FILE = Path(__file__).with_name("accelerators.yaml")
PRECISIONS = ("fp4", "fp8", "fp16", "bf16", "tf32", "fp32")
ALIASES = {
    **{"float8": "fp8", "e4m3": "fp8", "mxfp8": "fp8"},
    **{"bfloat16": "bf16", "float16": "fp16", "half": "fp16"},
    **{"float32": "fp32", "single": "fp32"},
}
# How many there are is no part of the name: "2,048 Gaudi 3" and "2 x Gaudi 3" are not Gaudi 2.
COUNT = re.compile(r"(?<![\w.])\d{1,3}(?:[,_']\d{3})+(?!\w)|^\s*\d+\s*(?:[x\u00d7]\s*|\s)")


@dataclass(frozen=True)
class Accelerator:
    """peaks: precision → dense operations per second. source: where the figures stand; unverified: it was not seen."""

    name: str
    words: frozenset[str]
    peaks: Mapping[str, float]
    source: str
    unverified: bool = False


@dataclass(frozen=True)
class PublishedUtilisation:
    """A model FLOP utilisation that someone published, as a share of the peak."""

    value: float
    what: str
    source: str


@cache
def accelerators() -> tuple[Accelerator, ...]:
    """All known accelerators."""
    document = _document()
    return tuple(
        Accelerator(
            name,
            frozenset(entry["words"]),
            MappingProxyType({precision: float(peak) for precision, peak in entry["peaks"].items()}),
            document["sources"][entry["source"]],
            entry.get("unverified", False),
        )
        for name, entry in document["accelerators"].items()
    )


def accelerator_called(name: str) -> Accelerator | None:
    """The accelerator that a claim means by `name` ("NVIDIA H100 80GB PCIe"); None when it is not known."""
    name = COUNT.sub(" ", name.lower())
    written = set(re.findall(r"[a-z0-9]+", name)) | {word.removesuffix("s") for word in name.split()}
    fitting = [one for one in accelerators() if one.words <= written]
    return max(fitting, key=lambda one: len(one.words), default=None)


def precisions_in(text: str) -> tuple[str, ...]:
    """The precisions that a statement names ("FP8 and bf16" → fp8, bf16), in the order of `PRECISIONS`."""
    words = {ALIASES.get(word, word) for word in re.findall(r"[a-z0-9]+", text.lower())}
    return tuple(one for one in PRECISIONS if one in words)


@cache
def published_utilisations() -> tuple[PublishedUtilisation, ...]:
    """Published utilisations, highest first."""
    found = [PublishedUtilisation(**entry) for entry in _document()["utilisations"]]
    return tuple(sorted(found, key=lambda one: -one.value))


@cache
def _document() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(ACCELERATORS_FILE.read_text(encoding="utf-8"))
    return loaded
