"""Public vocabularies on which unrelated tokenizers are built, as fingerprints: small fixed samples of hashes.

Two tokenizers that both extend cl100k_base share most of their tokens and their merges, and neither descends from the
other. The fingerprints tell that; the vocabularies themselves are not kept here.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from types import MappingProxyType

import yaml

from checks.statistics.vocabulary import contained
from checks.tokens.vocabulary import Vocabulary

BASES_FILE = Path(__file__).with_name("bases.yaml")

# From this share of the sample on, a base is in a vocabulary: Qwen holds 98.9 % of cl100k_base; unrelated ones, 86 %.
INSIDE_FROM = 0.95


@cache
def public_bases() -> MappingProxyType[str, tuple[str, ...]]:
    """The fingerprint of each known public base, by its name."""
    document = yaml.safe_load(BASES_FILE.read_text(encoding="utf-8"))
    return MappingProxyType({name: tuple(base["hashes"].split()) for name, base in document["bases"].items()})


def bases_inside(vocabulary: Vocabulary) -> dict[str, float]:
    """Which known public bases does this vocabulary contain, and which share of the sample?"""
    texts = vocabulary.ids().keys()
    shares = {name: contained(sample, texts) for name, sample in public_bases().items()}
    return {name: share for name, share in shares.items() if share is not None and share >= INSIDE_FROM}
