"""Rows of token tables to read: how many fit into a reading, and as which ranges."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from checks.checkpoint.index import TensorInfo, shown
from checks.checkpoint.parts import LARGEST_GAP
from checks.streaming.read_plan import SAMPLE, SCREEN

# Tokens whose rows are read at most; fewer than LEAST_TOKENS tell nothing, and none of them is read.
MOST_TOKENS = {SCREEN: 2048, SAMPLE: 8192}
LEAST_TOKENS = 64
# What is kept free for rows: for each row the bytes of four, since those between near ones are read with them; and no
# more than this share of what is left when the least of everything else is paid for.
ROWS_FOR_EACH = 4
ROWS_SHARE = 1 / 4

Runs = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class TokenTables:
    """Tables with a row for each token, by stored names: the embedding, and the head where it is stored by itself.

    `rows`: of the same tokens in both vocabularies, the most wanted first; empty where they are not known.
    """

    candidate: tuple[str, ...] = ()
    reference: tuple[str, ...] = ()
    rows: tuple[Sequence[int], Sequence[int]] = ((), ())


def room_for_rows(tables: Iterable[TensorInfo], mode: str, left: int) -> int:
    """Bytes to keep free for rows of these tables, of `left` bytes.

    A function of sizes alone: what else is read does not depend on a tokenizer.
    """
    wanted = sum(min(_size(table), MOST_TOKENS[mode] * ROWS_FOR_EACH * _row_bytes(table)) for table in tables)
    return min(wanted, int(left * ROWS_SHARE))


def tokens_that_fit(
    tables: tuple[Sequence[TensorInfo], Sequence[TensorInfo]],
    rows: tuple[Sequence[int], Sequence[int]],
    mode: str,
    room: int,
) -> int:
    """Of how many tokens, the first ones, all rows can be read with `room` bytes; 0 for too few to tell anything.

    `tables`: of both sides; those that are read whole anyway cost nothing and are left out. Raises ValueError for lists
    of different lengths, and rows that a table does not have.
    """
    if len(rows[0]) != len(rows[1]):
        raise ValueError(f"{len(rows[0])} and {len(rows[1])} rows; need those of the same tokens")

    def cost(count: int) -> int:
        return sum(
            (stop - start) * (_size(table) // table.elements)
            for side, ids in zip(tables, rows, strict=True)
            for table in side
            for start, stop in row_runs(table, ids[:count])
        )

    low, high = 0, min(len(rows[0]), MOST_TOKENS[mode])
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(middle) <= room else (low, middle - 1)
    return low if low >= LEAST_TOKENS else 0


def row_runs(table: TensorInfo, rows: Iterable[int]) -> Runs:
    """Rows as ranges of elements, near ones as one: those that the canonical form reads together, see `Parts.rows_of`.

    Raises ValueError for rows that the table does not have.
    """
    width = table.shape[1]
    gap = max(1, LARGEST_GAP // max(1, width))
    runs: list[tuple[int, int]] = []
    for row in sorted(set(rows)):
        if not 0 <= row < table.shape[0]:
            raise ValueError(f"{shown(table.name)} has {table.shape[0]} rows, and row {row} is asked for")
        if runs and row - (runs[-1][1] - 1) <= gap:
            runs[-1] = (runs[-1][0], row + 1)
        else:
            runs.append((row, row + 1))
    return tuple((start * width, stop * width) for start, stop in runs)


def _row_bytes(table: TensorInfo) -> int:
    return _size(table) // table.shape[0]


def _size(table: TensorInfo) -> int:
    return table.stop - table.start
