"""Element-wise sums straight from the stored bytes of two tensors, on the CPU: fp32 inside a block, float64 across."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from checks.statistics.elementwise import ElementwiseSums

numba: Any
try:
    numba = importlib.import_module("numba")
except ImportError:
    numba = None

# Bytes of one element, by the dtype names of safetensors; a dtype's place here is its code in the kernel.
ITEM_SIZES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8}
_BF16, _F16, _F32, _F64 = range(4)
TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
_CODES = {dtype: code for code, dtype in enumerate(ITEM_SIZES)}

# Elements of a block: three times so many in fp32 fit into a CPU's L1 cache. Elements of a run, in fp32 sums.
BLOCK = 2048
RUN = 256

# Blocks that are added up together without numba: a few of their copies in float64 fit into a CPU's cache.
_TABLE = 16

# What a state holds: positions, both means, centred Σab, Σa², Σb², then Σ(a-b)², equal, max|a-b|, non-finite.
_STATE_SIZE = 10
_LARGEST = 8

# Smaller sums of squares may have lost digits to fp32's underflow.
_SMALLEST_SQUARE = 1e-30

# The smallest half-precision number above 0.
_SMALLEST_HALF = np.float32(2.0**-24)

# Lets the compiler reorder sums, so that they use vector registers. NaN and infinity keep their meaning.
_REORDER = {"reassoc", "contract", "nsz", "arcp"}

Bytes = npt.NDArray[np.uint8]
Halves = npt.NDArray[np.uint16]
Singles = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

_Function = TypeVar("_Function", bound=Callable[..., Any])


class PieceSums:
    """The sums of two tensors whose bytes come in pieces.

    `dtype_a`, `dtype_b`: BF16, F16, F32 or F64, little-endian, as safetensors stores them. `add` takes the next bytes
    of both; the pieces need not match, nor end at an element. Wherever the tensors are cut, blocks begin at the same
    elements, so the sums come out the same to the last bit.

    Products are added in fp32 inside a run of 256 elements (error about 1e-7 of the sum of their magnitudes, also where
    all are equal and so all rounded the same way), and in float64 across runs. Blocks of eight runs are centred and
    pooled after Chan, Golub, LeVeque 1979 (STAN-CS-79-773), eq. 2.1. A block is added up in float64 throughout where
    fp32 would not do: where its mean is more than half of its root mean square (the centred sums would cancel), where
    its squares leave fp32's range, where a value is not finite, or where a side is F64. Hence raw and centred cosines
    are within 1e-6 of float64's for any mean and scale; the counts and the maximum are float64's own.

    Without numba numpy computes the same blocks, in float64 throughout and several times more slowly. Either way one
    thread adds each block up by itself, so the sums do not depend on how many threads there are.
    Raises TypeError for other dtypes.
    """

    def __init__(self, dtype_a: str, dtype_b: str) -> None:
        for dtype in (dtype_a, dtype_b):
            if dtype not in ITEM_SIZES:
                raise TypeError(f"{dtype} is not compared: expected {', '.join(ITEM_SIZES)}; dequantise first")
        self._dtypes = (dtype_a, dtype_b)
        self._sizes = (ITEM_SIZES[dtype_a], ITEM_SIZES[dtype_b])
        self._state = np.zeros(_STATE_SIZE)
        self._rest = (np.empty(0, np.uint8), np.empty(0, np.uint8))

    def add(self, a: memoryview, b: memoryview) -> None:
        """The next bytes of both tensors. Their memory may be used for something else once this returns."""
        left, right = _joined(self._rest[0], a), _joined(self._rest[1], b)
        count = min(left.size // self._sizes[0], right.size // self._sizes[1]) // BLOCK * BLOCK
        self._compare(left, right, count)
        self._rest = (left[count * self._sizes[0] :].copy(), right[count * self._sizes[1] :].copy())

    def result(self) -> ElementwiseSums:
        """The sums of all that was added. Raises ValueError if both sides had not the same number of elements."""
        left, right = self._rest
        count = left.size // self._sizes[0]
        if (left.size, right.size) != (count * self._sizes[0], count * self._sizes[1]):
            raise ValueError(
                f"the last {left.size} bytes of {self._dtypes[0]} and {right.size} bytes of {self._dtypes[1]} are not "
                "the same number of whole elements"
            )
        self._compare(left, right, count)
        self._rest = (np.empty(0, np.uint8), np.empty(0, np.uint8))
        return sums_of(self._state)

    def _compare(self, left: Bytes, right: Bytes, count: int) -> None:
        if not count:
            return
        left = _aligned(left[: count * self._sizes[0]], self._sizes[0])
        right = _aligned(right[: count * self._sizes[1]], self._sizes[1])
        add = add_blocks if numba else add_blocks_with_numpy
        add(left, _CODES[self._dtypes[0]], right, _CODES[self._dtypes[1]], count, self._state)


def _joined(rest: Bytes, piece: memoryview) -> Bytes:
    arrived = np.frombuffer(piece, np.uint8)
    return np.concatenate((rest, arrived)) if rest.size else arrived


def _aligned(values: Bytes, size: int) -> Bytes:
    """The same bytes at an address that is a multiple of `size`: a tensor may begin anywhere in its file."""
    return values if values.ctypes.data % size == 0 else values.copy()


def sums_of(state: Iterable[float]) -> ElementwiseSums:
    """The sums from the ten numbers of a state."""
    n, mean_a, mean_b, dot, square_a, square_b, squared_difference, equal, largest, nonfinite = map(float, state)
    return ElementwiseSums(
        n=int(n),
        sum_a=n * mean_a,
        sum_b=n * mean_b,
        dot=dot + n * mean_a * mean_b,
        square_a=square_a + n * mean_a * mean_a,
        square_b=square_b + n * mean_b * mean_b,
        squared_difference=squared_difference,
        equal=int(equal),
        max_difference=largest,
        nonfinite=int(nonfinite),
        centred_dot=dot,
        centred_square_a=square_a,
        centred_square_b=square_b,
    )


def _compiled(reorder: bool = False) -> Callable[[_Function], _Function]:
    """Compile a function with numba, if it is installed, to machine code that does not hold the GIL.

    The first call on a machine takes some seconds. numba keeps the machine code in NUMBA_CACHE_DIR if that is set, else
    beside this file, else in the user's cache directory; where none of them can be written, each process compiles.
    """

    def decorate(function: _Function) -> _Function:
        if not numba:
            return function
        options = {"nogil": True, "fastmath": _REORDER if reorder else False}
        try:
            compiled: _Function = numba.njit(cache=True, **options)(function)
        except RuntimeError:
            compiled = numba.njit(**options)(function)
        return compiled

    return decorate


@_compiled()
def _widen_half(halves: Halves, out: Singles) -> None:
    """IEEE half precision as fp32, exactly; written without branches, so that it is vectorised."""
    bits = out.view(np.uint32)
    for i in range(halves.size):
        magnitude = np.uint32(halves[i] & np.uint16(0x7FFF))
        # The exponent is biased by 15 in a half and by 127 in a single; all ones (not finite) stay all ones.
        bias = np.uint32(112 << 23) if magnitude < np.uint32(0x7C00) else np.uint32(224 << 23)
        bits[i] = np.uint32(np.uint32(magnitude << np.uint32(13)) + bias)
    for i in range(halves.size):
        magnitude = np.uint32(halves[i] & np.uint16(0x7FFF))
        subnormal = np.float32(np.int32(magnitude)) * _SMALLEST_HALF
        value = subnormal if magnitude < np.uint32(0x0400) else out[i]
        out[i] = -value if halves[i] > np.uint16(0x7FFF) else value


@_compiled()
def _widen_bfloat(halves: Halves, out: Singles) -> None:
    """bfloat16 as fp32, of which it is the upper half."""
    bits = out.view(np.uint32)
    for i in range(halves.size):
        bits[i] = np.uint32(halves[i]) << np.uint32(16)


@_compiled()
def _copy(values: Any, out: Any) -> None:
    for i in range(values.size):
        out[i] = values[i]


@_compiled()
def _load(values: Bytes, code: int, start: int, n: int, out: Singles, wide: Doubles) -> None:
    """Elements from `start` as fp32 in `out`; those of F64 in `wide`."""
    # Each loop is a function of a slice that begins at 0: numba vectorises no others here.
    if code == _BF16:
        _widen_bfloat(values.view(np.uint16)[start : start + n], out)
    elif code == _F16:
        _widen_half(values.view(np.uint16)[start : start + n], out)
    elif code == _F32:
        _copy(values.view(np.float32)[start : start + n], out)
    else:
        _copy(values.view(np.float64)[start : start + n], wide)


def _single(value: Any) -> Any:
    """A number as fp32: it is one, or the bits of a bfloat16. Chosen by type when compiled."""
    return value


def _single_by_type(value: Any) -> Callable[[Any], Any]:
    if value is numba.types.uint16:
        return lambda value: np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32)
    return lambda value: value


if numba:
    importlib.import_module("numba.extending").overload(_single, strict=False)(_single_by_type)


@_compiled(reorder=True)
def _run_sums(a: Any, b: Any) -> tuple[Any, ...]:
    """Σx, Σy, Σxy, Σx², Σy², Σ(x-y)², the count of x = y, and max|x-y| if all is finite; in fp32.

    `a`, `b`: fp32, or both the bits of bfloat16.
    """
    zero, one = np.float32(0), np.float32(1)
    sum_x, sum_y, dot, square_x, square_y, squared_difference, equal = zero, zero, zero, zero, zero, zero, zero
    # The bits of numbers that are not negative have their order; a maximum of floats would not be vectorised.
    largest = np.int32(0)
    for i in range(a.size):
        x, y = _single(a[i]), _single(b[i])
        d = x - y
        sum_x += x
        sum_y += y
        dot += x * y
        square_x += x * x
        square_y += y * y
        squared_difference += d * d
        equal += one if x == y else zero
        largest = max(largest, np.float32(abs(d)).view(np.int32))
    return sum_x, sum_y, dot, square_x, square_y, squared_difference, equal, np.int32(largest).view(np.float32)


@_compiled(reorder=True)
def _float64_sums(x: Doubles, y: Doubles, n: int) -> tuple[float, ...]:
    """Both means, centred Σxy, Σx², Σy², then Σ(x-y)², the count of x = y and max|x-y|, of n > 0 finite positions."""
    # Deviations from the first element: a constant block then has exactly no spread.
    sum_x, sum_y = 0.0, 0.0
    for i in range(n):
        sum_x += x[i] - x[0]
        sum_y += y[i] - y[0]
    mean_x, mean_y = x[0] + sum_x / n, y[0] + sum_y / n
    dot, square_x, square_y, squared_difference, equal, largest = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for i in range(n):
        u, v, d = x[i] - mean_x, y[i] - mean_y, x[i] - y[i]
        dot += u * v
        square_x += u * u
        square_y += v * v
        squared_difference += d * d
        equal += 1.0 if x[i] == y[i] else 0.0
        largest = max(largest, abs(d))
    return mean_x, mean_y, dot, square_x, square_y, squared_difference, equal, largest


@_compiled()
def _pool(
    state: Doubles,
    n: int,
    mean_x: float,
    mean_y: float,
    dot: float,
    square_x: float,
    square_y: float,
    squared_difference: float,
    equal: float,
    largest: float,
) -> None:
    """Add a block to the state: Chan, Golub, LeVeque 1979, eq. 2.1, for co-moments."""
    total = state[0] + n
    offset_x, offset_y, weight = mean_x - state[1], mean_y - state[2], state[0] * n / total
    state[0] = total
    state[1] += offset_x * (n / total)
    state[2] += offset_y * (n / total)
    state[3] += dot + weight * offset_x * offset_y
    state[4] += square_x + weight * offset_x * offset_x
    state[5] += square_y + weight * offset_y * offset_y
    state[6] += squared_difference
    state[7] += equal
    state[_LARGEST] = max(state[_LARGEST], largest)


@_compiled()
def _add_in_fp32(a: Any, b: Any, state: Doubles) -> bool:
    """Add a block to the state if fp32 will do for it. If not, return False and leave the state as it is."""
    n = a.size
    sum_x, sum_y, dot, square_x, square_y, squared_difference, equal = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    highest = np.float32(0)
    for start in range(0, n, RUN):
        sums = _run_sums(a[start : start + RUN], b[start : start + RUN])
        sum_x += sums[0]
        sum_y += sums[1]
        dot += sums[2]
        square_x += sums[3]
        square_y += sums[4]
        squared_difference += sums[5]
        equal += sums[6]
        highest = max(highest, sums[7])
    if not math.isfinite(square_x + square_y + squared_difference):
        return False
    if min(square_x, square_y) < _SMALLEST_SQUARE or (squared_difference < _SMALLEST_SQUARE and equal < n):
        return False
    mean_x, mean_y = sum_x / n, sum_y / n
    if sum_x * mean_x > 0.25 * square_x or sum_y * mean_y > 0.25 * square_y:
        return False
    # Rounding to fp32 keeps order: only where the rounded maximum reaches the rounded largest so far may be a larger.
    largest = 0.0
    if highest > 0 and highest >= np.float32(state[_LARGEST]):
        for i in range(n):
            x, y = _single(a[i]), _single(b[i])
            if abs(x - y) == highest:
                largest = max(largest, abs(np.float64(x) - np.float64(y)))
    _pool(
        state,
        n,
        mean_x,
        mean_y,
        dot - sum_x * mean_y,
        square_x - sum_x * mean_x,
        square_y - sum_y * mean_y,
        squared_difference,
        equal,
        largest,
    )
    return True


@_compiled()
def _add_in_float64(x: Doubles, y: Doubles, n: int, state: Doubles) -> None:
    """Add a block to the state, without the positions where a side is not finite. Overwrites `x` and `y`."""
    kept = 0
    for i in range(n):
        if math.isfinite(x[i]) and math.isfinite(y[i]):
            x[kept], y[kept] = x[i], y[i]
            kept += 1
    state[9] += n - kept
    if kept:
        sums = _float64_sums(x, y, kept)
        _pool(state, kept, sums[0], sums[1], sums[2], sums[3], sums[4], sums[5], sums[6], sums[7])


@_compiled()
def add_blocks(a: Bytes, code_a: int, b: Bytes, code_b: int, count: int, state: Doubles) -> None:
    """Add `count` elements of both sides to the state, in blocks."""
    x, y = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
    wide_x, wide_y = np.empty(BLOCK, np.float64), np.empty(BLOCK, np.float64)
    are_bfloats, fit_fp32 = code_a == code_b == _BF16, code_a != _F64 and code_b != _F64
    for start in range(0, count, BLOCK):
        n = min(BLOCK, count - start)
        stop = start + n
        if are_bfloats and _add_in_fp32(a.view(np.uint16)[start:stop], b.view(np.uint16)[start:stop], state):
            continue
        _load(a, code_a, start, n, x, wide_x)
        _load(b, code_b, start, n, y, wide_y)
        if fit_fp32 and not are_bfloats and _add_in_fp32(x[:n], y[:n], state):
            continue
        if code_a != _F64:
            wide_x[:n] = x[:n]
        if code_b != _F64:
            wide_y[:n] = y[:n]
        _add_in_float64(wide_x, wide_y, n, state)


def add_blocks_with_numpy(a: Bytes, code_a: int, b: Bytes, code_b: int, count: int, state: Doubles) -> None:
    """As `add_blocks`, in float64 throughout and without numba. Each row of a table is one block."""
    for start in range(0, count, _TABLE * BLOCK):
        n = min(_TABLE * BLOCK, count - start)
        x, y = _widened(a, code_a, start, n), _widened(b, code_b, start, n)
        whole = n // BLOCK * BLOCK
        for first, stop, width in ((0, whole, BLOCK), (whole, n, n - whole)):
            if first < stop:
                _add_rows(x[first:stop].reshape(-1, width), y[first:stop].reshape(-1, width), state)


def _widened(values: Bytes, code: int, start: int, n: int) -> Doubles:
    """Elements from `start` as float64."""
    if code == _BF16:
        singles = values.view(np.uint16)[start : start + n].astype(np.uint32) << np.uint32(16)
        return singles.view(np.float32).astype(np.float64)
    dtype = {_F16: np.float16, _F32: np.float32, _F64: np.float64}[code]
    return values.view(dtype)[start : start + n].astype(np.float64)


def _add_rows(x: Doubles, y: Doubles, state: Doubles) -> None:
    """Add blocks, the rows of `x` and `y`, to the state, without the positions where a side is not finite."""
    finite = np.isfinite(x) & np.isfinite(y)
    if finite.all():
        for sums in _row_sums(x, y):
            _pool(state, x.shape[1], *sums)
        return
    for row, kept in enumerate(finite):
        count = int(np.count_nonzero(kept))
        state[9] += kept.size - count
        if count:
            for sums in _row_sums(x[row, kept][None], y[row, kept][None]):
                _pool(state, count, *sums)


def _row_sums(x: Doubles, y: Doubles) -> list[list[float]]:
    """What `_float64_sums` gives, of each row."""
    n = x.shape[1]
    with np.errstate(over="ignore", invalid="ignore"):  # squares of float64 may overflow
        mean_x = x[:, 0] + (x - x[:, :1]).sum(1) / n
        mean_y = y[:, 0] + (y - y[:, :1]).sum(1) / n
        u, v, d = x - mean_x[:, None], y - mean_y[:, None], x - y
        sums = (
            mean_x,
            mean_y,
            (u * v).sum(1),
            (u * u).sum(1),
            (v * v).sum(1),
            (d * d).sum(1),
            (x == y).sum(1, dtype=np.float64),
            np.abs(d).max(1),
        )
    rows: list[list[float]] = np.stack(sums, 1).tolist()
    return rows
