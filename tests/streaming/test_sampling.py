"""What a plan reads of two checkpoints: within its budget, spread over layers and experts."""

from __future__ import annotations

import re
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.index import CheckpointIndex, Shard, TensorInfo
from checks.checkpoint.roles import Layout, Role, TensorRole, role_of
from checks.streaming.read_plan import (
    FULL,
    MODES,
    SAMPLE,
    SCREEN,
    ReadRequest,
    byte_ranges,
    item_size,
    slice_pairs,
    sliced,
)
from checks.streaming.sampling import BudgetTooSmall, Side, plan_reads
from checks.streaming.whole_layers import spread
from tests.streaming.planned_sides import HEADER, SIZES, common, plan_of, shapes_of, side_of, sides

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
