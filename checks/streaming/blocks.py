"""Blocks at random of every tensor of a pair: how large they are, and how many a number of bytes pays for.

Each pair of tensors is a stratum: its first and last block are read, and of those between an equal share of all pairs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from math import floor

from checks.checkpoint.index import TensorInfo
from checks.statistics.sampling import BlockDesign
from checks.streaming.read_plan import item_size

# Bytes of a block: a request that a disk or a hub answers well, and yet a small part of a tensor.
BLOCK = 64 << 10
# Blocks of a tensor: so many at least, so that seven hundredths of them give an interval, and a layer of small tensors
# covers a heavy-tailed change (with half as many .92 of intervals did, now .96; benchmarks/interval_coverage.py); so
# many at most, whatever size a header states.
LEAST_BLOCKS, MOST_BLOCKS = 200, 1 << 16
# Random blocks of each tensor, at least: fewer have no variance.
LEAST_RANDOM = 2

TensorPair = tuple[TensorInfo, TensorInfo]


def bytes_of_blocks(pairs: Sequence[TensorPair]) -> int:
    """The least bytes that blocks of these pairs take, of both sides: first, last, and two at random."""
    return sum(_design(pair, LEAST_RANDOM, 0).elements_read * _item_bytes(pair) for pair in pairs)


def draw_blocks(pairs: Sequence[TensorPair], seed: int, room: int) -> Iterator[tuple[TensorPair, BlockDesign]]:
    """Blocks of each pair that take at most `room` bytes of both sides, or the least if that is not enough.

    The same share of every tensor, as far as whole blocks go; what is left pays for one more block where most of one is
    lacking. The number of blocks does not depend on the seed.
    """
    least = [_design(pair, LEAST_RANDOM, 0) for pair in pairs]
    sizes = [design.block * _item_bytes(pair) for pair, design in zip(pairs, least, strict=True)]
    more = [design.between - design.drawn for design in least]
    left = max(0, room - bytes_of_blocks(pairs))
    wanted = sum(size * count for size, count in zip(sizes, more, strict=True))
    share = min(1.0, left / wanted) if wanted else 0.0
    extra = [min(count, floor(share * count)) for count in more]
    left -= sum(size * count for size, count in zip(sizes, extra, strict=True))
    lacking = sorted(range(len(pairs)), key=lambda number: (extra[number] - share * more[number], number))
    for number in lacking:
        if extra[number] < more[number] and sizes[number] <= left:
            extra[number] += 1
            left -= sizes[number]
    for pair, design, count in zip(pairs, least, extra, strict=True):
        yield pair, _design(pair, design.drawn + count, seed_of(seed, pair[0].name))


def seed_of(seed: int, name: str) -> int:
    """The seed of one tensor: of its own, and the same on every machine."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "big")


def _design(pair: TensorPair, drawn: int, seed: int) -> BlockDesign:
    elements = pair[0].elements
    widest = max(item_size(tensor) or 1 for tensor in pair)
    block = max(1, min(elements // LEAST_BLOCKS, max(BLOCK // widest, -(-elements // MOST_BLOCKS))))
    between = max(0, -(-elements // block) - 2)
    return BlockDesign(elements, block, min(drawn, between), seed)


def _item_bytes(pair: TensorPair) -> int:
    """Bytes of one position, of both sides."""
    return sum(item_size(tensor) or 0 for tensor in pair)
