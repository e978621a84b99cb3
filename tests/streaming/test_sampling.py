from __future__ import annotations

import re
import tracemalloc
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.header import FIRST_READ
from checks.checkpoint.index import CheckpointIndex, Shard, TensorInfo
from checks.checkpoint.local import LocalSource, read_local_index
from checks.checkpoint.parts import LARGEST_GAP, _runs
from checks.checkpoint.roles import Layout, Role, TensorRole, role_of
from checks.statistics.sampling import BlockDesign, combine
from checks.streaming.read_plan import (
    FULL,
    MODES,
    SAMPLE,
    SCREEN,
    Compared,
    ReadPlan,
    ReadRequest,
    SideRead,
    TensorRead,
    byte_ranges,
    estimates,
    item_size,
    slice_pairs,
    sliced,
)
from checks.streaming.sampling import BudgetTooSmall, Side, plan_reads
from checks.streaming.stream import stream_pair
from checks.streaming.token_rows import TokenTables, row_runs
from checks.streaming.whole_layers import spread

SIZES = {"BF16": 2, "F32": 4}
HEADER = 5000
Shapes = Mapping[str, tuple[int, ...]]


def shapes_of(layers: int, width: int, hidden: int, experts: int = 0, vocabulary: int = 900) -> Shapes:
    """A Llama- or Mixtral-shaped model."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, width)}
    for layer in range(layers):
        place = f"model.layers.{layer}"
        shapes |= {f"{place}.input_layernorm.weight": (width,), f"{place}.self_attn.q_proj.weight": (width, width)}
        shapes |= {f"{place}.self_attn.k_proj.weight": (width // 4, width)}
        owners = [f"{place}.mlp.experts.{expert}" for expert in range(experts)] or [f"{place}.mlp"]
        if experts:
            shapes[f"{place}.mlp.gate.weight"] = (experts, width)
        for owner in owners:
            shapes |= {f"{owner}.up_proj.weight": (hidden, width), f"{owner}.down_proj.weight": (width, hidden)}
    return {**shapes, "model.norm.weight": (width,), "lm_head.weight": (vocabulary, width)}


def side_of(
    shapes: Shapes, dtype: str = "BF16", shard_bytes: int = 1 << 22, roles: Mapping[str, Role] | None = None
) -> Side:
    """A checkpoint of these tensors, of which there is only the index."""
    tensors: dict[str, TensorInfo] = {}
    shards: dict[str, Shard] = {}
    name, end = "", shard_bytes
    for tensor, shape in shapes.items():
        if end >= shard_bytes:
            name, end = f"{len(shards)}.safetensors", HEADER
        start, end = end, end + prod(shape) * SIZES[dtype]
        tensors[tensor] = TensorInfo(tensor, dtype, shape, name, start, end)
        shards[name] = Shard(name, end)
    return Side(
        CheckpointIndex("nowhere", shards, tensors),
        {tensor: (roles or {}).get(tensor, role_of(tensor)) for tensor in tensors},
    )


def common(a: Side, b: Side) -> list[tuple[str, str]]:
    """Pairs of equal name and size."""
    theirs = b.index.tensors
    return [
        (name, name)
        for name, tensor in a.index.tensors.items()
        if name in theirs and theirs[name].elements == tensor.elements
    ]


def plan_of(a: Side, b: Side, mode: str, budget: int | None = None, seed: int = 0) -> ReadPlan:
    return plan_reads(a, b, common(a, b), ReadRequest(mode, budget, seed))


models = st.builds(
    shapes_of,
    layers=st.integers(0, 10),
    width=st.sampled_from([16, 64, 256, 400]),
    hidden=st.sampled_from([64, 300, 700]),
    experts=st.sampled_from([0, 0, 3, 8]),
    vocabulary=st.sampled_from([900, 3001]),
)
sides = st.builds(side_of, models, st.sampled_from(["BF16", "F32"]), st.sampled_from([1 << 18, 1 << 22]))


# Every plan


@given(a=sides, b=sides, mode=st.sampled_from(MODES), seed=st.integers(0, 99), budget=st.integers(1, 60_000_000))
@settings(deadline=None, max_examples=80)
def test_plans_keep_their_budget_or_say_what_they_need(a: Side, b: Side, mode: str, seed: int, budget: int) -> None:
    try:
        plan = plan_of(a, b, mode, budget, seed)
    except BudgetTooSmall as error:
        found = re.search(r"--budget (\d+)", str(error))
        assert found
        needed = int(found[1])
        assert needed > budget
        plan = plan_of(a, b, mode, needed, seed)
        budget = needed
    assert plan.bytes <= budget
    for side, reads in ((a, plan.candidate), (b, plan.reference)):
        headers = HEADER * len(side.index.shards)
        asked = sum(stop - start for _, start, stop in byte_ranges(side.index, reads.reads))
        assert asked + headers <= reads.bytes <= reads.all_bytes + asked


@given(a=sides, b=sides, mode=st.sampled_from(MODES), seed=st.integers(0, 99))
@settings(deadline=None, max_examples=60)
def test_both_sides_are_read_at_the_same_positions(a: Side, b: Side, mode: str, seed: int) -> None:
    plan = plan_of(a, b, mode, seed=seed)
    assert plan == plan_of(a, b, mode, seed=seed)
    ours, theirs = sliced(a.index, plan.candidate.reads), sliced(b.index, plan.reference.reads)
    pairs = slice_pairs(plan)
    assert len({name for name, _ in pairs}) == len(pairs)
    for name, other in pairs:
        one, two = ours.tensors[name], theirs.tensors[other]
        whole = [side.index.tensors[piece.split("[")[0]] for side, piece in ((a, name), (b, other))]
        places = [
            ((piece.start - tensor.start) // (item_size(tensor) or 1), piece.elements)
            for piece, tensor in zip((one, two), whole, strict=True)
        ]
        assert places[0] == places[1]
        assert one.stop <= whole[0].stop
        assert (one.stop - one.start) == one.elements * SIZES[one.dtype]
    for name, (other, read) in plan.compared.items():
        if read.whole:
            assert plan.candidate.is_whole(name)
            assert plan.reference.is_whole(other)
            continue
        ranges = read.ranges()
        assert ranges[0][0] == 0
        assert ranges[-1][1] == a.index.tensors[name].elements


@given(a=sides, b=sides, seed=st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_a_sample_reads_every_pair_and_layers_over_the_depth(a: Side, b: Side, seed: int) -> None:
    plan = plan_of(a, b, SAMPLE, seed=seed)
    assert plan.may_support
    assert plan.compared.keys() == {name for name, _ in common(a, b)}
    for name, (_, read) in plan.compared.items():
        size = a.index.tensors[name].stop - a.index.tensors[name].start
        if not read.whole:
            assert read.design is not None
            assert size > 128 << 10 or plan.reference.bytes < plan.reference.all_bytes
            assert read.design.blocks >= 200
            assert read.design.drawn >= 2
    for reads in (plan.candidate, plan.reference):
        assert reads.layers or not (plan.candidate.all_layers and reads.all_layers)
        # Of models of other depth, small layers without a counterpart are read whole beside those that are picked.
        if len(reads.layers) > 1 and plan.candidate.all_layers == plan.reference.all_layers:
            assert {reads.all_layers[0], reads.all_layers[-1]} <= set(reads.layers)
            assert reads.longest_unread_run <= 2 * -(-len(reads.all_layers) // (len(reads.layers) - 1))
        for layer in reads.layers:
            inside = [name for name in reads.reads if f"layers.{layer}." in name and ".experts." not in name]
            assert all(reads.is_whole(name) for name in inside)
        for layer, experts in reads.experts.items():
            for expert in experts:
                assert reads.is_whole(f"model.layers.{layer}.mlp.experts.{expert}.down_proj.weight")


def test_a_sample_takes_a_fifth() -> None:
    a = side_of(shapes_of(40, 512, 1024, vocabulary=3000), "F32")
    plan = plan_of(a, a, SAMPLE)
    total = 2 * plan.candidate.all_bytes
    assert 0.19 * total < plan.bytes <= 0.2 * total
    assert len(plan.candidate.layers) == 5
    assert {0, 39} < {*plan.candidate.layers}
    half = plan_of(a, a, SAMPLE, total // 8)
    assert 0.12 * total < half.bytes <= total // 8
    assert half.unseen[0] > plan.unseen[0] > 0
    with pytest.raises(BudgetTooSmall, match=r"a tenth of both models.*--read screen"):
        plan_of(a, a, SAMPLE, total // 11)
    other = plan_of(a, a, SAMPLE, seed=1)
    assert other.candidate.layers != plan.candidate.layers
    assert other.compared != plan.compared
    assert other.bytes == plan.bytes


def test_a_screening_reads_norms_rows_and_whole_layers() -> None:
    a = side_of(shapes_of(20, 512, 1024, vocabulary=30_000), "BF16", 1 << 24)
    plan = plan_of(a, a, SCREEN, 2 * (2048 * 1024 + 5 * 2 * (512 * 512 * 5 // 4 + 2 * 512 * 1024) + 1_500_000))
    assert not plan.may_support
    assert len(plan.candidate.layers) == 5
    norms = [name for name in a.index.tensors if "norm" in name]
    assert all(plan.candidate.is_whole(name) for name in norms)
    embedding = plan.candidate.reads["model.embed_tokens.weight"]
    rows = sum(stop - start for start, stop in embedding.ranges()) // 512
    assert 1900 <= rows <= 2200
    assert all(start % 512 == stop % 512 == 0 for start, stop in embedding.ranges())
    assert "lm_head.weight" not in plan.candidate.reads
    assert 5 <= plan.as_evidence()["candidate"]["longest_run_of_unread_layers"] + 1 <= 12
    everything = plan_of(a, a, SCREEN)  # all layers fit into the default budget
    assert len(everything.candidate.layers) == 20
    assert not everything.may_support
    with pytest.raises(BudgetTooSmall, match="one layer of each model, which takes"):
        plan_of(a, a, SCREEN, 1_000_000)


def test_everything() -> None:
    a = side_of(shapes_of(3, 64, 128, experts=4))
    plan = plan_of(a, a, FULL)
    assert plan.candidate.layers == plan.candidate.all_layers == (0, 1, 2)
    assert plan.candidate.experts == dict.fromkeys(range(3), (0, 1, 2, 3))
    assert plan.candidate.bytes == plan.candidate.all_bytes
    assert sliced(a.index, plan.candidate.reads) == a.index
    needed = plan.bytes
    with pytest.raises(BudgetTooSmall, match="--read sample"):
        plan_of(a, a, FULL, needed - 1)
    assert plan_of(a, a, FULL, needed).unseen == (0, 0)


# Layers and experts


def test_experts_are_spread_and_turned_by_the_seed() -> None:
    a = side_of(shapes_of(12, 256, 512, experts=16), "F32", 1 << 24)
    plan = plan_of(a, a, SCREEN, 34_500_000)
    assert len(plan.candidate.layers) == 6
    assert {0, 11} < {*plan.candidate.layers}
    assert plan.reference.experts == plan.candidate.experts
    assert {len(experts) for experts in plan.candidate.experts.values()} == {2}
    assert plan.candidate.experts[0] == (0, 8)
    assert plan_of(a, a, SCREEN, 34_500_000, seed=3).candidate.experts[0] == (3, 11)
    wide = plan_of(a, a, SCREEN, 215_000_000)  # all experts of six layers, and then more layers
    assert {len(experts) for experts in wide.candidate.experts.values()} == {16}
    assert len(wide.candidate.layers) == 6
    assert len(plan_of(a, a, SCREEN, 300_000_000).candidate.layers) > 6


def test_reference_of_another_depth_is_read_at_the_same_relative_depth() -> None:
    a, b = side_of(shapes_of(41, 256, 512), "F32"), side_of(shapes_of(21, 256, 512), "F32")
    plan = plan_of(a, b, SAMPLE)
    assert len(plan.candidate.layers) > 2
    assert plan.reference.layers == tuple(round(layer / 2) for layer in plan.candidate.layers)
    unpaired = [name for name in plan.candidate.reads if name not in plan.compared]
    assert all(plan.candidate.is_whole(name) for name in unpaired)


def test_stacked_experts_are_read_as_ranges() -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    roles: dict[str, Role] = {}
    for layer in range(8):
        for part, size in (("gate_up_proj", 512), ("down_proj", 256)):
            name = f"model.layers.{layer}.mlp.experts.{part}"
            shapes[name] = (10, 256, size)
            roles[name] = TensorRole(
                "routed expert", layer, stack="model.layers.", part=part, layout=Layout("routed", stacked="axis")
            )
    a = side_of(shapes, "F32", 1 << 26, roles)
    plan = plan_of(a, a, SCREEN, 4_000_000)
    layer = plan.candidate.layers[0]
    first, *_ = plan.candidate.experts[layer]
    name = f"model.layers.{layer}.mlp.experts.down_proj"
    read = plan.candidate.reads[name]
    assert read.runs[0] == (first * 256 * 256, (first + 1) * 256 * 256)
    assert not read.whole
    piece = sliced(a.index, plan.candidate.reads).tensors[f"{name}[{read.runs[0][0]}:{read.runs[0][1]}]"]
    assert piece.shape == (1, 256, 256)
    assert plan.compared[name].read.runs == read.runs
    assert plan.candidate.all_experts == dict.fromkeys(range(8), 10)


def test_names_without_numbers_are_read_as_matrices() -> None:
    shapes = {f"matrix_{'abcdefghijkl'[number]}": (256, 512) for number in range(12)}
    a = side_of(shapes, "F32", 1 << 21)
    b = side_of({f"x{name}": shape for name, shape in reversed(shapes.items())}, "F32", 1 << 21)
    pairs = [(name, f"x{name}") for name in shapes]
    plan = plan_reads(a, b, pairs, ReadRequest(SCREEN, 5_000_000))
    whole = [name for name in plan.candidate.reads if plan.candidate.is_whole(name)]
    assert 1 < len(whole) < 12
    assert {f"x{name}" for name in whole} == {name for name in plan.reference.reads if plan.reference.is_whole(name)}
    assert plan.candidate.layers == ()
    assert set(plan.compared) == set(whole)


@pytest.mark.parametrize(
    ("count", "chosen", "expected"),
    [(10, 2, [0, 9]), (3, 9, [0, 1, 2]), (5, 5, [0, 1, 2, 3, 4]), (0, 3, []), (5, 0, []), (1, 1, [0])],
)
def test_spread_of_ends_and_of_all(count: int, chosen: int, expected: list[int]) -> None:
    assert spread(count, chosen, 3) == expected


def test_every_layer_may_be_drawn_and_each_stratum_has_one() -> None:
    """A layer that no seed reads could hold what was taken over."""
    drawn = [spread(32, 6, seed) for seed in range(300)]
    assert {place for places in drawn for place in places} == {*range(32)}
    for places in drawn:
        assert (places[0], places[-1]) == (0, 31)
        edges = [1, 8, 16, 23, 31]
        assert all(start <= place < stop for place, (start, stop) in zip(places[1:-1], pairwise(edges), strict=True))
    assert spread(32, 6, 7) == spread(32, 6, 7)
    assert {place for seed in range(100) for place in spread(10, 1, seed)} == {*range(10)}


# Rows of shared tokens


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


# Hostile checkpoints and wrong use


def test_sizes_from_headers_cost_no_memory() -> None:
    tracemalloc.start()
    try:
        enormous = {
            "model.embed_tokens.weight": (1 << 40, 4),
            "model.layers.0.mlp.up_proj.weight": (3, 1 << 50),
            "model.layers.900000.mlp.up_proj.weight": (1 << 30, 1 << 20),
            "model.layers.0.norm.weight": (1 << 50,),
            "model.layers.0.mlp.gate.weight": (1 << 44, 1),
        }
        stacked = "model.layers.0.mlp.experts.up"
        role = TensorRole("routed expert", 0, stack="model.layers.", part="up", layout=Layout("routed", stacked="axis"))
        a = side_of({**enormous, stacked: (1 << 45, 1, 4)}, roles={stacked: role})
        for mode in (SCREEN, SAMPLE):
            with pytest.raises(BudgetTooSmall):
                plan_of(a, a, mode, 10**9)
        plan = plan_of(a, a, SAMPLE)
        assert plan.bytes > 1 << 40
        assert len(slice_pairs(plan)) < 300_000
        assert len(plan_of(a, a, SCREEN, 1 << 60).candidate.reads) == 6
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 120 << 20


def test_a_tensor_that_is_called_like_a_piece() -> None:
    a = side_of(shapes_of(1, 256, 700))
    plan = plan_of(a, a, SAMPLE)
    name, (_, read) = next((name, one) for name, one in plan.compared.items() if not one.read.whole)
    start, stop = read.ranges()[0]
    clash = replace(a.index.tensors[name], name=f"{name}[{start}:{stop}]")
    hostile = replace(a.index, tensors={**a.index.tensors, clash.name: clash})
    with pytest.raises(CheckpointUnavailable, match="called like a piece"):
        sliced(hostile, plan.candidate.reads)


def test_empty_odd_and_tiny_tensors() -> None:
    tensors = {
        "empty": TensorInfo("empty", "F32", (0, 5), "s", 10, 10),
        "scalar": TensorInfo("scalar", "F32", (), "s", 10, 14),
        "packed": TensorInfo("packed", "F4", (1 << 20, 3), "s", 14, 14 + (3 << 19)),
    }
    index = CheckpointIndex("odd", {"s": Shard("s", 1 << 22)}, tensors)
    side = Side(index, {name: role_of(name) for name in tensors})
    for mode in MODES:
        plan = plan_of(side, side, mode)
        for name, (_, read) in plan.compared.items():
            assert read.whole, name
        assert sliced(index, plan.candidate.reads).tensors.keys() <= tensors.keys()
    nothing = Side(index, {})
    assert plan_reads(nothing, nothing, [], ReadRequest(SAMPLE)).compared == {}


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([("a", "nowhere")], "no such tensors"),
        ([("a", "a"), ("a", "b")], "in one pair"),
        ([("a", "a"), ("b", "a")], "reference may stand in one pair"),
        ([("a", "c")], "has 12 elements"),
    ],
)
def test_wrong_pairs(pairs: Sequence[tuple[str, str]], message: str) -> None:
    side = side_of({"a": (3, 4), "b": (3, 4), "c": (3, 5)})
    with pytest.raises(ValueError, match=message):
        plan_reads(side, side, pairs, ReadRequest(FULL))


def test_wrong_requests_and_roles() -> None:
    with pytest.raises(ValueError, match="no way to read"):
        ReadRequest("some")
    with pytest.raises(ValueError, match="reads nothing"):
        ReadRequest(SCREEN, 0)
    side = side_of({"a": (3, 4)})
    with pytest.raises(ValueError, match="no tensor"):
        plan_of(Side(side.index, {"b": role_of("b")}), side, FULL)


def test_ranges_that_touch_are_one_request() -> None:
    a = side_of(shapes_of(6, 256, 700), "F32", 1 << 23)
    plan = plan_of(a, a, SAMPLE)
    pieces = sliced(a.index, plan.candidate.reads).tensors
    ranges = list(byte_ranges(a.index, plan.candidate.reads))
    assert len(ranges) < 0.9 * len(pieces)
    assert ranges == sorted(set(ranges))
    assert all(stop - start <= 4096 for _, start, stop in byte_ranges(a.index, plan.candidate.reads, largest=4096))
    wider = list(byte_ranges(a.index, plan.candidate.reads, gap=8192))
    assert len(wider) < len(ranges)
    for shard, start, stop in ranges:
        assert any(one == shard and first <= start and stop <= last for one, first, last in wider)


# From a plan to an estimate


class Counting(LocalSource):
    """Counts the bytes that are read."""

    count = 0

    def read_into(self, shard: str, start: int, buffer: memoryview) -> None:
        self.count += buffer.nbytes
        super().read_into(shard, start, buffer)


def write(directory: Path, tensors: Mapping[str, Tensor]) -> Side:
    directory.mkdir()
    save_file(dict(tensors), directory / "model.safetensors")
    index = read_local_index(directory)
    return Side(index, {name: role_of(name) for name in index.tensors})


def test_estimates_of_a_pair_on_disk(tmp_path: Path) -> None:
    shapes = shapes_of(8, 256, 512)
    ours: dict[str, Tensor] = {}
    theirs: dict[str, Tensor] = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        ours[name] = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
        noise = torch.randn(*shape, generator=torch.Generator().manual_seed(1000 + seed))
        theirs[name] = (ours[name] + noise).bfloat16() if "q_proj" not in name else ours[name].clone()
    a, b = write(tmp_path / "a", ours), write(tmp_path / "b", theirs)
    plan = plan_of(a, b, SAMPLE, seed=5)
    sources = Counting(tmp_path / "a"), Counting(tmp_path / "b")
    results = list(
        stream_pair(
            sliced(a.index, plan.candidate.reads),
            sliced(b.index, plan.reference.reads),
            sources,
            slice_pairs(plan),
            hashing=False,
            threads=2,
        )
    )
    for source, reads, side in zip(sources, (plan.candidate, plan.reference), (a, b), strict=True):
        assert source.count == sum(stop - start for _, start, stop in byte_ranges(side.index, reads.reads))
        assert source.count == reads.bytes - 100_000  # of the header
        source.close()
    found = estimates(plan, results)
    assert found.keys() == shapes.keys()
    exact: dict[str, float] = {}
    for name, estimate in found.items():
        x, y = ours[name].flatten().double(), theirs[name].flatten().double()
        exact[name] = float(torch.corrcoef(torch.stack([x, y]))[0, 1])
        if plan.compared[name].read.whole:
            assert estimate.cosine == pytest.approx(exact[name], abs=1e-6)
            assert estimate.is_complete
        else:
            assert estimate.drawn_equal == ("q_proj" in name)
    held = sampled = 0
    for number in range(8):
        names = [name for name in found if f"layers.{number}.mlp" in name]
        layer = combine((found[name], ours[name].numel()) for name in names)
        assert layer.interval is not None
        held += layer.interval[0] - 1e-6 <= sum(exact[name] for name in names) / 2 <= layer.interval[1] + 1e-6
        sampled += not layer.is_complete
    assert sampled >= 5
    assert held >= 7
    mlp = [f"model.layers.3.mlp.{part}_proj.weight" for part in ("up", "down")]
    assert estimates(plan, results, mlp).keys() == set(mlp)
    assert estimates(plan, results[:1]).keys() < found.keys()


def test_estimates_of_runs_alone_have_no_interval(tmp_path: Path) -> None:
    a = torch.randn(2000, 256, generator=torch.Generator().manual_seed(0))
    b = a + torch.randn(2000, 256, generator=torch.Generator().manual_seed(1))
    name = "model.layers.0.mlp.experts.up"
    ours, theirs = write(tmp_path / "a", {name: a}), write(tmp_path / "b", {name: b})
    runs = ((0, 40 * 256), (100 * 256, 160 * 256))
    read = TensorRead(a.numel(), runs=runs)
    side = SideRead({name: read}, (), (), {}, {}, None, 0, 0)
    plan = ReadPlan(ReadRequest(SCREEN), side, side, {name: Compared(name, read)})
    results = stream_pair(
        sliced(ours.index, plan.candidate.reads),
        sliced(theirs.index, plan.reference.reads),
        (LocalSource(tmp_path / "a"), LocalSource(tmp_path / "b")),
        slice_pairs(plan),
        hashing=False,
        threads=2,
    )
    found = estimates(plan, results)[name]
    rows = [*range(40), *range(100, 160)]
    exact = torch.corrcoef(torch.stack([a[rows].flatten(), b[rows].flatten()]))[0, 1]
    assert found.cosine == pytest.approx(float(exact), abs=1e-6)
    assert found.interval is None
    assert not found.is_complete
    assert found.unseen_share == 0.95


runs = st.lists(st.tuples(st.integers(0, 59), st.integers(1, 30)), max_size=4)


@given(size=st.integers(1, 60), block=st.integers(1, 7), drawn=st.integers(-1, 60), seed=st.integers(0, 99), runs=runs)
def test_no_element_stands_in_two_pieces(
    size: int, block: int, drawn: int, seed: int, runs: list[tuple[int, int]]
) -> None:
    """A sample of stacked experts reads whole experts and blocks, and both begin where the first expert does."""
    ours = tuple((start, min(size, start + count)) for start, count in runs if start < size)
    between = BlockDesign(size, block, 0, seed).between
    design = None if drawn < 0 else BlockDesign(size, block, min(drawn, between), seed)
    read = TensorRead(size, runs=ours, design=design)
    wanted = {*ours, *(design.ranges() if design else ())}
    elements = [element for start, stop in read.ranges() for element in range(start, stop)]
    assert elements == sorted({element for start, stop in wanted for element in range(start, stop)})
    assert read.elements_read == len(elements)
    assert all(start < stop for start, stop in read.ranges())
    assert design is None or set(design.ranges()) <= set(read.ranges())
