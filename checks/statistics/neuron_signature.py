"""What of a neuron no rotation, permutation, sign flip or rescaling changes, and what pairs neurons by it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from checks.statistics.double_matching import unit_rows

QUANTILES = 48
# Neurons whose directions the quantiles are taken over: the largest of an MLP.
POPULATION = 1024
# Neurons whose best match is sought when two MLPs are compared as a whole.
SAMPLED_ROWS = 128


@dataclass(frozen=True)
class Neurons:
    """Hidden units of one MLP by their weights; rows of norm 1, [h, d] each, norms of the residual stream folded in.

    `fixed`: what decides when a neuron is active: the gate; without one, what it reads. `others`: the other views, the
    last of which is what the neuron writes. `sign_free`: may the signs of the others be flipped together? True with a
    gate, since up and down negated together change nothing. `log_sizes` [h]: logarithm of the product of the norms of
    a neuron's views, which rescaling leaves alone; `log_gates` [h]: of the fixed view, which a gate cannot change.
    `numbers` [h]: of the units in their MLP, ascending; `total`: units of the MLP.
    """

    fixed: Tensor
    others: tuple[Tensor, ...]
    sign_free: bool
    log_sizes: Tensor
    log_gates: Tensor
    numbers: Tensor
    total: int

    @property
    def count(self) -> int:
        """Neurons held."""
        return self.fixed.shape[0]

    def without_up(self) -> Neurons:
        """The same neurons by what decides their activity and what they write: comparable with and without a gate."""
        return replace(self, others=self.others[-1:], sign_free=True)


def make_neurons(gate: Tensor | None, up: Tensor, down: Tensor, count: int | None = None) -> Neurons:
    """The neurons of gate [h, d] (None without one), up [h, d] and down [d, h], folded; at most `count` of them.

    Neurons that are zero in a view or hold a weight that is not finite (or whose norm is not, in float32) are left out,
    and so are copies of another one (a matching could pair them either way). Of the others the largest are taken, by
    the product of the norms of their views: the choice survives permutation, rotation and rescaling, so that both sides
    of a pair choose much the same. In the order of their numbers. Raises ValueError for shapes that do not fit.
    """
    writing = down.T
    views = [up, writing] if gate is None else [gate, up, writing]
    if any(view.dim() != 2 or view.shape != up.shape for view in views):
        raise ValueError(f"views have shapes {[tuple(view.shape) for view in views]}; need the same [units, width]")
    norms = torch.stack([view.float().norm(dim=1) for view in views])
    norms = torch.where(norms.isfinite().all(0), norms, 0.0)
    smallest = torch.finfo(torch.float32).eps * norms.amax(1, keepdim=True) if norms.numel() else norms
    log_norms = norms.double().clamp_min(torch.finfo(torch.float32).tiny).log()
    log_sizes = log_norms.sum(0)
    numbers = ((norms > smallest).all(0) & ~_is_copy(views, norms)).nonzero()[:, 0]
    if count is not None and numbers.shape[0] > count:
        largest = log_sizes[numbers].argsort(descending=True, stable=True)[:count]
        numbers = numbers[largest].sort().values
    kept = [unit_rows(view[numbers].float()) for view in views]
    return Neurons(
        kept[0],
        tuple(kept[1:]),
        gate is not None,
        log_sizes[numbers].float(),
        log_norms[0][numbers].float() if gate is not None else torch.zeros_like(log_sizes[numbers]).float(),
        numbers,
        up.shape[0],
    )


def signature(neurons: Neurons) -> Tensor:
    """Features [h, f] of each neuron, unit rows, that depend on no basis, numbering, sign or scale.

    Half of their weight have the quantiles (0.5 to 99.5 %) of the cosines between what the neuron reads or writes and
    what the neurons of the MLP read or write (of many the largest 1024, so that both sides ask the same); signs that
    are free do not count. The other half have ranks among the neurons: of the cosines between the neuron's own views,
    and of its norms. Every feature is standardised over the neurons. Nothing of any other layer is used.
    """
    fixed, others, free = neurons.fixed, neurons.others, neurons.sign_free
    if neurons.count == 0:
        width = 2 * len(others) + 2 * (free and len(others) > 1)
        return fixed.new_zeros(0, (1 + 2 * len(others)) * QUANTILES + width)
    asked = neurons.log_sizes.argsort(descending=True, stable=True)[:POPULATION]
    read, written = fixed[asked], others[-1][asked]
    groups = [_quantiles(fixed @ read.T, False)]
    groups += [_quantiles(other @ read.T, free) for other in others]
    groups += [_quantiles(view @ written.T, free) for view in (fixed, *others[:-1])]
    own = [(fixed * other).sum(1) for other in others]
    ranked = [(first * second).sum(1) for first, second in pairwise(others)]
    if free and len(own) > 1:
        ranked += [own[0] * own[1], neurons.log_gates]
    ranked += [cosine.abs() if free else cosine for cosine in own]
    ranked.append(neurons.log_sizes)
    ranks = torch.stack([values.argsort().argsort().float() for values in ranked], 1)
    return torch.cat([unit_rows(torch.cat(groups, 1)), unit_rows(_standardised(ranks))], 1).mul(0.5**0.5)


def summary(neurons: Neurons) -> Tensor:
    """Features [f] of an MLP as a whole, to find the nearest of many experts at the cost of reading them: O(h·d).

    Of each neuron: the cosines between its own views, the logarithms of its norms less their median (training on moves
    all norms of a model alike, further than its experts lie apart), and the cosines of its views with three directions
    of its MLP: the mean of the fixed views, and of each other view weighted by its cosine with the fixed one, so that
    no free sign counts. The features are five quantiles of each over the neurons (of many the largest 1024, so that
    both sides ask the same), and the correlations of each with each, which tell more experts apart than quantiles do.

    Measured on 64 experts of random weights (256 units, 448 wide) and copies with noise of 0.3 of their spread, two
    draws, all neurons or the larger half: 254 of 256 find each other, by 25 quantiles of the cosines and norms alone
    113. Fine-tuned, 4-bit and renumbered MLPs of the lineage zoo all find theirs among 24 of independent models.
    Raises ValueError for an MLP without neurons.
    """
    if neurons.count == 0:
        raise ValueError("an MLP without neurons has no summary")
    asked = neurons.log_sizes.argsort(descending=True, stable=True)[:POPULATION]
    fixed, others = neurons.fixed[asked], [other[asked] for other in neurons.others]
    own = [(fixed * other).sum(1) for other in others]
    directions = [
        fixed.mean(0),
        *((cosine[:, None] * other).mean(0) for cosine, other in zip(own, others, strict=True)),
    ]
    basis = torch.stack([direction / direction.norm().clamp_min(1e-30) for direction in directions], 1)
    # Negating a neuron's other views together negates this sign and each of their projections.
    sign = own[0].sign()[:, None] if neurons.sign_free else 1.0
    columns = [cosine.abs() if neurons.sign_free else cosine for cosine in own]
    columns += [(first * second).sum(1) for first, second in pairwise(others)]
    columns += [sizes[asked] - sizes[asked].median() for sizes in (neurons.log_sizes, neurons.log_gates)]
    values = torch.cat([torch.stack(columns, 1), fixed @ basis, *(sign * (other @ basis) for other in others)], 1)
    at = torch.linspace(0.1, 0.9, 5, device=fixed.device)
    scaled = _standardised(values)
    above = torch.triu_indices(values.shape[1], values.shape[1], 1, device=fixed.device)
    correlations = (scaled.T @ scaled / scaled.shape[0])[above[0], above[1]]
    return torch.cat([torch.quantile(values, at, dim=0).T.flatten(), correlations])


def block_similarity(a: Tensor, b: Tensor, rows: int = SAMPLED_ROWS) -> Tensor:
    """How well the neurons of one MLP find a partner in another: mean over some of them of the best match, in [-1, 1].

    `a`, `b`: signatures [h_a, f] and [h_b, f]; `rows` neurons of the smaller side, evenly spread, look for theirs.
    Only good for comparing with other MLPs. Returns a tensor without dimensions, NaN for an MLP without neurons.
    """
    if a.shape[0] > b.shape[0]:
        a, b = b, a
    if a.shape[0] == 0:
        return torch.full((), torch.nan, device=b.device)
    some = torch.linspace(0, a.shape[0] - 1, min(rows, a.shape[0]), device=a.device).round().long()
    best: Tensor = (a[some] @ b.T).amax(1)
    return best.mean()


def _quantiles(cosines: Tensor, sign_free: bool) -> Tensor:
    """Quantiles of each row, standardised over the rows."""
    values = (cosines.abs() if sign_free else cosines).sort(1).values
    at = torch.linspace(0.005, 0.995, QUANTILES, device=values.device) * (values.shape[1] - 1)
    return _standardised(values[:, at.round().long()])


def _standardised(features: Tensor) -> Tensor:
    """Columns with mean 0 and standard deviation 1; constant ones are 0."""
    centred = features - features.mean(0)
    spread = centred.square().mean(0).sqrt()
    return torch.where(spread > 1e-6 * features.abs().amax(0).clamp_min(1e-30), centred / spread, 0.0)


def _is_copy(views: list[Tensor], norms: Tensor) -> Tensor:
    """Which neurons equal an earlier one in every view: neighbours on a random direction, then compared in full.

    A copy is missed where another neuron lies between by chance.
    """
    generator = torch.Generator().manual_seed(0)
    units = norms.clamp_min(torch.finfo(torch.float32).tiny)
    total = torch.zeros_like(units[0])
    for view, norm in zip(views, units, strict=True):
        direction = torch.randn(view.shape[1], generator=generator).to(view.device)
        total += view.float() @ direction / norm
    ordered = total.sort(stable=True)
    near = (ordered.values.diff() < 1e-4).nonzero()[:, 0]
    one, other = ordered.indices[near], ordered.indices[near + 1]
    same = torch.ones_like(near, dtype=torch.bool)
    for view, norm in zip(views, units, strict=True):
        products = (view[one].double() * view[other].double()).sum(1)
        same &= products > (1 - 1e-6) * norm[one].double() * norm[other].double()
    copies = torch.zeros_like(total, dtype=torch.bool)
    copies[other[same]] = True
    return copies
