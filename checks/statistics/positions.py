"""Which positions of a large tensor are read: spread over all of it, the same for tensors of equal size."""

from __future__ import annotations

import torch
from torch import Tensor


def sample_positions(total: int, count: int, seed: int) -> Tensor:
    """`count` distinct positions of 0 … `total` - 1 in rising order, or all of them if there are no more.

    One position is drawn uniformly from each of `count` nearly equal stretches (stratified sampling), so the sample
    costs O(count) whatever the total. It depends on nothing but the arguments. Returns an int64 vector on the CPU.
    Raises ValueError for negative numbers.
    """
    if total < 0 or count < 0:
        raise ValueError(f"need total >= 0 and count >= 0, not {total} and {count}")
    if total <= count or not count:
        return torch.arange(min(total, count))
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.rand(count, generator=generator, dtype=torch.float64)
    # Stretch i starts at ceil(i·total/count), in whole numbers, so that no two share a position.
    edges = -((-torch.arange(count + 1) * total) // count)
    widths = edges[1:] - edges[:-1]
    return edges[:-1] + torch.minimum((offsets * widths).long(), widths - 1)
