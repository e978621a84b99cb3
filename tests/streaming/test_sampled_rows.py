"""Which rows of shared tokens a plan reads."""

from __future__ import annotations

import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checks.checkpoint.header import FIRST_READ
from checks.checkpoint.index import TensorInfo
from checks.checkpoint.parts import LARGEST_GAP, _runs
from checks.streaming.read_plan import (
    SAMPLE,
    SCREEN,
    ReadRequest,
    TensorRead,
    byte_ranges,
)
from checks.streaming.sampling import BudgetTooSmall, plan_reads
from checks.streaming.token_rows import TokenTables, row_runs
from tests.streaming.planned_sides import common, plan_of, shapes_of, side_of

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BOTH = (EMBEDDING, HEAD)


def row_numbers(read: TensorRead, width: int) -> list[tuple[int, int]]:
    return [(start // width, stop // width) for start, stop in read.runs]


@pytest.mark.parametrize("mode", [SCREEN, SAMPLE])
def test_rows_of_shared_tokens(mode: str) -> None:
    a = side_of(shapes_of(2, 4096, 300, vocabulary=3001))
    b = side_of(shapes_of(2, 4096, 300, vocabulary=900))
    near = [7, 3, 4, 2999, 4, 11]  # 8 rows and fewer apart are read together
    rows = ([*near, *range(100, 2500, 30)], [1, 899, 5, 6, 0, 30, *range(40, 840, 10)])
    plan = plan_reads(a, b, common(a, b), ReadRequest(mode, 120_000_000), TokenTables(BOTH, BOTH, rows))
    assert plan.tokens == 86
    ours, theirs = (side.reads[EMBEDDING] for side in (plan.candidate, plan.reference))
    assert row_numbers(ours, 4096)[:3] == [(3, 12), (100, 101), (130, 131)]
    assert row_numbers(ours, 4096)[-1] == (2999, 3000)
    assert row_numbers(theirs, 4096)[:4] == [(0, 7), (30, 31), (40, 41), (50, 51)]
    assert plan.candidate.reads[HEAD].runs == ours.runs
    # Tables of other lengths are not compared position by position.
    assert EMBEDDING not in plan.compared
    for side, read in ((plan.candidate, ours), (plan.reference, theirs)):
        assert side.token_row_bytes == 2 * 2 * sum(stop - start for start, stop in read.runs)
    for bad in ([3001] * 64, [-1] * 64):
        with pytest.raises(ValueError, match="3001 rows"):
            plan_reads(a, b, [], ReadRequest(mode), TokenTables(BOTH, BOTH, (bad, [0] * 64)))
    with pytest.raises(ValueError, match="no table"):
        plan_reads(a, b, [], ReadRequest(mode), TokenTables(("model.norm.weight",), BOTH))
    with pytest.raises(ValueError, match="those of the same tokens"):
        plan_reads(a, b, [], ReadRequest(mode), TokenTables(BOTH, BOTH, ([1], [1, 2])))


def test_as_many_tokens_as_fit_and_no_fewer_than_tell_something() -> None:
    a = side_of(shapes_of(4, 4096, 4096, vocabulary=40_000), "BF16", 1 << 32)
    order = np.random.default_rng(0).permutation(40_000)[:20_000].tolist()
    tables = TokenTables(BOTH, BOTH, (order, order))

    def tokens(mode: str, budget: int | None) -> int:
        plan = plan_reads(a, a, common(a, a), ReadRequest(mode, budget), tables)
        without = plan_reads(a, a, common(a, a), ReadRequest(mode, budget), TokenTables(BOTH, BOTH))
        if budget is not None:
            assert plan.bytes <= budget
        # What else is read is the same with and without a tokenizer.
        assert without.compared == plan.compared
        assert without.candidate.layers == plan.candidate.layers
        assert without.tokens == 0
        assert 0 <= plan.bytes - without.bytes <= plan.candidate.token_row_bytes + plan.reference.token_row_bytes
        for side in (plan.candidate, plan.reference):
            asked = sum(stop - start for _, start, stop in byte_ranges(a.index, side.reads))
            assert side.bytes == asked + FIRST_READ
        assert (plan.digest == without.digest) == (plan.tokens == 0)
        return plan.tokens

    assert tokens(SCREEN, None) == 2048
    needed = plan_reads(a, a, [], ReadRequest(SCREEN)).bytes
    counts = [tokens(SCREEN, budget) for budget in (needed, 500_000_000, 310_000_000, 290_000_000)]
    assert counts == sorted(counts, reverse=True)
    assert 64 <= counts[2] < 2048
    with pytest.raises(BudgetTooSmall) as error:
        tokens(SCREEN, 1_000_000)
    found = re.search(r"--budget (\d+)", str(error.value))
    assert found
    assert tokens(SCREEN, int(found[1])) == 0  # nothing is left for rows
    assert 2048 < tokens(SAMPLE, 1_500_000_000) <= 8192


@given(
    rows=st.lists(st.integers(0, 2999), min_size=64, max_size=400, unique=True),
    width=st.sampled_from([64, 1024, 4096, 40_000]),
    part=st.integers(1, 400),
)
@settings(deadline=None, max_examples=60)
def test_whatever_rows_are_asked_for_together_is_planned(rows: list[int], width: int, part: int) -> None:
    """The canonical form reads what lies between near rows, of all tokens or of some."""
    table = TensorInfo("table", "BF16", (3000, width), "s", 0, 2 * 3000 * width)
    planned = row_runs(table, rows)
    assert all(stop < start for (_, stop), (start, _) in pairwise(planned))
    gap = max(1, LARGEST_GAP // width)
    for run in _runs(torch.tensor(sorted(rows[:part])), gap):
        start, stop = int(run[0]) * width, (int(run[-1]) + 1) * width
        assert any(first <= start and stop <= last for first, last in planned)


def test_paired_embeddings_are_drawn_from_by_a_screening() -> None:
    same = side_of(shapes_of(2, 256, 300, vocabulary=9001), "BF16", 1 << 30)
    read = plan_of(same, same, SCREEN).compared[EMBEDDING].read
    assert read.design is not None
    assert 1900 * 256 < read.elements_read < 2300 * 256
    assert read.design.block % 256 == 0
    other = side_of(shapes_of(2, 256, 300, vocabulary=20_000), "F32", 1 << 30)
    assert EMBEDDING not in plan_of(same, other, SCREEN).candidate.reads
