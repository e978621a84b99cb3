"""Short fingerprints of tensors by which copies are found whatever their names: MinHash and SimHash."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from checks.statistics.positions import sample_positions

# Quartiles: four codes of equal frequency, the finest that keeps independent tensors below a Jaccard index of .2.
CODES = 4
BITS = 1024
# Positions that MinHash and SimHash look at, at most.
MINHASH_POSITIONS = 65_536
SIMHASH_POSITIONS = 4096
# Candidates of the smallest Hamming distance whose Jaccard index is computed.
_SHORT_LIST = 4


@dataclass(frozen=True, eq=False)
class TensorSketch:
    """Result of `sketch`.

    `elements`: of the tensor. `minhash`: smallest hash value per bin, int32 [BITS], -1 for an empty bin. `simhash`:
    bits, bool [BITS]. `frequencies`: of the four codes. `seed`. `reason`: why there is no sketch (the others are None).
    """

    elements: int
    seed: int
    minhash: Tensor | None = None
    simhash: Tensor | None = None
    frequencies: tuple[float, ...] = ()
    reason: str | None = None


@dataclass(frozen=True)
class SketchSimilarity:
    """Result of `compare_sketches`; None where either tensor has no sketch, with `reason`.

    `jaccard`: of the sets of (position, code), 0 to 1. `hamming`: share of SimHash bits that differ, 0 to 1.
    `expected_jaccard`, `expected_hamming`: of independent tensors with the same codes, about .143 and .5.
    `jaccard_sd`: of the estimate at the expected value.
    """

    jaccard: float | None
    hamming: float | None
    expected_jaccard: float | None
    expected_hamming: float
    jaccard_sd: float | None
    reason: str | None = None


@dataclass(frozen=True)
class SketchMatch:
    """The most similar tensor of the other model: indices into both lists, and the similarity."""

    index: int
    other: int
    similarity: SketchSimilarity


def sketch(tensor: Tensor, seed: int = 0) -> TensorSketch:
    """Fingerprint of a tensor's content, free of scale and mean.

    The elements at a fixed stratified sample of positions (the same for every tensor of equal size and seed) are cut at
    their own quartiles into the codes 0 to 3: subtracting the mean and dividing by the spread changes no code.

    MinHash: every (position, code) gets a pseudo-random rank; the ranks fall into 1024 bins and the smallest of each
    bin is kept. The share of bins in which two tensors agree, of those that are not empty in both, estimates the
    Jaccard index of the sets without bias (one permutation hashing: Li, Owen, Zhang 2012, arXiv 1208.1259; Broder
    1997).
    SimHash: bit j is the sign of Σᵢ gᵢⱼ·levelᵢ, g standard normal, over at most 4096 positions, with 8-bit levels:
    centred values in steps of 1/32 of their standard deviation, clipped at 4. Quartiles would be too coarse for the
    documented 2 %. The share of differing bits estimates arccos(r)/π for levels of correlation r (Charikar 2002).

    Tensors of fewer than 64 elements, constant ones, and those with non-finite elements at the sampled positions have
    no sketch, with a reason. The caller leaves out tensors that any model could have (masks, rotary tables).
    Raises TypeError for other than floating-point tensors.
    """
    if not tensor.dtype.is_floating_point or tensor.dtype == torch.float4_e2m1fn_x2:
        raise TypeError(f"{tensor.dtype} has no order of values; dequantise first")
    flat = tensor.detach().reshape(-1)
    return sketch_of(flat[sketch_positions(flat.numel(), seed).to(flat.device)].cpu(), flat.numel(), seed)


def sketch_positions(elements: int, seed: int = 0) -> Tensor:
    """The elements of a tensor of that size that a sketch looks at: rising positions in stored order, int64."""
    return sample_positions(elements, MINHASH_POSITIONS, seed)


def sketch_of(values: Tensor, elements: int, seed: int = 0) -> TensorSketch:
    """`sketch` of a tensor of so many elements, from those at its `sketch_positions`: floats on the CPU."""
    values = values.double()
    if len(values) < 64:
        return TensorSketch(elements, seed, reason=f"{elements} elements; need 64")
    if not bool(values.isfinite().all()):
        return TensorSketch(elements, seed, reason="non-finite elements")
    if bool((values == values[0]).all()):
        return TensorSketch(elements, seed, reason="constant")
    places = [len(values) * k // CODES for k in range(1, CODES)]
    quartiles = torch.from_numpy(np.partition(values.numpy(), places)[places])
    # A value equal to a quartile lies above it; values that fill a whole quartile (zeros) leave some codes unused.
    codes = torch.bucketize(values, quartiles, right=True)
    counts = torch.bincount(codes, minlength=CODES)
    if int(counts.max()) == len(values):
        return TensorSketch(elements, seed, reason="all its quartiles are equal")
    ranks = _ranks(len(values), seed)[torch.arange(len(values)), codes]
    bins = ranks * BITS // (CODES * len(values))
    minhash = torch.full((BITS,), CODES * len(values), dtype=torch.int64).scatter_reduce_(0, bins, ranks, "amin")
    minhash[minhash == CODES * len(values)] = -1

    fewer = sample_positions(len(values), SIMHASH_POSITIONS, seed)
    levels = values[fewer] - values[fewer].mean()
    spread = levels.std(correction=0)
    if float(spread) == 0:
        return TensorSketch(elements, seed, reason="constant at the positions of its SimHash")
    levels = (levels / spread * 32).round().clamp(-128, 127).float()
    bits = (levels - levels.mean()) @ _planes(len(fewer), seed) > 0
    return TensorSketch(elements, seed, minhash.int(), bits, tuple((counts / len(values)).tolist()))


def compare_sketches(a: TensorSketch, b: TensorSketch) -> SketchSimilarity:
    """How much do two tensors of equal size share, by their fingerprints?

    Documented: tutorial-qa.md, table of thresholds: Jaccard above .85 or Hamming below 2 % is fine-tuned, Jaccard below
    .2 or Hamming above 20 % from scratch.
    Null hypothesis: independent tensors. Codes then agree with probability p = Σ fₐ(c)·f_b(c), ¼ for distinct values,
    and E[Jaccard] = p/(2-p) = 1/7, E[Hamming] = ½; `jaccard_sd` is large for short tensors, which can pass .2 by
    chance. For normal tensors of correlation .975 the codes agree on 82 %: Jaccard .69, Hamming 7 %. The documented
    bounds correspond to correlations of .995 (Jaccard .85) and .998 (Hamming 2 %), so models that were trained on for
    long lie between the bands, where other checks decide.
    Blind to permuted or rotated units, to transposed, split and fused tensors (unless the caller undoes that), and to
    reuse confined to positions that are not sampled. Raises ValueError for other sizes or seeds.
    """
    if (a.elements, a.seed) != (b.elements, b.seed):
        raise ValueError(
            f"sketches of {a.elements} and {b.elements} elements with seeds {a.seed} and {b.seed} cannot be compared"
        )
    if a.minhash is None or b.minhash is None or a.simhash is None or b.simhash is None:
        return SketchSimilarity(None, None, None, 0.5, None, a.reason or b.reason)
    filled = (a.minhash >= 0) | (b.minhash >= 0)
    bins = int(filled.sum())
    agree = math.fsum(x * y for x, y in zip(a.frequencies, b.frequencies, strict=True))
    expected = agree / (2 - agree)
    return SketchSimilarity(
        jaccard=float((a.minhash == b.minhash)[filled].double().mean()),
        hamming=float((a.simhash != b.simhash).double().mean()),
        expected_jaccard=expected,
        expected_hamming=0.5,
        jaccard_sd=math.sqrt(expected * (1 - expected) / bins),
    )


def best_matches(sketches: Sequence[TensorSketch], others: Sequence[TensorSketch]) -> list[SketchMatch]:
    """For each sketch the most similar of the others of equal size; none where there is no other of that size.

    The few others of the smallest Hamming distance are compared by their Jaccard index, and the largest wins. The best
    of N independent tensors is expected about sqrt(2 ln N) standard deviations above the mean: .2 for N = 10⁵.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for number, other in enumerate(others):
        if other.simhash is not None:
            groups.setdefault((other.elements, other.seed), []).append(number)
    signs = {key: torch.stack([_signs(others[number]) for number in numbers]) for key, numbers in groups.items()}
    matches = []
    for index, one in enumerate(sketches):
        key = (one.elements, one.seed)
        if one.simhash is None or key not in groups:
            continue
        closeness = signs[key] @ _signs(one)
        short = closeness.topk(min(_SHORT_LIST, len(closeness))).indices.tolist()
        compared = [(groups[key][place], compare_sketches(one, others[groups[key][place]])) for place in short]
        best = max(compared, key=lambda match: match[1].jaccard or 0.0)
        matches.append(SketchMatch(index, *best))
    return matches


def _signs(one: TensorSketch) -> Tensor:
    assert one.simhash is not None
    return one.simhash.float() * 2 - 1


@lru_cache(maxsize=4)
def _ranks(positions: int, seed: int) -> Tensor:
    """A random permutation of all (position, code), [positions, CODES]: the hash values."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(CODES * positions, generator=generator).reshape(positions, CODES)


@lru_cache(maxsize=4)
def _planes(positions: int, seed: int) -> Tensor:
    """Normal directions of the SimHash bits, [positions, BITS]."""
    return torch.randn(positions, BITS, generator=torch.Generator().manual_seed(seed))
