"""Element-wise comparison of two tensors of equal size: one pass, float64 sums in blocks."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Elements of one block: two blocks in float64 stay in a CPU's cache; a GPU needs few launches.
CPU_BLOCK = 1 << 17
GPU_BLOCK = 1 << 24


@dataclass(frozen=True)
class ElementwiseSums:
    """Sums over the positions where both tensors `a` and `b` are finite.

    Raw sums: `n` positions, `sum_a`, `sum_b`, `dot` = Σab, `square_a` = Σa², `square_b` = Σb², `squared_difference` =
    Σ(a-b)², `equal` positions with a = b (-0 equals 0), `max_difference` = max|a-b| (0 without positions).
    `nonfinite` counts the positions left out because either side is NaN or infinite: where it is not 0, the other
    numbers do not speak for the whole tensor, `max_difference` included.
    Centred sums: `centred_dot` = Σ(a-ā)(b-b̄), `centred_square_a` = Σ(a-ā)², `centred_square_b` = Σ(b-b̄)².

    `x + y` and `concatenate` give the sums of the concatenated tensors, centred by the common mean; `pool_centred`
    leaves every tensor centred by its own mean. A result of `pool_centred` must not go into `+` or `concatenate`.
    """

    n: int = 0
    sum_a: float = 0.0
    sum_b: float = 0.0
    dot: float = 0.0
    square_a: float = 0.0
    square_b: float = 0.0
    squared_difference: float = 0.0
    equal: int = 0
    max_difference: float = 0.0
    nonfinite: int = 0
    centred_dot: float = 0.0
    centred_square_a: float = 0.0
    centred_square_b: float = 0.0

    def __add__(self, other: ElementwiseSums) -> ElementwiseSums:
        """Sums of the concatenation of both; the same as `concatenate([self, other])`."""
        return concatenate([self, other])

    def as_json(self) -> dict[str, int | str]:
        """The sums for a file: floats in hexadecimal, of which no bit is lost, infinite ones included."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value.hex() if isinstance(value, float) else value for name, value in values.items()}

    @classmethod
    def from_json(cls, stored: Mapping[str, int | str]) -> ElementwiseSums:
        """The sums that `as_json` wrote. Raises ValueError, KeyError or TypeError for anything else."""
        values: dict[str, Any] = {
            field.name: int(stored[field.name]) if field.type == "int" else float.fromhex(str(stored[field.name]))
            for field in fields(cls)
        }
        return cls(**values)

    @property
    def cosine(self) -> float | None:
        """Raw cosine Σab / (‖a‖‖b‖) in [-1, 1]; None if either vector is zero or empty.

        It must not decide on tensors whose mean is not zero: two independent vectors N(1, .01²) have .9999.
        """
        return _cosine(self.dot, self.square_a, self.square_b)

    @property
    def centred_cosine(self) -> float | None:
        """Cosine of the centred tensors (Pearson's r after `concatenate`) in [-1, 1]; None if either is constant.

        For independent tensors of n exchangeable elements the mean is 0 and the sd 1/sqrt(n - 1).
        """
        if _is_constant(self.centred_square_a, self.sum_a, self.n):
            return None
        if _is_constant(self.centred_square_b, self.sum_b, self.n):
            return None
        return _cosine(self.centred_dot, self.centred_square_a, self.centred_square_b)

    @property
    def mean_squared_error(self) -> float | None:
        """Σ(a-b)²/n, in squared units of the weights; None without positions."""
        return self.squared_difference / self.n if self.n else None

    @property
    def relative_mean_squared_error(self) -> float | None:
        """Scale-free mean squared error Σ(a-b)² / (½Σ(a-ā)² + ½Σ(b-b̄)²).

        0 when equal, 2 when uncorrelated with equal means, 4 when b = -a; above that only if the means differ. Scaling
        both tensors by one factor leaves it unchanged. None without positions, or if both are constant and differ.
        """
        if not self.n:
            return None
        if self.squared_difference == 0:
            return 0.0
        if _is_constant(self.centred_square_a, self.sum_a, self.n) and _is_constant(
            self.centred_square_b, self.sum_b, self.n
        ):
            return None
        return _ratio(self.squared_difference, 0.5 * (self.centred_square_a + self.centred_square_b))

    @property
    def l2_distance(self) -> float:
        """‖a-b‖, in units of the weights."""
        return math.sqrt(self.squared_difference)

    @property
    def norm_ratio(self) -> float | None:
        """‖a‖/‖b‖; None if b is zero or empty."""
        return _ratio(math.sqrt(self.square_a), math.sqrt(self.square_b))


def elementwise_sums(a: Tensor, b: Tensor) -> ElementwiseSums:
    """All sums that compare two tensors position by position.

    `a`, `b`: tensors of equal numel and of any floating-point dtypes, on one device. Everything is computed in float64
    (exact products of float32 and narrower), in blocks, so that extra memory is bounded whatever the size: about 3 MiB
    on a CPU, 0.4 GiB on a GPU (contiguous tensors, or equal shapes). |a-b|² is summed directly, never as aa + bb - 2ab.
    Co-moments are centred in each block and pooled after Chan, Golub, LeVeque 1979 (STAN-CS-79-773), eq. 2.1, so they
    hold where the mean is far larger than the spread. Squares overflow only for float64 values beyond 1e150, and the
    cosines are then None. The device is read once, and once more if a block held non-finite values.

    Raises ValueError if the sizes differ; TypeError for integer, bool, complex and sub-byte dtypes, whose codes are no
    numbers to compare.
    """
    for tensor in (a, b):
        if not tensor.dtype.is_floating_point or tensor.dtype == torch.float4_e2m1fn_x2:
            raise TypeError(f"{tensor.dtype} is not compared: packed integers are never compared; dequantise first")
    if a.numel() != b.numel():
        raise ValueError(f"tensors of shape {tuple(a.shape)} and {tuple(b.shape)} have no common positions")
    a, b = a.detach(), b.detach()
    size = CPU_BLOCK if a.device.type == "cpu" else GPU_BLOCK

    # Allocating blocks anew costs more than the sums: three buffers serve them all.
    space = torch.empty(3, min(size, a.numel()), dtype=torch.float64, device=a.device)
    rows = [_block_sums(x, y, space[:, : x.numel()]) for x, y in _blocks(a, b, size)]
    if not rows:
        return ElementwiseSums()
    table = torch.stack(rows).cpu()
    # A non-finite value makes a sum of its block non-finite: only then is there anything to mask.
    suspect = set(table[:, 1:3].sum(1).isfinite().logical_not().nonzero().flatten().tolist())
    if suspect:
        masked = [
            _masked_block_sums(x, y, space[:, : x.numel()])
            for index, (x, y) in enumerate(_blocks(a, b, size))
            if index in suspect
        ]
        table[sorted(suspect)] = torch.stack(masked).cpu()
    return pool_rows(table)


def concatenate(parts: Iterable[ElementwiseSums]) -> ElementwiseSums:
    """Sums of the concatenation of all parts: as if they were one pair of tensors with one common mean.

    Right for pieces of one tensor. Use `pool_centred` for several tensors. No parts: all sums 0.
    """
    parts = [part for part in parts if part.n or part.nonfinite]
    pooled = pool_centred(parts)
    if pooled.n == 0:
        return pooled
    mean_a, mean_b = pooled.sum_a / pooled.n, pooled.sum_b / pooled.n
    offsets = [(p.n, p.sum_a / p.n - mean_a, p.sum_b / p.n - mean_b) for p in parts if p.n]
    return replace(
        pooled,
        centred_dot=pooled.centred_dot + math.fsum(n * u * v for n, u, v in offsets),
        centred_square_a=pooled.centred_square_a + math.fsum(n * u * u for n, u, _ in offsets),
        centred_square_b=pooled.centred_square_b + math.fsum(n * v * v for n, _, v in offsets),
    )


def pool_centred(parts: Iterable[ElementwiseSums]) -> ElementwiseSums:
    """Sums over several tensors, each centred by its own mean: all co-moments just add.

    Right for tensors of different layers or roles, whose different means (norms near 1 beside projections near 0) would
    otherwise correlate by themselves. No parts: all sums 0.
    """
    parts = list(parts)

    def total(field: str) -> float:
        return math.fsum(getattr(part, field) for part in parts)

    return ElementwiseSums(
        n=sum(part.n for part in parts),
        sum_a=total("sum_a"),
        sum_b=total("sum_b"),
        dot=total("dot"),
        square_a=total("square_a"),
        square_b=total("square_b"),
        squared_difference=total("squared_difference"),
        equal=sum(part.equal for part in parts),
        max_difference=max((part.max_difference for part in parts), default=0.0),
        nonfinite=sum(part.nonfinite for part in parts),
        centred_dot=total("centred_dot"),
        centred_square_a=total("centred_square_a"),
        centred_square_b=total("centred_square_b"),
    )


def _blocks(a: Tensor, b: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Flat pieces of both tensors in the same order, of at most `size` elements, without copying a whole tensor."""
    if a.numel() == 0:
        return
    if (a.is_contiguous() and b.is_contiguous()) or a.shape != b.shape or a.dim() < 2:
        yield from zip(torch.split(a.reshape(-1), size), torch.split(b.reshape(-1), size), strict=True)
        return
    lines = max(1, size // (a.numel() // a.shape[0]))
    for x, y in zip(torch.split(a, lines), torch.split(b, lines), strict=True):
        yield from zip(torch.split(x.reshape(-1), size), torch.split(y.reshape(-1), size), strict=True)


def _block_sums(a: Tensor, b: Tensor, space: Tensor) -> Tensor:
    """Row of n, both means, three centred co-moments, Σ(a-b)², equal, max|a-b|, non-finite.

    `a`, `b`: flat blocks of n elements. `space`: float64 [3, n], overwritten.
    """
    x, y, difference = space.unbind(0)
    x.copy_(a)
    y.copy_(b)
    torch.sub(x, y, out=difference)
    low, high = difference.aminmax()
    mean_x, mean_y = x.mean(), y.mean()
    x -= mean_x
    y -= mean_y
    zero = torch.zeros_like(mean_x)
    n = zero + x.numel()
    return torch.stack(
        [
            n,
            mean_x,
            mean_y,
            torch.dot(x, y),
            torch.dot(x, x),
            torch.dot(y, y),
            torch.dot(difference, difference),
            n - torch.count_nonzero(difference),
            torch.maximum(high, -low),
            zero,
        ]
    )


def _masked_block_sums(a: Tensor, b: Tensor, space: Tensor) -> Tensor:
    """As `_block_sums`, over the positions where both are finite."""
    a, b = a.double(), b.double()
    finite = a.isfinite() & b.isfinite()
    a, b = a[finite], b[finite]
    count = a.numel()
    row = _block_sums(a, b, space[:, :count]) if count else torch.zeros(10, dtype=torch.float64, device=a.device)
    row[9] = finite.numel() - count
    return row


def pool_rows(table: Tensor) -> ElementwiseSums:
    """The sums of a pair of tensors from those of its blocks, the same to the last bit wherever they are computed.

    `table`: float64 [blocks, 10] on the CPU; a row is n, both means, the centred Σab, Σa², Σb², then Σ(a-b)², equal,
    max|a-b| and non-finite. Pooled after Chan, Golub, LeVeque 1979 (STAN-CS-79-773), eq. 2.1.
    """
    # numpy adds in one thread whatever the size; torch's order depends on the number of its threads.
    n, mean_a, mean_b, dot, square_a, square_b, difference, equal, maximum, nonfinite = table.numpy().T.copy()
    count = n.sum()
    if count == 0:
        return ElementwiseSums(nonfinite=int(nonfinite.sum()))
    with np.errstate(over="ignore", invalid="ignore"):  # squares of float64 may overflow
        sum_a, sum_b = (n * mean_a).sum(), (n * mean_b).sum()
        u, v = mean_a - sum_a / count, mean_b - sum_b / count
        return ElementwiseSums(
            n=int(count),
            sum_a=float(sum_a),
            sum_b=float(sum_b),
            dot=float((dot + n * mean_a * mean_b).sum()),
            square_a=float((square_a + n * mean_a * mean_a).sum()),
            square_b=float((square_b + n * mean_b * mean_b).sum()),
            squared_difference=float(difference.sum()),
            equal=int(equal.sum()),
            max_difference=float(maximum.max()),
            nonfinite=int(nonfinite.sum()),
            centred_dot=float((dot + n * u * v).sum()),
            centred_square_a=float((square_a + n * u * u).sum()),
            centred_square_b=float((square_b + n * v * v).sum()),
        )


def _is_constant(centred_square: float, total: float, n: int) -> bool:
    """Is the spread no more than what rounding a mean in float64 leaves?"""
    if n == 0:
        return True
    return centred_square <= n * (16 * 2.0**-52 * total / n) ** 2


def _cosine(dot: float, square_a: float, square_b: float) -> float | None:
    ratio = _ratio(dot, math.sqrt(square_a) * math.sqrt(square_b)) if square_a >= 0 and square_b >= 0 else None
    return None if ratio is None else max(-1.0, min(1.0, ratio))


def _ratio(numerator: float, denominator: float) -> float | None:
    """The quotient, or None where it is undefined or out of float64's range."""
    if not (math.isfinite(numerator) and math.isfinite(denominator)) or denominator == 0:
        return None
    ratio = numerator / denominator
    return ratio if math.isfinite(ratio) else None
