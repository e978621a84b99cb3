"""Exact index test of the residual stream: do same-numbered channels of two models resemble each other?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Columns of a view that are multiplied at a time.
COLUMN_BLOCK = 4096
# Permutations that are drawn at a time.
_PERMUTATION_BLOCK = 256


@dataclass(frozen=True)
class ChannelTest:
    """Result of `ChannelProducts.test`.

    `z`: standard score of Σ(A∘B) over all permutations of the channels; None if the permutations do not vary it.
    `effect`: Σ(A∘B) / (‖A‖‖B‖) in [-1, 1], the mean centred cosine of same-numbered channels; None as z.
    `scale`: z / effect, the power of the test; None as z. `channels`: d, less those left out. `views`, `columns`: how
    many were stacked. `largest_sampled`: largest |z| of `permutations` random permutations drawn with `seed`, a check
    of the normal tail (None if none were drawn). `reason`: why there is no z, else None.
    """

    z: float | None
    effect: float | None
    scale: float | None
    channels: int
    views: int
    columns: int
    largest_sampled: float | None = None
    permutations: int = 0
    seed: int = 0
    reason: str | None = None


class ChannelProducts:
    """Products of the residual channels of two models, summed over views that are added one at a time.

    A view is a matrix [d, N] whose rows are the d channels: a reader's weight transposed, a writer's weight, the
    embedding transposed; the columns of both models' views mean the same (same output unit, same token). Only the sum
    C = Σ AᵥBᵥᵀ [d, d] is kept, whatever the number of columns.
    """

    def __init__(self, channels: int, device: str | torch.device = "cpu") -> None:
        if channels < 1:
            raise ValueError(f"need at least one channel, not {channels}")
        self.channels = channels
        self.views = 0
        self.columns = 0
        self._products = torch.zeros(channels, channels, dtype=torch.float64, device=device)
        # How many views have a non-zero row for each channel: the squared norms of A's and B's rows.
        self._rows_a = torch.zeros(channels, dtype=torch.float64, device=device)
        self._rows_b = torch.zeros(channels, dtype=torch.float64, device=device)
        # Squared norms of the sums over channels of A's and B's columns.
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)

    def add(self, view_a: Tensor, view_b: Tensor) -> None:
        """Add one view of each model, [d, N], floating point, on any device; rows are scaled to norm 1.

        Without that scaling a few outlier channels, which trained models have, leave the sum far from normal. Columns
        that are constant over the channels on either side are dropped first: they tell channels apart only through
        the scaling. Raises TypeError for other than floating-point views; ValueError for wrong shapes and
        non-finite values.
        """
        for name, view in (("a", view_a), ("b", view_b)):
            if not view.dtype.is_floating_point:
                raise TypeError(f"the view of {name} is {view.dtype}; dequantise first")
            if view.dim() != 2 or view.shape[0] != self.channels:
                raise ValueError(f"the view of {name} has shape {tuple(view.shape)}; need [{self.channels}, columns]")
        if view_a.shape != view_b.shape:
            raise ValueError(f"the views have {view_a.shape[1]} and {view_b.shape[1]} columns; need the same columns")
        views = [view.detach().to(self._products.device, torch.float32) for view in (view_a, view_b)]
        for name, view in zip("ab", views, strict=True):
            if not bool(view.isfinite().all()):
                raise ValueError(f"the view of {name} holds non-finite values (or values beyond float32)")
        varies = torch.stack([(view != view[:1]).any(0) for view in views]).all(0)
        if not bool(varies.all()):
            views = [view[:, varies] for view in views]
        if views[0].shape[1] == 0:
            return
        a, b = (_unit_rows(view) for view in views)
        for left, right in zip(torch.split(a, COLUMN_BLOCK, 1), torch.split(b, COLUMN_BLOCK, 1), strict=True):
            self._products += left @ right.T
        self._rows_a += (a != 0).any(1)
        self._rows_b += (b != 0).any(1)
        self._sums += torch.stack([side.double().sum(0).square().sum() for side in (a, b)])
        self.views += 1
        self.columns += a.shape[1]

    def add_gains(self, gains_a: Sequence[Tensor], gains_b: Sequence[Tensor]) -> None:
        """Add vectors with one element per channel (norm gains, residual biases), [d] each, as one view.

        Each vector is standardised over the channels first, since otherwise its mean would be all that the scaled rows
        show; vectors that are constant on either side (norms of ones) are dropped. Raises as `add`.
        """
        if len(gains_a) != len(gains_b):
            raise ValueError(f"need the same gains of both models, got {len(gains_a)} and {len(gains_b)}")
        columns: list[list[Tensor]] = [[], []]
        for pair in zip(gains_a, gains_b, strict=True):
            for name, gain in zip("ab", pair, strict=True):
                if gain.dim() != 1 or gain.shape[0] != self.channels:
                    raise ValueError(f"a gain of {name} has shape {tuple(gain.shape)}; need [{self.channels}]")
                if not bool(gain.isfinite().all()):
                    raise ValueError(f"a gain of {name} holds non-finite values")
            if any(bool((gain == gain[0]).all()) for gain in pair):
                continue
            for side, gain in zip(columns, pair, strict=True):
                wide = gain.detach().to(self._products.device, torch.float64)
                side.append((wide - wide.mean()) / wide.std(correction=0))
        if columns[0]:
            self.add(torch.stack(columns[0], 1), torch.stack(columns[1], 1))

    def merge(self, other: ChannelProducts) -> None:
        """Add all views of `other`, as if they had been added here. Raises ValueError for other channel counts."""
        if other.channels != self.channels:
            raise ValueError(f"cannot merge {other.channels} channels into {self.channels}")
        self._products += other._products.to(self._products.device)
        self._rows_a += other._rows_a.to(self._rows_a.device)
        self._rows_b += other._rows_b.to(self._rows_b.device)
        self._sums += other._sums.to(self._sums.device)
        self.views += other.views
        self.columns += other.columns

    def test(self, permutations: int = 0, seed: int = 0) -> ChannelTest:
        """Do channels of the same number resemble each other more than channels of different numbers?

        With C = ABᵀ of the stacked, row-scaled views and H = I - 11ᵀ/d (which centres every column of A and B):

            z = √(d - 1) · tr(HCH) / ‖HCH‖

        which equals Σ(A∘B) / sqrt(⟨AᵀA, BᵀB⟩/(d - 1)), the exact mean 0 and variance over all d! permutations
        (Hoeffding 1951, A combinatorial central limit theorem, theorem 2), without the N x N products.

        Null hypothesis: independent training. Initialisation is exchangeable over residual channels and SGD, Adam and
        Muon are equivariant under their permutation (Zhu et al., Independence Tests for Language Models, ICML 2025,
        arXiv 2502.12292, theorem 1). The residual stream has one such permutation for the whole model, so there is one
        z for all views together; z of single layers or tensors are not independent of each other.
        Known false positives: whatever breaks exchangeability: sinusoidal position embeddings added to the stream
        (their channels have a frequency), other structured initialisation, and a shared seed.
        Blind to: permuted or rotated channels, other widths.

        Channels that are zero in all views of either side (padding) are left out. `permutations` random permutations,
        drawn with `seed`, check the normal tail. Two-sided: one model with all its residual signs flipped has
        z < 0 where the columns keep their sign.
        """
        used = (self._rows_a > 0) & (self._rows_b > 0)
        channels = int(used.sum())
        counts = (channels, self.views, self.columns)
        if self.views == 0:
            return ChannelTest(None, None, None, *counts, reason="no view varies over the channels in both models")
        if channels < 2:
            return ChannelTest(None, None, None, *counts, reason=f"{channels} channels are not zero on both sides")
        centred = self._products[used][:, used]
        centred = centred - centred.mean(0)
        centred = centred - centred.mean(1, keepdim=True)
        dot, norm = float(centred.diagonal().sum()), float(centred.norm())
        rows = torch.stack([self._rows_a[used].sum(), self._rows_b[used].sum()])
        size = math.sqrt(float((rows - self._sums / channels).clamp(min=0).prod()))
        # Float32 products leave less than this of channels that are all equal.
        if norm <= 1e-6 * math.sqrt(float(rows.prod())):
            return ChannelTest(None, None, None, *counts, reason="the channels vary in different columns, or are equal")
        scale = size * math.sqrt(channels - 1) / norm
        effect = max(-1.0, min(1.0, dot / size))
        largest = _largest_of_permutations(centred, permutations, seed) * math.sqrt(channels - 1) / norm
        return ChannelTest(
            dot * math.sqrt(channels - 1) / norm,
            effect,
            scale,
            *counts,
            largest_sampled=largest if permutations else None,
            permutations=permutations,
            seed=seed,
        )


def channel_permutation_test(
    views_a: Sequence[Tensor], views_b: Sequence[Tensor], permutations: int = 0, seed: int = 0
) -> ChannelTest:
    """`ChannelProducts.test` of views [d, N] that are all at hand. Raises ValueError for no or unequal views."""
    if not views_a or len(views_a) != len(views_b):
        raise ValueError(f"need the same views of both models, got {len(views_a)} and {len(views_b)}")
    products = ChannelProducts(views_a[0].shape[0], views_a[0].device)
    for view_a, view_b in zip(views_a, views_b, strict=True):
        products.add(view_a, view_b)
    return products.test(permutations, seed)


def _unit_rows(view: Tensor) -> Tensor:
    """Rows scaled to norm 1 through their largest element, so that no square over- or underflows; zero rows stay."""
    largest = view.abs().amax(1, keepdim=True)
    scaled = torch.where(largest > 0, view / largest, 0.0)
    norm = scaled.norm(dim=1, keepdim=True)
    return torch.where(norm > 0, scaled / norm, 0.0)


def _largest_of_permutations(centred: Tensor, count: int, seed: int) -> float:
    """Largest |Σ C[i, π(i)]| of `count` random permutations."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(centred.shape[0], device=centred.device)
    largest = 0.0
    for start in range(0, count, _PERMUTATION_BLOCK):
        block = min(_PERMUTATION_BLOCK, count - start)
        orders = torch.rand(block, centred.shape[0], generator=generator).argsort(1).to(centred.device)
        largest = max(largest, float(centred[rows, orders].sum(1).abs().max()))
    return largest
