"""What two vocabularies share: tokens, their numbers, the order of their merges, and where they cut a text.

Tokens are bytes. Everything here is exact counting; nothing is sampled except the fingerprint of a public base.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

# From this share of the common tokens on, a numbering or an order counts as kept: converters drop or add a few tokens.
KEPT_FROM = 0.99


@dataclass(frozen=True)
class Overlap:
    """Sizes of two vocabularies and of what they share; the shares are None where they would divide by nothing."""

    candidate: int
    reference: int
    common: int

    @property
    def of_candidate(self) -> float | None:
        """|A ∩ B| / |A|: the share of the candidate's tokens that the reference has."""
        return self.common / self.candidate if self.candidate else None

    @property
    def of_reference(self) -> float | None:
        """|A ∩ B| / |B|: the share of the reference's tokens that the candidate kept."""
        return self.common / self.reference if self.reference else None

    @property
    def jaccard(self) -> float | None:
        """|A ∩ B| over the size of the union."""
        union = self.candidate + self.reference - self.common
        return self.common / union if union else None


@dataclass(frozen=True)
class Numbering:
    """How the ids of common tokens relate: the share with the same id, and the commonest difference with its share.

    prefix: how many tokens from the first on stand at the same ids in both, passing over ids that one does not use.
    pattern: "same ids", "extended at the end", "shifted ids", "renumbered" (other ids in the same order of merges), or
    "none" where less than 90 % of the reference's tokens are common or nothing keeps their order, so that there is no
    numbering to speak of.
    """

    common: int
    same_id: float | None
    shift: int | None
    shifted: float | None
    prefix: int
    pattern: str


@dataclass(frozen=True)
class RankAgreement:
    """Do common tokens come in the same order of merges?

    spearman: of the ranks, -1 to 1; high between any two tokenizers of similar text, since frequent tokens come first.
    order_kept: the share of common tokens (but the last) whose successor among the common tokens, by rank, is the same
    in both. 1 for one merge list inside another, however ids were assigned; 1/n in expectation for a random order of n.
    """

    common: int
    spearman: float | None
    order_kept: float | None


@dataclass(frozen=True)
class SegmentationAgreement:
    """Where two tokenizers cut the same words. Cuts between words are given and do not count.

    jaccard: cuts that both make over cuts that either makes; None where neither cuts. same_words: the share of words,
    among those that either cuts, that both cut alike.
    """

    words: int
    cut_words: int
    jaccard: float | None
    same_words: float | None


def overlap(candidate: Collection[bytes], reference: Collection[bytes]) -> Overlap:
    """Which share of its tokens does each vocabulary have in common with the other?"""
    ours, theirs = set(candidate), set(reference)
    return Overlap(len(ours), len(theirs), len(ours & theirs))


def numbering(
    candidate: Mapping[bytes, int], reference: Mapping[bytes, int], order_kept: float | None = None
) -> Numbering:
    """Are the ids of the common tokens those of the reference, shifted, or new? Maps from token to id.

    `order_kept`: as `rank_agreement` has it; without it other ids are not called the reference's tokens renumbered, for
    a large vocabulary holds nine tenths of an unrelated small one.
    """
    common = candidate.keys() & reference.keys()
    if not common:
        return Numbering(0, None, None, None, 0, "none")
    differences = Counter(candidate[text] - reference[text] for text in common)
    shift, most = max(differences.items(), key=lambda item: (item[1], -abs(item[0])))
    same = differences[0] / len(common)
    return Numbering(
        len(common),
        same,
        shift,
        most / len(common),
        _prefix(candidate, reference),
        _pattern(candidate, reference, len(common), same, most / len(common), order_kept or 0.0),
    )


def _prefix(candidate: Mapping[bytes, int], reference: Mapping[bytes, int]) -> int:
    ours = {index: text for text, index in candidate.items()}
    theirs = {index: text for text, index in reference.items()}
    length = 0
    for index in sorted(ours.keys() & theirs.keys()):
        if ours[index] != theirs[index]:
            break
        length += 1
    return length


def _pattern(
    candidate: Mapping[bytes, int],
    reference: Mapping[bytes, int],
    common: int,
    same: float,
    shifted: float,
    order_kept: float,
) -> str:
    if common < 0.9 * len(reference):
        return "none"
    if same >= KEPT_FROM:
        added = [index for text, index in candidate.items() if text not in reference]
        last = max(reference.values())
        return "extended at the end" if 2 * sum(index > last for index in added) > len(added) else "same ids"
    if shifted >= KEPT_FROM:
        return "shifted ids"
    return "renumbered" if order_kept >= KEPT_FROM else "none"


def rank_agreement(candidate: Mapping[bytes, int], reference: Mapping[bytes, int]) -> RankAgreement:
    """Do the common tokens come in the same order? Maps from token to rank; ranks are distinct within a vocabulary."""
    common = sorted(candidate.keys() & reference.keys(), key=reference.__getitem__)
    count = len(common)
    if count < 2:
        return RankAgreement(count, None, None)
    ranks = np.array([candidate[text] for text in common], dtype=np.int64)
    places = np.empty(count, dtype=np.int64)
    places[np.argsort(ranks, kind="stable")] = np.arange(count)
    squares = float(np.sum(np.square((places - np.arange(count)).astype(np.float64))))
    spearman = 1 - 6 * squares / (count * (float(count) ** 2 - 1))
    return RankAgreement(count, spearman, float(np.mean(np.diff(places) == 1)))


def segmentation_agreement(
    candidate: Sequence[Sequence[bytes]], reference: Sequence[Sequence[bytes]]
) -> SegmentationAgreement:
    """Do both cut the words of one text at the same bytes? Each word is a sequence of its pieces.

    Raises ValueError when the two do not have the same words.
    """
    if [b"".join(word) for word in candidate] != [b"".join(word) for word in reference]:
        raise ValueError("both segmentations must be of the same words")
    both = either = cut_words = same_words = 0
    for ours, theirs in zip(candidate, reference, strict=True):
        a, b = _cuts(ours), _cuts(theirs)
        both += len(a & b)
        either += len(a | b)
        if a or b:
            cut_words += 1
            same_words += a == b
    return SegmentationAgreement(
        len(candidate),
        cut_words,
        both / either if either else None,
        same_words / cut_words if cut_words else None,
    )


def _cuts(pieces: Sequence[bytes]) -> set[int]:
    """Positions, in bytes from the start of the word, at which a piece ends and another begins."""
    cuts, position = set(), 0
    for piece in pieces[:-1]:
        position += len(piece)
        cuts.add(position)
    return cuts


def fingerprint(texts: Collection[bytes], count: int) -> tuple[str, ...]:
    """The `count` smallest 64-bit hashes of the tokens, in hex: a fixed random sample (Broder 1997, bottom-k)."""
    return tuple(sorted(_hash(text) for text in set(texts))[:count])


def contained(sketch: Collection[str], texts: Collection[bytes]) -> float | None:
    """Which share of a sketched vocabulary does this one have, as the sample tells? None for an empty sketch.

    The standard error with k hashes is at most 1/(2·sqrt(k)).
    """
    wanted = set(sketch)
    if not wanted:
        return None
    return len(wanted & {_hash(text) for text in texts}) / len(wanted)


def _hash(text: bytes) -> str:
    return hashlib.blake2b(text, digest_size=8).hexdigest()
