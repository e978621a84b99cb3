"""The kernels that sum stored bytes: against float64, wherever the bytes are cut."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import threading
from dataclasses import astuple
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from checks.statistics import kernel_cpu, kernel_cuda
from checks.statistics.elementwise import ElementwiseSums, elementwise_sums
from checks.statistics.kernel_cpu import BLOCK, ITEM_SIZES, RUN, TORCH_DTYPES, PieceSums
from checks.statistics.kernel_cuda import DevicePieceSums

NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
DTYPE_PAIRS = [(a, b) for a in ITEM_SIZES for b in ITEM_SIZES]
SIZES = [0, 1, 7, RUN - 1, RUN, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 17, 20 * BLOCK + RUN + 3]
with_numba = pytest.mark.skipif(kernel_cpu.numba is None, reason="numba is not installed")


@pytest.fixture(params=[pytest.param("numba", marks=with_numba), "torch"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of computing on the CPU."""
    if request.param == "torch":
        monkeypatch.setattr(kernel_cpu, "numba", None)
    return str(request.param)


def stored(tensor: Tensor) -> memoryview:
    """The bytes of a tensor as safetensors stores them."""
    if not tensor.numel():
        return memoryview(b"")
    return tensor.contiguous().flatten().view(torch.uint8).numpy().data


def normal(n: int, seed: int, mean: float = 0.0, sd: float = 1.0) -> Tensor:
    return mean + sd * torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def correlated(n: int, dtypes: tuple[str, str], mean: float = 0.0, sd: float = 0.02) -> tuple[Tensor, Tensor]:
    """Two vectors with cosine near .7 and some equal elements."""
    a, noise = normal(n, 1), normal(n, 2)
    b = a + noise
    b[::5] = a[::5]
    return (mean + sd * a).to(TORCH_DTYPES[dtypes[0]]), (mean + sd * b).to(TORCH_DTYPES[dtypes[1]])


def sums(a: Tensor, b: Tensor) -> ElementwiseSums:
    """All at once."""
    total = PieceSums(NAMES[a.dtype], NAMES[b.dtype])
    total.add(stored(a), stored(b))
    return total.result()


def cosines(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Raw and centred cosine, by two passes in float64."""
    a, b = a.double(), b.double()
    raw = float(a @ b / (a.norm() * b.norm()))
    a, b = a - a.mean(), b - b.mean()
    return raw, float(a @ b / (a.norm() * b.norm()))


def assert_agrees(found: ElementwiseSums, a: Tensor, b: Tensor, relative: float = 1e-6) -> None:
    """Counts and the maximum are exact; sums within `relative` of the sum of their magnitudes."""
    finite = a.isfinite() & b.isfinite()
    a, b = a[finite].double(), b[finite].double()
    difference = a - b
    assert found.n == a.numel()
    assert found.nonfinite == finite.numel() - a.numel()
    assert found.equal == int((difference == 0).sum())
    assert found.max_difference == (float(difference.abs().max()) if found.n else 0.0)
    centred_a, centred_b = (a - a.mean(), b - b.mean()) if found.n else (a, b)
    for value, x, y in [
        (found.sum_a, a, torch.ones_like(a)),
        (found.sum_b, b, torch.ones_like(b)),
        (found.dot, a, b),
        (found.square_a, a, a),
        (found.square_b, b, b),
        (found.squared_difference, difference, difference),
        (found.centred_dot, centred_a, centred_b),
        (found.centred_square_a, centred_a, centred_a),
        (found.centred_square_b, centred_b, centred_b),
    ]:
        magnitude = float(x.norm() * y.norm())
        assert value == pytest.approx(float(x @ y), abs=relative * magnitude + 1e-300)


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids="-".join)
def test_agrees_with_float64_for_every_pair_of_dtypes(kernel: str, dtypes: tuple[str, str]) -> None:
    for n in SIZES:
        a, b = correlated(n, dtypes)
        found = sums(a, b)
        assert_agrees(found, a, b)
        if n > 7:
            raw, centred = cosines(a, b)
            assert found.cosine == pytest.approx(raw, abs=1e-6)
            assert found.centred_cosine == pytest.approx(centred, abs=1e-6)


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids="-".join)
@pytest.mark.parametrize(("mean", "sd"), [(1.0, 0.01), (-30.0, 0.5), (0.02, 0.02)])
def test_centred_cosine_survives_a_large_mean(dtypes: tuple[str, str], mean: float, sd: float) -> None:
    a, b = correlated(9 * BLOCK + 5, dtypes, mean, sd)
    assert sums(a, b).centred_cosine == pytest.approx(cosines(a, b)[1], abs=1e-6)


def test_means_that_change_from_block_to_block_do_not_cancel() -> None:
    blocks = [normal(BLOCK, k, mean=mean, sd=0.01) for k, mean in enumerate([0.0, 1.0, 0.0, -5.0, 1.0])]
    a = torch.cat(blocks).float()
    b = (a.double() + normal(a.numel(), 99, sd=0.01)).float()
    assert sums(a, b).centred_cosine == pytest.approx(cosines(a, b)[1], abs=1e-9)


def test_equal_magnitudes_that_round_the_same_way_stay_within_the_bound() -> None:
    """Weights of one magnitude and two signs: the rounding errors of all products are equal and add up."""
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for _ in range(200):
        signs = torch.randint(0, 2, (2, 8 * BLOCK), generator=generator).float() * 2 - 1
        magnitude = torch.rand(2, 1, generator=generator) + 0.5
        signs[1] = torch.where(torch.rand(8 * BLOCK, generator=generator) < 0.2, -signs[0], signs[0])
        a, b = signs * magnitude
        found, (raw, centred) = sums(a, b), cosines(a, b)
        worst = max(worst, abs(found.cosine - raw), abs(found.centred_cosine - centred))
    assert worst <= 1e-6


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-22, 1e-12, 1e12, 1e18, 1e30])
def test_values_whose_squares_leave_the_range_of_fp32(kernel: str, scale: float) -> None:
    a, b = (values.float() for values in correlated(3 * BLOCK + 1, ("F64", "F64"), sd=scale))
    found = sums(a, b)
    assert_agrees(found, a, b)
    assert found.centred_cosine == pytest.approx(cosines(a, b)[1], abs=1e-6)


@pytest.mark.parametrize("exponent", [-24, -16, -14, -13, 0, 15])
def test_half_precision_down_to_its_smallest_numbers(exponent: int) -> None:
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.float16)
    every = bits[bits.isfinite()]
    other = torch.full_like(every, 2.0**exponent)
    assert_agrees(sums(every, other), every, other)
    assert_agrees(sums(other, every), other, every)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_nonfinite_positions_are_counted_and_left_out(kernel: str, dtype: str) -> None:
    a, b = correlated(4 * BLOCK + 100, (dtype, dtype))
    for position, value in [(0, math.nan), (5, math.inf), (BLOCK - 1, -math.inf), (BLOCK, math.nan), (-1, math.inf)]:
        a[position] = value
    b[5], b[7], b[3 * BLOCK + 3] = math.inf, -math.inf, math.nan
    found = sums(a, b)
    assert found.nonfinite == 7
    assert_agrees(found, a, b)
    with torch.no_grad():
        a[:BLOCK] = math.nan
    assert_agrees(sums(a, b), a, b)
    assert sums(a * math.nan, b) == ElementwiseSums(nonfinite=a.numel())


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -3e-5, 1e-40])
def test_constants_have_no_centred_cosine(kernel: str, value: float) -> None:
    constant, other = torch.full((5 * BLOCK + 3,), value), normal(5 * BLOCK + 3, 0).float()
    assert sums(constant, other).centred_cosine is None
    assert sums(constant, constant).centred_square_a == pytest.approx(0, abs=1e-25 * value**2)
    assert sums(constant, constant).equal == constant.numel()
    assert sums(constant, constant + 0.5).relative_mean_squared_error is None


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32", "F64"])
def test_equal_tensors(kernel: str, dtype: str) -> None:
    a = normal(5 * BLOCK + 1, 3).to(TORCH_DTYPES[dtype])
    found = sums(a, a)
    assert (found.equal, found.max_difference, found.squared_difference) == (a.numel(), 0.0, 0.0)
    assert found.cosine == pytest.approx(1, abs=1e-12)
    assert found.centred_cosine == pytest.approx(1, abs=1e-12)
    assert sums(torch.zeros(9), -torch.zeros(9)).equal == 9


def test_the_maximum_is_exact_where_fp32_would_round_it() -> None:
    # 1 - 2^-30 rounds to 1 in fp32, in the first block; a later block has the larger difference, which also does.
    a, b = torch.ones(3 * BLOCK), torch.ones(3 * BLOCK)
    b[5], b[2 * BLOCK + 5] = 2.0**-30, 2.0**-31
    assert sums(a, b).max_difference == 1 - 2.0**-31
    assert sums(b, a).max_difference == 1 - 2.0**-31


@given(
    dtypes=st.sampled_from(DTYPE_PAIRS),
    n=st.integers(0, 4 * BLOCK),
    cuts=st.tuples(*[st.lists(st.floats(0, 1), max_size=6)] * 2),
    seed=st.integers(0, 99),
)
def test_cutting_anywhere_changes_nothing(
    dtypes: tuple[str, str], n: int, cuts: tuple[list[float], list[float]], seed: int
) -> None:
    a = (normal(n, seed) * 0.02).to(TORCH_DTYPES[dtypes[0]])
    b = (normal(n, seed + 100) * 0.02).to(TORCH_DTYPES[dtypes[1]])
    if n > 10:
        a[seed % n] = math.nan
    whole = sums(a, b)
    total = PieceSums(*dtypes)
    left, right = (
        [view[start:stop] for start, stop in pairwise([0, *sorted(int(cut * len(view)) for cut in places), len(view)])]
        for view, places in zip((stored(a), stored(b)), cuts, strict=True)
    )
    nothing = memoryview(b"")
    for step in range(max(len(left), len(right))):
        total.add(left[step] if step < len(left) else nothing, right[step] if step < len(right) else nothing)
    assert total.result() == whole


def test_cutting_changes_nothing_without_numba_either(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_cpu, "numba", None)
    a, b = correlated(50 * BLOCK + 77, ("BF16", "F32"))
    a[3 * BLOCK + 5] = math.nan
    whole = sums(a, b)
    left, right = stored(a), stored(b)
    for piece in (100, BLOCK, 3 * BLOCK, 17 * BLOCK, 40 * BLOCK):
        total = PieceSums("BF16", "F32")
        for start in range(0, a.numel(), piece):
            total.add(left[2 * start : 2 * (start + piece)], right[4 * start : 4 * (start + piece)])
        assert total.result() == whole


@pytest.mark.parametrize("offset", [0, 1, 2, 3, 5])
def test_any_address(kernel: str, offset: int) -> None:
    a, b = correlated(BLOCK + 9, ("F32", "F64"))
    memory = [bytearray(offset) + bytearray(stored(each)) for each in (a, b)]
    total = PieceSums("F32", "F64")
    total.add(*(memoryview(each)[offset:] for each in memory))
    assert_agrees(total.result(), a, b)


def test_the_memory_of_a_piece_may_change_once_it_was_added(kernel: str) -> None:
    a, b = correlated(BLOCK + 9, ("BF16", "F32"))
    memory = bytearray(stored(a)), bytearray(stored(b))
    total = PieceSums("BF16", "F32")
    total.add(*map(memoryview, memory))
    for each in memory:
        each[:] = bytes(len(each))
    assert_agrees(total.result(), a, b)


def test_read_only_memory(kernel: str) -> None:
    a, b = correlated(BLOCK + 9, ("BF16", "F16"))
    total = PieceSums("BF16", "F16")
    total.add(memoryview(bytes(stored(a))), memoryview(bytes(stored(b))))
    assert_agrees(total.result(), a, b)


def test_both_ways_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = correlated(10 * BLOCK + 77, ("BF16", "F32"))
    one = sums(a, b)
    monkeypatch.setattr(kernel_cpu, "numba", None)
    other = sums(a, b)
    assert astuple(one) == pytest.approx(astuple(other), rel=1e-6, abs=1e-6)
    assert astuple(other) == pytest.approx(astuple(elementwise_sums(a, b)), rel=1e-12)


def test_threads_compute_at_the_same_time(kernel: str) -> None:
    a, b = correlated(30 * BLOCK + 7, ("BF16", "F16"))
    expected, found = sums(a, b), []
    threads = [threading.Thread(target=lambda: found.append(sums(a, b))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 8


@pytest.mark.parametrize("dtype", ["F8_E4M3", "I8", "U8", "BOOL", "bf16"])
def test_packed_and_integer_dtypes_are_refused(dtype: str) -> None:
    for kind in (PieceSums, lambda a, b: DevicePieceSums(a, b, "cpu")):
        with pytest.raises(TypeError, match="dequantise first"):
            kind("BF16", dtype)


@pytest.mark.parametrize(("left", "right"), [(10, 8), (10, 22), (3, 6), (0, 4)])
def test_different_sizes_are_refused(left: int, right: int) -> None:
    total = PieceSums("BF16", "F32")
    total.add(memoryview(bytearray(left)), memoryview(bytearray(right)))
    with pytest.raises(ValueError, match="same number of whole elements"):
        total.result()
    with pytest.raises(ValueError, match="equally many"):
        DevicePieceSums("BF16", "F32", "cpu").add(memoryview(bytearray(left)), memoryview(bytearray(right)))


# The function that runs on a GPU, on a CPU.


def device_sums(a: Tensor, b: Tensor, piece: int) -> ElementwiseSums:
    total = DevicePieceSums(NAMES[a.dtype], NAMES[b.dtype], "cpu")
    left, right = stored(a), stored(b)
    for start in range(0, a.numel(), piece):
        stop = min(start + piece, a.numel())
        ours, theirs = (
            bytearray(view[start * each.dtype.itemsize : stop * each.dtype.itemsize])
            for view, each in ((left, a), (right, b))
        )
        total.add(memoryview(ours), memoryview(theirs))
        ours[:], theirs[:] = bytes(len(ours)), bytes(len(theirs))
    return total.result()


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids="-".join)
def test_device_function_agrees_with_float64(dtypes: tuple[str, str]) -> None:
    for n in (0, 1, 1000, 5001):
        a, b = correlated(n, dtypes, mean=1.0, sd=0.1)
        assert_agrees(device_sums(a, b, 1000), a, b, relative=1e-12)


def test_device_function_leaves_out_what_is_not_finite() -> None:
    a, b = correlated(3000, ("BF16", "F32"), mean=1.0)
    a[0], a[1500], b[1500], b[2999] = math.nan, math.inf, math.inf, -math.inf
    a[2000:2500] = math.nan
    assert_agrees(device_sums(a, b, 500), a, b, relative=1e-12)
    assert device_sums(a * math.nan, b, 500) == ElementwiseSums(nonfinite=3000)


def test_device_function_finds_constants() -> None:
    for value in (0.0, 0.1, 1.0):
        constant = torch.full((3000,), value)
        assert device_sums(constant, normal(3000, 0).float(), 700).centred_cosine is None
        assert device_sums(constant, constant, 700).equal == 3000


@pytest.mark.parametrize("piece", [1, 999, 5000])
def test_device_function_does_not_depend_on_the_pieces(piece: int) -> None:
    a, b = correlated(1500, ("BF16", "F16"))
    found, whole = device_sums(a, b, piece), device_sums(a, b, 1500)
    assert astuple(found) == pytest.approx(astuple(whole), rel=1e-12)


@pytest.mark.parametrize("blocks", [1, 2, 7, 16, 29])
def test_device_function_gives_the_same_bits_for_pieces_of_whole_blocks(blocks: int) -> None:
    a, b = correlated(60 * BLOCK + 99, ("BF16", "F32"))
    assert device_sums(a, b, blocks * BLOCK) == device_sums(a, b, a.numel())


def test_gpus_have_full_names() -> None:
    assert kernel_cuda.gpu("cuda:3") == "cuda:3"
    for device in ("mps", "cpu", "meta"):
        with pytest.raises(ValueError, match=f"not on {device}"):
            kernel_cuda.gpu(device)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_gpu_agrees_with_cpu() -> None:
    a, b = correlated(1 << 20, ("BF16", "F32"))
    total = DevicePieceSums("BF16", "F32", kernel_cuda.gpu("cuda"))
    for start in range(0, a.numel(), 1 << 16):
        pieces = []
        for tensor in (a, b):
            data = stored(tensor[start : start + (1 << 16)])
            memory = kernel_cuda.pinned_memory(len(data)).data
            memory[:] = data
            pieces.append(memory)
        total.add(*pieces)
        for memory in pieces:
            memory[:] = bytes(len(memory))
    assert_agrees(total.result(), a, b, relative=1e-12)


# Where the compiled kernel is kept.


def run_where_the_package_cannot_be_written(tmp_path: Path, code: str, **environment: str) -> str:
    """Runs code on a copy of the package beside which nothing can be kept: files stand where directories would be."""
    package = tmp_path / "copy" / "checks"
    shutil.copytree(
        Path(kernel_cpu.__file__).parents[1],
        package,
        ignore=lambda directory, names: [name for name in names if name.endswith((".yaml", ".json", "__pycache__"))],
    )
    (package / "statistics" / "__pycache__").write_text("")
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(package.parent), **environment}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=True)
    return done.stdout.strip()


@with_numba
def test_the_compiled_kernel_goes_to_the_users_cache(tmp_path: Path) -> None:
    code = (
        "from checks.statistics.kernel_cpu import PieceSums\n"
        "s = PieceSums('F32', 'F32'); s.add(memoryview(bytearray(8)), memoryview(bytearray(8))); print(s.result().n)\n"
    )
    assert run_where_the_package_cannot_be_written(tmp_path, code, XDG_CACHE_HOME=str(tmp_path / "cache")) == "2"
    assert list((tmp_path / "cache").rglob("kernel_cpu.add_blocks-*.nbi"))


@with_numba
def test_without_any_place_for_it_every_process_compiles(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    code = "from checks.statistics.kernel_cpu import add_blocks; print(add_blocks.stats.cache_path)"
    nowhere = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR"), str(file / "cache"))
    assert run_where_the_package_cannot_be_written(tmp_path, code, **nowhere) == "None"
