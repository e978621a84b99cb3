"""The residual channels of two models side by side, for the exact test of their order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from checks.checkpoint.canonical import CanonicalModel, MlpPlace
from checks.streaming.planned_source import NotPlanned

if TYPE_CHECKING:
    from torch import Tensor

    from checks.statistics.channels import ChannelProducts, ChannelTest

# Matrices [out, d] that read the residual stream, and those [d, in] that write it; MLPs come from `mlps`.
READERS = ("q", "k", "v", "q_a", "kv_a", "router")
WRITERS = ("o",)
# Columns of a view that are read; z of an exact copy is then about √(d·columns).
COLUMNS = 512
# Routed experts of a layer that are taken, the first ones that are read.
EXPERTS = 2


@dataclass(frozen=True)
class ChannelTests:
    """The channel test of a pair: `whole`, all views together, and of `groups` alone: norms, embedding, layers.

    A group finds reuse that is confined to it; the groups and the whole are one test each for a correction (`tests`).
    """

    whole: ChannelTest
    groups: Mapping[str, ChannelTest]

    @property
    def tests(self) -> int:
        """How many of them have a z."""
        return sum(test.z is not None for test in (self.whole, *self.groups.values()))

    @property
    def strongest(self) -> tuple[str, ChannelTest] | None:
        """The test with the largest |z|, and its name ("whole" or the group)."""
        named = [("whole", self.whole), *self.groups.items()]
        return max(
            ((name, test) for name, test in named if test.z is not None),
            key=lambda one: abs(one[1].z or 0.0),
            default=None,
        )


class ChannelSweep:
    """Collects the views of the channels of two models of equal width, layer by layer.

    `tokens`, `layer_map`: see `channel_tests`.
    """

    def __init__(
        self,
        candidate: CanonicalModel,
        reference: CanonicalModel,
        tokens: tuple[Sequence[int], Sequence[int]] | None = None,
        layer_map: Mapping[int, int] | None = None,
        seed: int = 0,
    ) -> None:
        self._sides = candidate, reference
        self._tokens = tokens
        self._seed = seed
        self._pairs = (
            {layer: layer for layer in sorted(set(candidate.layers) & set(reference.layers))}
            if layer_map is None
            else layer_map
        )
        self._groups = self._new_groups()
        self._added: set[int | None] = set()

    def visit(self, layer: int | None) -> None:
        """Add the views of a layer of the candidate and its counterpart, or of the embeddings (None), once.

        Raises CheckpointUnavailable.
        """
        if layer in self._added:
            return
        # Of a layer all views or none, whatever happens in between.
        fresh = self._new_groups()
        if layer is None:
            _add_norms(fresh["norms"], *self._sides, self._pairs)
            if self._tokens is not None and len(self._tokens[0]):
                _add_tokens(fresh["embedding"], *self._sides, self._tokens)
        elif layer in self._pairs:
            ours, theirs = self._sides
            _add_layer(fresh["layers"], (ours, layer), (theirs, self._pairs[layer]), self._seed)
        for name, products in fresh.items():
            self._groups[name].merge(products)
        self._added.add(layer)

    def _new_groups(self) -> dict[str, ChannelProducts]:
        from checks.statistics.channels import ChannelProducts

        model = self._sides[0]
        return {name: ChannelProducts(model.hidden_size, model.device) for name in ("norms", "embedding", "layers")}

    def tests(self, permutations: int = 2000) -> ChannelTests:
        """The tests of all views; those of layers that were not visited are read now."""
        from checks.statistics.channels import ChannelProducts

        for layer in (None, *self._pairs):
            self.visit(layer)
        whole = ChannelProducts(self._sides[0].hidden_size, self._sides[0].device)
        for products in self._groups.values():
            whole.merge(products)
        return ChannelTests(
            whole.test(permutations, self._seed),
            {name: one.test(permutations, self._seed) for name, one in self._groups.items()},
        )


def channel_tests(
    candidate: CanonicalModel,
    reference: CanonicalModel,
    tokens: tuple[Sequence[int], Sequence[int]] | None = None,
    layer_map: Mapping[int, int] | None = None,
    permutations: int = 2000,
    seed: int = 0,
) -> ChannelTests | None:
    """The permutation test over residual channels (T1b); None for models of different width.

    `tokens`: ids of shared tokens in both vocabularies; without them embedding and head are left out. `layer_map`: the
    reference's layer for each of the candidate's; by default equal numbers. Of every matrix at most 512 columns are
    taken (the same in both), of every layer two routed experts. Norms stand unfolded beside the matrices.
    Raises CheckpointUnavailable.
    """
    if candidate.hidden_size != reference.hidden_size:
        return None
    return ChannelSweep(candidate, reference, tokens, layer_map, seed).tests(permutations)


def _add_norms(
    products: ChannelProducts, candidate: CanonicalModel, reference: CanonicalModel, pairs: Mapping[int, int]
) -> None:
    places: list[tuple[str, int | None, int | None]] = [("final_norm", None, None)]
    for ours, theirs in pairs.items():
        places += [(part, ours, theirs) for part in sorted(candidate.parts(ours)) if part.endswith("_norm")]
    gains: list[tuple[Tensor, Tensor]] = []
    for part, one, other in places:
        if candidate.has(part, one) and reference.has(part, other):
            both = candidate.gain(part, one), reference.gain(part, other)
            # Norms inside attention (of queries, of latents) have other widths.
            if all(gain.shape == (products.channels,) and bool(gain.isfinite().all()) for gain in both):
                gains.append(both)
    products.add_gains([ours for ours, _ in gains], [theirs for _, theirs in gains])


def _add_tokens(
    products: ChannelProducts,
    candidate: CanonicalModel,
    reference: CanonicalModel,
    tokens: tuple[Sequence[int], Sequence[int]],
) -> None:
    import torch

    models = (candidate, reference)
    ids = [torch.tensor(list(side)) for side in tokens]
    tables = ["embedding"]
    # A tied head is the embedding once more.
    tables += ["head"] if any(model.has("head") for model in models) else []
    for table in tables:
        if not all(model.has("embedding") or model.has(table) for model in models):
            continue
        both = [getattr(model, table)(rows) for model, rows in zip(models, ids, strict=True)]
        if all(bool(rows.isfinite().all()) for rows in both):
            # Less each table's mean row, which would give every channel one constant for all tokens.
            _add(products, *((rows - rows.mean(0)).T for rows in both))


def _add_layer(
    products: ChannelProducts, ours: tuple[CanonicalModel, int], theirs: tuple[CanonicalModel, int], seed: int
) -> None:
    from checks.statistics.positions import sample_positions

    (a, layer_a), (b, layer_b) = ours, theirs
    for part in (*READERS, *WRITERS):
        if not (a.has(part, layer_a) and b.has(part, layer_b)):
            continue
        matrices = [a.matrix(part, layer_a), b.matrix(part, layer_b)]
        views = [matrix.T if part in READERS else matrix for matrix in matrices]
        if views[0].shape == views[1].shape and views[0].shape[0] == products.channels:
            columns = sample_positions(views[0].shape[1], COLUMNS, seed).to(views[0].device)
            _add(products, views[0][:, columns], views[1][:, columns])
    experts = 0
    for place_a, place_b in _mlp_pairs(a.mlps(layer_a), b.mlps(layer_b)):
        rows = sample_positions(place_a.units, COLUMNS, seed)
        if place_a.expert is not None and experts == EXPERTS:
            break
        try:
            mlp_a, mlp_b = a.mlp(place_a, rows=rows), b.mlp(place_b, rows=rows)
        except NotPlanned:
            # Experts of one tensor are all there by its header; some are read.
            if place_a.expert is None:
                raise
            continue
        experts += place_a.expert is not None
        _add(products, mlp_a.up.T, mlp_b.up.T)
        _add(products, mlp_a.down, mlp_b.down)
        if mlp_a.gate is not None and mlp_b.gate is not None:
            _add(products, mlp_a.gate.T, mlp_b.gate.T)


def _mlp_pairs(ours: Sequence[MlpPlace], theirs: Sequence[MlpPlace]) -> list[tuple[MlpPlace, MlpPlace]]:
    """MLPs of equal kind, expert number and size, routed experts last."""
    places = {(place.kind, place.expert): place for place in theirs}
    pairs = []
    for place in ours:
        other = places.get((place.kind, place.expert))
        if other is not None and other.units == place.units:
            pairs.append((place, other))
    return sorted(pairs, key=lambda pair: -1 if pair[0].expert is None else pair[0].expert)


def _add(products: ChannelProducts, view_a: Tensor, view_b: Tensor) -> None:
    """Add views that can be compared; a matrix with non-finite values is left out."""
    if view_a.shape == view_b.shape and bool(view_a.isfinite().all()) and bool(view_b.isfinite().all()):
        products.add(view_a, view_b)
