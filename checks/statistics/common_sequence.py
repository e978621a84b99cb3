"""Was a table filled by a rule: do its rows, or its columns, repeat one smooth sequence, but for what training did?"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Shortest sequence, and fewest distinct values of it: the ranks of 16 can still reach the level.
SHORTEST_SEQUENCE = 32
FEWEST_VALUES = 16
# Fewest rows, or columns, that repeat it.
FEWEST_LINES = 8
# Share of the table's variance that the sequence explains at least: a chance cosine of two such tables.
LEAST_SHARE = 0.1
# Steps between neighbours relative to those in random order (von Neumann's ratio / 2), at most.
LARGEST_STEPS = 0.4
# Level of the test of order (Bartels): far below one over the tensors that anybody ever compares.
LEVEL = 1e-9
# For the beginning of a table, which may show less of it.
HEAD_SHARE, HEAD_STEPS, HEAD_LEVEL = 0.02, 0.8, 1e-4

_BLOCK = 1 << 20


@dataclass(frozen=True)
class CommonSequence:
    """The mean of a table's rows (`axis` 1: the sequence runs along axis 1), or of its columns (`axis` 0).

    `share`: of the table's variance, 0 to 1, that repeating it explains. `steps`: squared steps between neighbours over
    twice the variance: 1 in random order, 0 if smooth. `p`: that a random order has ranks as smooth; 1 where fewer than
    16 values are distinct. `length`: of the sequence.
    """

    axis: int
    share: float
    steps: float
    p: float
    length: int


def repeats_a_smooth_sequence(table: Tensor) -> int | None:
    """The axis along which all lines of a table [n, m] repeat one smooth sequence, up to deviations; None if none does.

    Tables of states, decays and slopes are filled by a rule, the same in every model, and move little in training: each
    row of A_log [d, 64] starts as the logarithms of 1 to 64 (S4D-Real; Gu and Dao, Mamba, arXiv 2312.00752, section
    3.6), the decays of RWKV [heads, 64] rise from end to end. Two models trained apart are then alike.

    A rule shows in the mean of the rows, or of the columns: it explains a tenth of the table's variance or more, and
    its index has an order. In trained weights that index has none, since initialisation and training treat hidden
    units, channels and experts alike (Zhu et al., arXiv 2502.12292, theorem 1): a head whose rows share a large mean,
    embeddings, products of low rank and nearly constant matrices have sequences in no order.
    The order is tested by Bartels' ratio of the ranks (1982, The rank version of von Neumann's ratio test for
    randomness, JASA 77, with its beta approximation) at 1e-9, and by von Neumann's ratio of the values, so that it is
    the order that explains. Float64 sums; a table with values that are not finite has no answer (None), nor has one of
    integers. Raises ValueError for other than two axes.
    Blind to: sequences shorter than 32; rules whose rows and columns have constant means; sinusoids with deviations.
    """
    for one in common_sequences(table):
        if one.share >= LEAST_SHARE and one.steps <= LARGEST_STEPS and one.p <= LEVEL:
            return one.axis
    return None


def may_repeat_a_sequence(head: Tensor, rows: int) -> bool:
    """Could `repeats_a_smooth_sequence` be true of a table of so many rows, as far as its first ones, `head`, tell?

    Of a sequence that runs down fewer than 32 of them only the share is asked. False for nearly all trained matrices.
    """
    if head.shape[0] < 2:
        return False
    return any(
        one.share >= HEAD_SHARE
        and (one.length < SHORTEST_SEQUENCE or (one.steps <= HEAD_STEPS and one.p <= HEAD_LEVEL))
        for one in common_sequences(head, rows)
    )


def common_sequences(table: Tensor, all_rows: int | None = None) -> list[CommonSequence]:
    """The mean row and the mean column of a table [n, m], of those that are long enough and stand for enough lines.

    `all_rows`: of the table, where only its first ones are given. Empty for constant tables, integers and values that
    are not finite. Raises ValueError for other than two axes.
    """
    if table.dim() != 2:
        raise ValueError(f"a table of shape {tuple(table.shape)}; need two axes")
    rows, columns = table.shape
    sizes = (rows if all_rows is None else all_rows, columns)
    wanted = [axis for axis in (1, 0) if sizes[axis] >= SHORTEST_SEQUENCE and sizes[1 - axis] >= FEWEST_LINES]
    if not wanted or not rows or not table.dtype.is_floating_point:
        return []
    origin = table[0, 0].double()
    down = torch.zeros(columns, dtype=torch.float64, device=table.device)
    across, squares = [], torch.zeros((), dtype=torch.float64, device=table.device)
    for block in torch.split(table, max(1, _BLOCK // columns)):
        values = block.double() - origin
        down += values.sum(0)
        across.append(values.sum(1))
        squares += values.square().sum()
    means = {1: down / rows, 0: torch.cat(across) / columns}
    mean = means[1].mean()
    variance = squares / (rows * columns) - mean.square()
    if not bool(variance > 1e-12 * squares / (rows * columns)):  # constant, or NaN
        return []
    found = []
    for axis in wanted:
        line = means[axis]
        share = float((line - mean).square().mean() / variance)
        found.append(CommonSequence(axis, min(1.0, share), *_order(line), line.shape[0]))
    return found


def _order(line: Tensor) -> tuple[float, float]:
    """Von Neumann's ratio of a sequence over its mean in random order, and the p of Bartels' test that it has none."""
    steps = _ratio(line) / 2
    _, places, counts = torch.unique(line, return_inverse=True, return_counts=True)
    distinct = counts.shape[0]
    if distinct < FEWEST_VALUES:
        return steps, 1.0
    # Ranks, of ties their mean; ties tell no order, so that only distinct values count as observations.
    ends = counts.cumsum(0).double()
    ranks = (ends - (counts - 1) / 2)[places]
    return steps, bartels_p(_ratio(ranks), distinct)


def _ratio(line: Tensor) -> float:
    """Squared steps between neighbours over squared deviations from the mean: 2 in random order."""
    deviations = float((line - line.mean()).square().sum())
    return float(line.diff().square().sum()) / deviations if deviations > 0 else 2.0


def bartels_p(ratio: float, count: int) -> float:
    """Probability that `count` ranks in random order have a ratio as small as this one.

    Bartels 1982: ratio/4 is about Beta(q, q) with q = 5n(n+1)(n-1)²/(2(n-2)(5n²-2n-9)) - 1/2, which has the variance
    that the ratio has over all n! orders. Raises ValueError for fewer than 10, of which that is not known to hold.
    """
    from scipy.special import betainc

    if count < 10:
        raise ValueError(f"{count} ranks; need 10")
    n = float(count)
    q = 5 * n * (n + 1) * (n - 1) ** 2 / (2 * (n - 2) * (5 * n * n - 2 * n - 9)) - 0.5
    return float(betainc(q, q, min(1.0, max(0.0, ratio / 4))))
