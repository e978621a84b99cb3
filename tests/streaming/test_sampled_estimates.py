"""From a plan to an estimate."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from checks.checkpoint.local import LocalSource, read_local_index
from checks.checkpoint.roles import role_of
from checks.statistics.sampling import BlockDesign, combine
from checks.streaming.read_plan import (
    SAMPLE,
    SCREEN,
    Compared,
    ReadPlan,
    ReadRequest,
    SideRead,
    TensorRead,
    byte_ranges,
    estimates,
    slice_pairs,
    sliced,
)
from checks.streaming.sampling import Side
from checks.streaming.stream import stream_pair
from tests.streaming.planned_sides import plan_of, shapes_of


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
