"""Which tensors could any model have? Judged by content alone, since names can lie."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from checks.statistics.common_sequence import may_repeat_a_sequence, repeats_a_smooth_sequence

# Least information, in bits, that can tell two models apart.
MINIMUM_BITS = 64.0
# Share of zeros from which a non-negative tensor is a filter bank or a one-hot table.
SPARSE_SHARE = 0.9
# Shortest line that can be said to follow a recurrence.
SHORTEST_LINE = 8
# Residual of the recurrence in all lines together, relative to what it explains. Noise has about 1, tables below 0.03.
RECURRENCE_RESIDUAL = 0.1
# Most elements of a tensor's beginning that are looked at before the whole of it.
LARGEST_HEAD = 1 << 22

_BLOCK = 1 << 20
_SAMPLE = 1 << 16
_SAMPLE_LINES = 4
_HEAD_LINES = 16
_SAMPLE_LENGTH = 4096
_FLOAT32_ROUNDOFF = 2.0**-24


def ordinary_reason(tensor: Tensor) -> str | None:
    """Why could any model hold this tensor, whatever it was trained on? A short reason, or None if it could not.

    `tensor`: any shape and dtype; packed floats are read as bytes. Ordinary are, in the order of the tests:

    - empty, boolean, all NaN, constant, or of two distinct values (masks);
    - of fewer than 64 bits: n elements x empirical entropy of the values (or of its integer codes, as they are);
    - vectors (size-1 axes ignored) that never fall or never rise: rotary inverse frequencies, positions, slopes;
    - non-negative with at least 90 % zeros: filter banks, one-hot tables;
    - matrices with more than half of their energy on the main diagonal (initialised as an identity);
    - every line along some axis, of at least 8 elements, follows x[t+1] + x[t-1] = c·x[t] + k with c and k of its own:
      sequences that are constant, linear or geometric, sinusoids (position tables, rotary caches, DFT and DCT bases,
      Hann windows). c and k are the least-squares fit. Two conditions: in every line the residual is within what
      rounding to the dtype and a float32 angle leave; in all lines together its rms is at most 0.1 of the rms of the
      centred left side (so that a norm vector near 1, whose whole spread is a few roundings, is not taken for smooth);
    - tables [g², d] whose every column is constant along one axis of the g x g grid: 2-D sinusoidal positions;
    - tables whose rows, or columns, repeat one smooth sequence of 32 values or more up to what training changed: the
      states of state-space models, decays (see `repeats_a_smooth_sequence`).

    All-zero rows at the ends of a table (padding, a class token) are left out of the last three.

    The first elements and lines are tried first, but they can only end the search: whatever is called ordinary was read
    in full. NaN counts as one more value; non-finite values exclude the last five tests. Known misses: tables whose
    angles were computed below float32, cosines and sines concatenated along the only regular axis.
    Source: this suite; `identity.sha256` lists such tensors and does not count them.
    """
    tensor = _readable(tensor.detach())
    if tensor.numel() == 0:
        return "empty"
    if tensor.dtype == torch.bool:
        return "boolean"
    flat = tensor.reshape(-1)
    sample = flat[:_SAMPLE]
    if _few_values(sample):
        reason = _few_values(flat)
        if reason:
            return reason
    if not _has_information(flat[:1024]) and not _has_information(flat):
        return f"fewer than {MINIMUM_BITS:.0f} bits of information"
    if not bool(sample.isfinite().all()):
        return None
    if _monotone_shape(tensor) and _is_monotone(sample) and bool(flat.isfinite().all()) and _is_monotone(flat):
        return "monotone vector"
    if bool((sample >= 0).all()) and _is_sparse(flat):
        return f"non-negative with at least {SPARSE_SHARE:.0%} zeros"
    if _is_mostly_diagonal(tensor):
        return "most of its energy lies on the main diagonal (initialised as an identity)"
    for table in (tensor, _without_padding_rows(tensor)):
        for axis in range(table.dim()):
            if table.shape[axis] >= SHORTEST_LINE and _follows_recurrence(table, axis):
                return f"every line along axis {axis} is a sinusoidal, geometric or linear sequence"
        if _is_position_grid(table):
            return "every column depends on the row or on the column of a square grid alone"
        along = repeats_a_smooth_sequence(table) if table.dim() == 2 else None
        if along is not None:
            return f"its {'rows' if along else 'columns'} repeat one smooth sequence, up to small deviations"
    return None


def head_elements(shape: Sequence[int]) -> int:
    """How many of a tensor's first elements does `may_be_ordinary` need? 65,536, or eight rows if these are more.

    A table that may lie on a square grid needs the first line of the grid. 4 million at most; no more than there are.
    """
    shape = [size for size in shape if size != 1]
    rows = SHORTEST_LINE
    if len(shape) == 2 and (side := max(map(_side, (shape[0], shape[0] - 1)))):
        rows = max(rows, side + 2)  # with a class token before the grid
    wanted = max(_SAMPLE, rows * shape[-1]) if shape else 1
    return min(math.prod(shape), wanted, LARGEST_HEAD)


def may_be_ordinary(head: Tensor, shape: Sequence[int], if_unseen: bool = False) -> bool:
    """Could `ordinary_reason` call a tensor ordinary, as far as its beginning tells?

    `head`: flat, the first `head_elements(shape)` elements of the tensor of that shape. False: the tensor is not
    ordinary, since the beginning of a sequence, a mask or a table is one too, and that of trained weights is none.
    True: the whole tensor must be looked at; trained vectors and positive tensors often get it, matrices do not.
    `if_unseen`: the answer where the beginning is too short to tell: for sequences along the first axes of a stack of
    matrices, and matrices whose rows are longer than half a million elements.
    Known misses: square grids that end in rows of zeros, and what only dwarfed values at the beginning would betray.
    """
    if head.numel() == 0 or head.dtype == torch.bool or head.is_complex():
        return True
    head = _readable(head.detach().reshape(-1))
    sample = head[:_SAMPLE]
    if _few_values(sample) is not None or not _has_information(head[:1024]):
        return True
    if not bool(sample.isfinite().all()):
        return False
    shape = [size for size in shape if size != 1]
    if bool((sample >= 0).all()) or (len(shape) < 2 and _is_monotone(sample)):
        return True
    if len(shape) < 2:
        return _begins_a_sequence(sample[None], 1)
    rows = head[: head.numel() // shape[-1] * shape[-1]].reshape(-1, shape[-1])[: shape[-2]]
    if not len(rows):
        return if_unseen
    unseen = any(size >= SHORTEST_LINE for size in shape[:-2])
    tables = [(rows, shape[-2])]
    if len(shape) == 2:
        if min(shape) >= SHORTEST_LINE:
            first = rows[:SHORTEST_LINE].double()
            unseen |= len(first) < SHORTEST_LINE
            if float(first.diagonal().square().sum()) > 0.5 * float(first.square().sum()):
                return True
        used = (rows != 0).any(1).nonzero()
        padding = int(used[0]) if len(used) else len(rows)
        tables = [(rows[zeros:], shape[0] - zeros) for zeros in sorted({0, padding})]
    for table, length in tables:
        if len(shape) == 2 and may_repeat_a_sequence(table, length):
            return True
        side = _side(length) if len(shape) == 2 else 0
        unseen |= bool(side) and len(table) <= side
        if side and len(table) > side and _begins_a_position_grid(table, side):
            return True
        for axis, size in enumerate((length, shape[-1])):
            if size >= SHORTEST_LINE:
                unseen |= table.shape[axis] < SHORTEST_LINE
                if table.shape[axis] >= SHORTEST_LINE and _begins_a_sequence(table, axis):
                    return True
    return unseen and if_unseen


def _begins_a_sequence(rows: Tensor, axis: int) -> bool:
    """Do the first lines along an axis follow the recurrence, within twice what rounding leaves?"""
    lines = rows.movedim(axis, -1)[:_HEAD_LINES, :_SAMPLE_LENGTH]
    if not bool(lines.isfinite().all()):
        return False
    amplitude = float(torch.stack(lines.aminmax()).double().abs().max())
    roundoff, step = _unit_roundoff(lines)
    within, _, _ = _fit(lines, 2 * roundoff, 2 * step, 16 * _FLOAT32_ROUNDOFF * lines.shape[1] * amplitude)
    return bool(within)


def _begins_a_position_grid(rows: Tensor, side: int) -> bool:
    """Is each column constant over the first line of a grid, or the same where the second begins?"""
    across = (rows[:side] == rows[:1]).all(0)
    down = (rows[side:] == rows[:-side]).all(0)
    return bool((across | down).all())


def _side(rows: int) -> int:
    """The side of a square grid of so many positions, at least 4; 0 if there is none."""
    side = math.isqrt(max(0, rows))
    return side if side >= 4 and side * side == rows else 0


def _is_mostly_diagonal(tensor: Tensor) -> bool:
    """Do the diagonal's squares make up more than half of all? Identity initialisation does, in any model."""
    if tensor.dim() != 2 or min(tensor.shape) < SHORTEST_LINE:
        return False
    diagonal = float(tensor.diagonal().double().square().sum())
    # A block of the first rows holds the diagonal's share of a matrix that is not diagonal, and ends the search.
    first = tensor[:SHORTEST_LINE].double()
    if float(first.diagonal().square().sum()) <= 0.5 * float(first.square().sum()):
        return False
    total = sum(float(piece.double().square().sum()) for piece in _pieces(tensor.reshape(-1)))
    return diagonal > 0.5 * total


def _without_padding_rows(tensor: Tensor) -> Tensor:
    """The table [n, d] in a tensor of that shape (size-1 axes ignored), less all-zero rows at its ends."""
    table = tensor.squeeze()
    if table.dim() != 2:
        return tensor
    used = (table != 0).any(1).nonzero()
    return table[int(used[0]) : int(used[-1]) + 1] if len(used) else tensor


def _is_position_grid(table: Tensor) -> bool:
    """Is this a table of positions on a square grid, flattened: each column constant along one of its two axes?"""
    if table.dim() != 2 or math.isqrt(table.shape[0]) ** 2 != table.shape[0] or table.shape[0] < 16:
        return False
    side = math.isqrt(table.shape[0])

    def constant_along_one(columns: Tensor) -> bool:
        grid = columns.reshape(side, side, -1)
        down, across = (grid == grid[:1]).flatten(0, 1).all(0), (grid == grid[:, :1]).flatten(0, 1).all(0)
        return bool((down | across).all())

    return constant_along_one(table[:, :4]) and constant_along_one(table)


def _readable(tensor: Tensor) -> Tensor:
    """The same values in a dtype that comparisons support."""
    if tensor.is_complex():
        return torch.view_as_real(tensor.resolve_conj())
    if tensor.dtype == torch.float4_e2m1fn_x2:
        return tensor.view(torch.uint8)
    if tensor.dtype.is_floating_point and tensor.element_size() == 1:
        return tensor.float()
    if tensor.dtype in (torch.uint16, torch.uint32, torch.uint64):
        return tensor.to(torch.int64)
    return tensor


def _pieces(flat: Tensor, size: int = _BLOCK) -> Iterator[Tensor]:
    for start in range(0, flat.shape[0], size):
        yield flat[start : start + size]


def _few_values(flat: Tensor) -> str | None:
    """Reason if there are at most two distinct values, counting NaN as one."""
    nan = flat.isnan()
    missing = bool(nan.any())
    numbers = flat[~nan] if missing else flat
    if numbers.numel() == 0:
        return "all NaN"
    low, high = numbers.aminmax()
    if bool(low == high):
        return "only two distinct values" if missing else "constant"
    if not missing and all(bool(((piece == low) | (piece == high)).all()) for piece in _pieces(numbers)):
        return "only two distinct values"
    return None


def _has_information(flat: Tensor) -> bool:
    """Is n x entropy at least 64 bits?

    Entropy is concave, so the bits of some pieces alone are a lower bound: reading stops when they suffice.
    """
    counts: dict[float, float] = {}
    bits = 0.0
    for piece in _pieces(flat, _SAMPLE):
        low, high = piece.aminmax()
        if bool(low == high):
            counts[low.item()] = counts.get(low.item(), 0.0) + piece.numel()
            continue
        if piece.dtype.is_floating_point:
            piece = torch.where(piece.isnan(), math.inf, piece)  # all NaN are one value
        values, times = torch.unique(piece, return_counts=True)
        times = times.double()
        bits += float((times * (piece.numel() / times).log2()).sum())
        if bits >= MINIMUM_BITS:
            return True
        for value, count in zip(values.tolist(), times.tolist(), strict=True):
            counts[value] = counts.get(value, 0.0) + count
    n = flat.numel()
    return math.fsum(count * math.log2(n / count) for count in counts.values()) >= MINIMUM_BITS


def _monotone_shape(tensor: Tensor) -> bool:
    return max(tensor.shape) == tensor.numel()


def _is_monotone(flat: Tensor) -> bool:
    left, right = flat[:-1], flat[1:]
    return bool((left <= right).all()) or bool((left >= right).all())


def _is_sparse(flat: Tensor) -> bool:
    zeros = torch.zeros((), dtype=torch.int64, device=flat.device)
    negative = torch.zeros((), dtype=torch.bool, device=flat.device)
    for piece in _pieces(flat):
        zeros += (piece == 0).sum()
        negative |= ~(piece >= 0).all()  # NaN is not >= 0 either
    return not bool(negative) and int(zeros) >= SPARSE_SHARE * flat.numel()


def _unit_roundoff(tensor: Tensor) -> tuple[float, float]:
    """Relative rounding of the narrowest dtype that holds all values, and half its smallest step."""
    if not tensor.dtype.is_floating_point:
        return _FLOAT32_ROUNDOFF, 0.0
    for narrow in (torch.bfloat16, torch.float16, torch.float32):
        if tensor.dtype == narrow or bool((tensor.to(narrow).to(tensor.dtype) == tensor).all()):
            info = torch.finfo(narrow)
            return info.eps / 2, info.smallest_normal * info.eps / 2
    info = torch.finfo(torch.float64)
    return info.eps / 2, info.smallest_normal * info.eps / 2


def _follows_recurrence(tensor: Tensor, axis: int) -> bool:
    length = tensor.shape[axis]
    lines = tensor.movedim(axis, -1)
    corner = [slice(_SAMPLE_LINES)] * (tensor.dim() - 1) + [slice(_SAMPLE_LENGTH)]
    sample = lines[tuple(corner)].reshape(-1, min(length, _SAMPLE_LENGTH))
    amplitude = float(torch.stack(tensor.aminmax()).double().abs().max())
    if not math.isfinite(amplitude):
        return False
    # The angles ωt, ω ≤ π, of a table are rounded to float32 before the sine; the error grows with the position.
    angle = 8 * _FLOAT32_ROUNDOFF * length * amplitude
    within, _, _ = _fit(sample, *_unit_roundoff(sample), angle)
    if not bool(within):
        return False

    lines = tensor.movedim(axis, -1).reshape(-1, length)
    roundoff, step = _unit_roundoff(tensor)
    residual = torch.zeros((), dtype=torch.float64, device=tensor.device)
    variation = residual.clone()
    for group in _pieces(lines, max(1, _BLOCK // length)):
        within, squares, total = _fit(group, roundoff, step, angle)
        if not bool(within):
            return False
        residual += squares
        variation += total
    return bool(residual <= RECURRENCE_RESIDUAL**2 * variation)


def _fit(lines: Tensor, roundoff: float, step: float, angle: float) -> tuple[Tensor, Tensor, Tensor]:
    """Is the residual of every line within rounding? And its squares, and those of the centred left side, summed.

    A residual is the sum of two roundings and of c ≤ 2 times a third, each at most roundoff·|x|.
    """
    x = lines.double()
    left, middle, right = x[:, :-2], x[:, 1:-1], x[:, 2:]
    scale = (left.square() + 4 * middle.square() + right.square()).mean(1).sqrt()
    y = left + right
    y = y - y.mean(1, keepdim=True)
    middle = middle - middle.mean(1, keepdim=True)
    square = middle.square().sum(1, keepdim=True)
    slope = torch.where(square > 0, (middle * y).sum(1, keepdim=True) / square, 0.0)
    residual = (y - slope * middle).square().sum(1)
    tolerance = 2 * (roundoff * scale + 2.5 * step) + angle
    within = (residual <= tolerance.square() * y.shape[1]).all()
    return within, residual.sum(), y.square().sum()
