"""Quantised weights as float32: what the numbers of each format mean.

Pure arithmetic on tensors; which tensors of a checkpoint belong together is settled in stored_weight.py. Every function
returns a new tensor [..., out, in] on the device of its arguments and raises ValueError for shapes that do not fit.
Widths that have no whole number of values to a 32-bit word are packed as one stream of bits, as GPTQ packs 3 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Blocks of DeepSeek-V3 and of all who store `weight_scale_inv` (arXiv 2412.19437, section 3.3).
DEFAULT_BLOCK = (128, 128)
# The 16 values of E2M1, sign in the highest bit (OCP Microscaling Formats 1.0, section 5.3.3).
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
# AWQ: four bits at shift 4·i of a word hold output column AWQ_ORDER[i] of eight (Lin et al., arXiv 2306.00978, code).
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
E8M0_BIAS = 127


def scaled(
    values: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    block: Sequence[int] | None = None,
    first_row: int = 0,
    total_rows: int | None = None,
) -> Tensor:
    """(values - zero_point) · scale, with one scale for the tensor, for each row, each group or each block.

    `values` [..., out, in] of any type that widens to float32. `scale` and `zero_point`: one number, one for each entry
    of the first axis, or a grid [..., rows, columns] in which each number stands for a block of `block` values. Where
    `block` does not fit, a grid of as many rows (columns) as the values has one for each, a grid of one row one for
    all; else blocks are of 128, or equal parts.
    Where the values are a slice of a matrix of `total_rows`, `first_row` is their first one, and the grid whole.
    """
    result = values.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    if zero_point is not None:
        _on_blocks(result, _numbers(zero_point), block, first_row, total_rows, Tensor.sub_)
    _on_blocks(result, _numbers(scale), block, first_row, total_rows, Tensor.mul_)
    return result


def unpacked(words: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` unsigned `bits`-bit integers of each row of 32-bit words, lowest bits first; int32.

    `words` [..., n] int32 → [..., count].
    """
    if words.dtype != torch.int32 or not 1 <= bits <= 8 or words.shape[-1] * 32 < count * bits:
        raise ValueError(f"{count} values of {bits} bits do not stand in {words.dtype} words {list(words.shape)}")
    mask = 2**bits - 1
    if 32 % bits == 0:
        shifts = torch.arange(0, 32, bits, device=words.device, dtype=torch.int32)
        values: Tensor = (words.unsqueeze(-1) >> shifts) & mask
        return values.flatten(-2)[..., :count]
    starts = torch.arange(count, device=words.device) * bits
    unsigned = torch.nn.functional.pad(words.long() & 0xFFFFFFFF, (0, 1))
    pairs = unsigned[..., starts // 32] | unsigned[..., starts // 32 + 1] << 32
    shifted: Tensor = (pairs >> starts % 32) & mask
    return shifted.int()


def pack_quantised(
    packed: Tensor, scale: Tensor, shape: Sequence[int], bits: int, zero_point: Tensor | None, group_of: Tensor | None
) -> Tensor:
    """compressed-tensors' "pack-quantized": signed integers, stored plus 2^(bits-1) in 32-bit words along the rows.

    `packed` [out, words], `shape` (out, in), `scale` [out, groups] or one number; `zero_point` [out, groups], plain or
    packed along the outputs; `group_of` [in] the group of each column where activation order mixed them.
    """
    out, columns = shape
    middle = 2 ** (bits - 1)
    values = unpacked(packed, bits, columns) - middle
    groups = scale.shape[-1] if scale.dim() > 1 else 1
    if zero_point is not None and zero_point.dtype == torch.int32:
        zero_point = unpacked(zero_point.T.contiguous(), bits, out).T - middle
    if group_of is not None and bool((group_of >= 0).all()):  # -1: the columns were never mixed
        group_of = _checked_groups(group_of, columns, groups)
        return scaled(values, scale[:, group_of], None if zero_point is None else zero_point[:, group_of])
    return scaled(values, scale, zero_point, (1, _equal_parts(columns, groups)))


def gptq(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, group_of: Tensor | None, bits: int, zero_offset: int
) -> Tensor:
    """GPTQ: `qweight` [in·bits/32, out], `qzeros` [groups, out·bits/32], `scales` [groups, out] → [out, in].

    w = scale · (q - z). `zero_offset`: 1 for the first format, which stores z - 1 (modulo 2^bits), 0 for "gptq_v2".
    """
    out = scales.shape[1]
    values = unpacked(qweight.T.contiguous(), bits, qweight.shape[0] * 32 // bits)
    zeros = (unpacked(qzeros, bits, out) + zero_offset) & (2**bits - 1)
    columns = values.shape[1]
    if group_of is None:
        group_of = torch.arange(columns, device=values.device) // _equal_parts(columns, scales.shape[0])
    group_of = _checked_groups(group_of, columns, scales.shape[0])
    return scaled(values, scales.T[:, group_of], zeros.T[:, group_of])


def awq(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
    """AWQ (GEMM): `qweight` [in, out/8], `qzeros` [groups, out/8], `scales` [groups, out] → [out, in], 4 bits."""
    out = scales.shape[1]
    order = torch.tensor(AWQ_ORDER, device=qweight.device).argsort()
    values, zeros = (unpacked(one, 4, out).reshape(len(one), -1, 8)[..., order].flatten(1) for one in (qweight, qzeros))
    part = _equal_parts(values.shape[0], scales.shape[0])
    return scaled(values.T, scales.T, zeros.T, (1, part))


def four_bit_floats(packed: Tensor) -> Tensor:
    """Two E2M1 numbers to a byte, the lower four bits first: uint8 [..., n] → float32 [..., 2n]."""
    if packed.dtype != torch.uint8:
        raise ValueError(f"four-bit floats are stored as uint8, not {packed.dtype}")
    values = torch.tensor(E2M1, device=packed.device)
    result = torch.empty((*packed.shape, 2), device=packed.device)
    result[..., 0] = values[(packed & 15).int()]
    result[..., 1] = values[(packed >> 4).int()]
    return result.flatten(-2)


def mxfp4(blocks: Tensor, exponents: Tensor) -> Tensor:
    """MXFP4 as gpt-oss stores it: `blocks` [..., out, groups, 16] bytes, `exponents` [..., out, groups].

    w = E2M1 · 2^(exponent - 127), 32 numbers to a group (OCP Microscaling Formats 1.0).
    """
    if blocks.shape[:-1] != exponents.shape:
        raise ValueError(f"blocks {list(blocks.shape)} have not the groups of exponents {list(exponents.shape)}")
    values = four_bit_floats(blocks)
    return torch.ldexp(values, (exponents.int() - E8M0_BIAS).unsqueeze(-1)).flatten(-2)


def _numbers(scale: Tensor) -> Tensor:
    """A scale as float32; bytes are exponents of two (E8M0)."""
    if scale.dtype == torch.uint8:
        return torch.ldexp(torch.ones_like(scale, dtype=torch.float32), scale.int() - E8M0_BIAS)
    return scale.to(torch.float32)


def _checked_groups(group_of: Tensor, columns: int, groups: int) -> Tensor:
    """Indices of groups; an index beyond them would end a CUDA process."""
    if group_of.shape != (columns,) or not bool(((group_of >= 0) & (group_of < groups)).all()):
        raise ValueError(f"{list(group_of.shape)} columns have a group, some beyond {groups}; {columns} have values")
    return group_of.long()


def _equal_parts(length: int, parts: int) -> int:
    if parts == 0 or length % parts:
        raise ValueError(f"{length} values cannot be {parts} groups of equal size")
    return length // parts


def _on_blocks(
    values: Tensor,
    grid: Tensor,
    block: Sequence[int] | None,
    first_row: int,
    total_rows: int | None,
    operation: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """values ← operation(values, number of its block), in place."""
    rows, columns = values.shape[-2:]
    if grid.numel() == 1:
        operation(values, grid.reshape(()))
        return
    if grid.dim() == 1:  # one number for each row, or for each matrix of a stack
        grid = grid.view(-1, *(1,) * (values.dim() - 1))
    if grid.dim() != values.dim() or grid.shape[:-2] not in (values.shape[:-2], (1,) * (grid.dim() - 2)):
        raise ValueError(f"scales {list(grid.shape)} fit no values {list(values.shape)}")
    height = _block_size(total_rows or first_row + rows, grid.shape[-2], None if block is None else block[0])
    width = _block_size(columns, grid.shape[-1], None if block is None else block[1])
    for number in range(first_row // height, -(-(first_row + rows) // height)) if height > 1 else (None,):
        if number is None:
            part, line = values, grid[..., first_row : first_row + rows, :]
        else:
            start, stop = max(number * height - first_row, 0), min((number + 1) * height - first_row, rows)
            part, line = values[..., start:stop, :], grid[..., number : number + 1, :]
        if width == 1 or width >= columns:
            operation(part, line)
        elif columns % width == 0:
            operation(part.view(*part.shape[:-1], -1, width), line.unsqueeze(-1))
        else:
            operation(part, line.repeat_interleave(width, -1)[..., :columns])


def _block_size(length: int, count: int, stated: int | None) -> int:
    """How many values in a row (column) share one of `count` numbers."""
    for size in (stated, 1, DEFAULT_BLOCK[0]):
        if size and -(-length // size) == count:
            return size
    if count == 1:
        return max(length, 1)
    return _equal_parts(length, count)
