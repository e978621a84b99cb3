"""Element-wise sums straight from the stored bytes of two tensors, on a GPU: float64, and read back once.

The functions run on any torch device, so that they are tested where there is no GPU.
"""

from __future__ import annotations

from collections import deque
from functools import cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from checks.statistics.elementwise import ElementwiseSums, pool_rows
from checks.statistics.kernel_cpu import BLOCK, TORCH_DTYPES

# Pieces whose sums the device may still owe before more are copied to it: bounds its memory.
PIECES_IN_FLIGHT = 4

# A GPU adds up the rows of a matrix in another order if there are fewer.
FEWEST_ROWS = 16


def gpu(device: str) -> str:
    """A CUDA device by its full name: "cuda" becomes "cuda:0", or what the calling thread's current device is.

    Raises ValueError for other devices: they have no page-locked memory, or no float64.
    """
    wanted = torch.device(device)
    if wanted.type != "cuda":
        raise ValueError(f"tensors are compared on cpu or cuda, not on {device}")
    return device if wanted.index is not None else f"cuda:{torch.cuda.current_device()}"


def pinned_memory(size: int) -> npt.NDArray[np.uint8]:
    """`size` bytes of page-locked memory, from which a GPU copies without a detour and without the CPU waiting.

    torch keeps page-locked memory for the next caller once it is dropped, and rounds sizes up to powers of two.
    """
    memory: npt.NDArray[np.uint8] = torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
    return memory


class DevicePieceSums:
    """The sums of two tensors whose bytes come in pieces, computed on `device`: "cuda:<index>" or "cpu".

    `dtype_a`, `dtype_b`: BF16, F16, F32 or F64, little-endian, as safetensors stores them. Every block of 2048 elements
    is computed in float64 and leaves ten numbers on the device (2 % of the bytes of bfloat16), which are read once, by
    `result`. Pieces of whole blocks, whatever their number, give the same sums to the last bit. Copies to a GPU run on
    one stream and sums on another, so that a piece is summed while the next is copied.
    Raises TypeError for other dtypes.
    """

    def __init__(self, dtype_a: str, dtype_b: str, device: str) -> None:
        for dtype in (dtype_a, dtype_b):
            if dtype not in TORCH_DTYPES:
                raise TypeError(f"{dtype} is not compared: expected {', '.join(TORCH_DTYPES)}; dequantise first")
        self._dtypes = (TORCH_DTYPES[dtype_a], TORCH_DTYPES[dtype_b])
        self._device = torch.device(device)
        self._rows: list[Tensor] = []
        self._in_flight: deque[torch.cuda.Event] = deque()

    def add(self, a: memoryview, b: memoryview) -> None:
        """The next elements of both. The memory may be used for something else once this returns; the sums may not be
        ready by then. Raises ValueError for pieces that do not hold equally many whole elements.
        """
        sizes = [dtype.itemsize for dtype in self._dtypes]
        count = len(a) // sizes[0]
        if (len(a), len(b)) != (count * sizes[0], count * sizes[1]):
            raise ValueError(
                f"{len(a)} and {len(b)} bytes are not equally many {self._dtypes[0]} and {self._dtypes[1]}"
            )
        if not count:
            return
        host = [torch.from_numpy(np.frombuffer(piece, np.uint8)) for piece in (a, b)]
        if self._device.type == "cuda":
            self._add_on_gpu(host)
        else:
            self._rows.append(self._blocks([piece.clone() for piece in host]))

    def result(self) -> ElementwiseSums:
        """The sums of all that was added. Waits for the device."""
        if not self._rows:
            return ElementwiseSums()
        if self._device.type == "cuda":
            with torch.cuda.stream(_streams(self._device)[1]):
                table = torch.cat(self._rows).cpu()
        else:
            table = torch.cat(self._rows)
        return pool_rows(table)

    def _add_on_gpu(self, host: list[Tensor]) -> None:
        if len(self._in_flight) >= PIECES_IN_FLIGHT:
            self._in_flight.popleft().synchronize()
        copying, summing = _streams(self._device)
        copied, summed = torch.cuda.Event(), torch.cuda.Event()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(copying):
            pieces = [piece.to(self._device, non_blocking=True) for piece in host]
            copied.record(copying)
        with torch.cuda.stream(summing):
            summing.wait_event(copied)
            for piece in pieces:
                piece.record_stream(summing)  # or its memory would be free for the next copy too soon
            self._rows.append(self._blocks(pieces))
            summed.record(summing)
        self._in_flight.append(summed)
        # Only now may the host's memory change. Other threads run meanwhile: waiting holds no GIL.
        copied.synchronize()

    def _blocks(self, pieces: list[Tensor]) -> Tensor:
        return piece_sums(pieces[0].view(self._dtypes[0]), pieces[1].view(self._dtypes[1]))


def piece_sums(a: Tensor, b: Tensor) -> Tensor:
    """Of each block of 2048 elements, the last of which may be shorter, the ten numbers of `pool_rows`: [blocks, 10].

    `a`, `b`: flat, equally long, on one device, which computes without the CPU ever waiting for it. Positions where
    either is not finite are left out, and counted. Without others all is 0.
    """
    whole = a.numel() // BLOCK * BLOCK
    return torch.cat(
        [
            _row_sums(a[start:stop].view(-1, width), b[start:stop].view(-1, width))
            for start, stop, width in ((0, whole, BLOCK), (whole, a.numel(), a.numel() - whole))
            if start < stop
        ]
    )


def _row_sums(a: Tensor, b: Tensor) -> Tensor:
    """The ten numbers of each row of two matrices."""
    rows = a.shape[0]
    if rows < FEWEST_ROWS:
        a, b = (torch.nn.functional.pad(each, (0, 0, 0, FEWEST_ROWS - rows)) for each in (a, b))
    x, y = a.double(), b.double()
    finite = x.isfinite() & y.isfinite()
    zero = torch.zeros((), dtype=torch.float64, device=x.device)
    x, y = x.where(finite, zero), y.where(finite, zero)
    n = finite.sum(1, dtype=torch.float64)
    positions = n.clamp(min=1)
    difference = x - y
    unequal = difference.count_nonzero(1).double()
    largest = difference.abs().amax(1)
    squared_difference = difference.square().sum(1)
    mean_x, mean_y = x.sum(1) / positions, y.sum(1) / positions
    # What was left out must not deviate from the mean.
    x, y = (x - mean_x[:, None]).where(finite, zero), (y - mean_y[:, None]).where(finite, zero)
    return torch.stack(
        [
            n,
            mean_x,
            mean_y,
            (x * y).sum(1),
            x.square().sum(1),
            y.square().sum(1),
            squared_difference,
            n - unequal,
            largest,
            x.shape[1] - n,
        ],
        1,
    )[:rows]


@cache
def _streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """The stream for copies and the stream for sums of a GPU, which all threads share."""
    return torch.cuda.Stream(device), torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
