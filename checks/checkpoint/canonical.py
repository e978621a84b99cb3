"""The canonical form of a model: every part a float32 matrix [out, in], whatever the checkpoint's layout and format.

Folded norms make two models comparable up to the basis of the residual stream: a rotation R of it then acts as E → ER,
W_read → W_read R, W_write → RᵀW_write and nothing else; unfolded, it hides in the gains. Key and value heads that
several query heads share stand once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.parts import MLP_PARTS, Holder, Parts
from checks.checkpoint.roles import TensorRole
from checks.checkpoint.stored_weight import TensorSource

if TYPE_CHECKING:
    from torch import Tensor

Found = TypeVar("Found")

# What no matrix [out, in] stands for: it stays where it is, and the canonical form does without it.
NO_MATRIX = frozenset(
    {"sinks", "rotary_frequencies", "causal_mask", "causal_mask_value", "router_correction", "patch_embedding"}
)
KINDS = {None: "dense", "shared": "shared", "routed": "routed"}


@dataclass(frozen=True)
class MlpPlace:
    """One MLP of a model, or one expert, as headers show it. `units` h, `elements` of all its matrices."""

    layer: int
    kind: str  # dense, shared or routed
    expert: int | None
    units: int
    has_gate: bool
    elements: int

    @property
    def key(self) -> tuple[int, str, int | None]:
        """What it has in common with its counterpart in another model."""
        return self.layer, self.kind, self.expert


@dataclass(frozen=True)
class Mlp:
    """The matrices of one MLP: gate [h, d] (None without one), up [h, d], down [d, h]."""

    gate: Tensor | None
    up: Tensor
    down: Tensor


class CanonicalModel:
    """The main stack of a checkpoint's text decoder (of its vision encoder, where that is all there is) on a device.

    Reads when asked and keeps nothing but gains of norms, and what `once` found. `component`: "text" or "vision", where
    a checkpoint has both.
    """

    def __init__(self, checkpoint: TensorSource, device: str = "cpu", component: str | None = None) -> None:
        self.device = device
        self._source = checkpoint
        self._parts = Parts(checkpoint, component)
        self._gains: dict[tuple[str, int | None], Tensor] = {}
        self._found: dict[tuple[Any, ...], Any] = {}

    def once(self, measure: Callable[..., Found], *arguments: Hashable) -> Found:
        """`measure(self, *arguments)`, made when first asked for: what is wanted of a layer while its tensors are held.

        For small results, which stay as long as the model does. A measure that raises is made again.
        """
        key = (measure, *arguments)
        if key not in self._found:
            self._found[key] = measure(self, *arguments)
        found: Found = self._found[key]
        return found

    @cached_property
    def tensors_by_layer(self) -> Mapping[int | None, frozenset[str]]:
        """Names of the tensors of each layer, and of the model beside its layers (None), with their scales."""
        found: dict[int | None, set[str]] = {None: set(), **{layer: set() for layer in self.layers}}
        for name, entry in self._source.tensors.items():
            role = entry.role
            if not isinstance(role, TensorRole) or role.component != self.component or role.layer not in found:
                continue
            if role.layer is None or self._parts.stack in (None, role.stack):
                found[role.layer].add(name)
        return {layer: frozenset(names) for layer, names in found.items()}

    @property
    def component(self) -> str:
        """Which component this is: text or vision."""
        return self._parts.component

    @property
    def layers(self) -> tuple[int, ...]:
        """The numbers of the layers; blocks that predict further tokens are none of them."""
        return self._parts.layers

    @cached_property
    def hidden_size(self) -> int:
        """Width d of the residual stream. Raises CheckpointUnavailable if no shape tells."""
        for layer in (None, *self.layers):
            for part in ("final_norm", "attention_norm", "mlp_norm", "post_attention_norm", "post_mlp_norm"):
                if self.has(part, layer):
                    return self._source.tensors[self._parts.find(part, layer).name].shape[0]
            for part, axis in (("embedding", 1), ("o", 0), ("down", 0)):
                if self._parts.holds(part, layer):
                    return self._parts.shape(self._parts.find(part, layer), part)[axis]
        raise CheckpointUnavailable(
            f"{self._source.where}: no norm, embedding or projection of the {self.component} model was recognised"
        )

    @cached_property
    def unfolded_because(self) -> str | None:
        """Why `folded` gives readers as they stand; None when they are folded."""
        places = self._parts.by_layer.values()
        if any(holder.role.layout.norm for layer in places for holder in layer.values()):
            return None
        return f"no template says which norm is read through ({self._source.roles.inferred_because or 'no layers'})"

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """For the record: what of the checkpoint the canonical form leaves out, and what it had to guess."""
        said = [one for one in (self._source.roles.inferred_because, self.unfolded_because) if one]
        places = [(place, holder) for layer in self._parts.by_layer.values() for place, holder in layer.items()]
        ignored: dict[str, set[str]] = {"biases of norms": set(), "biases": set(), "vectors": set()}
        for (_, _, part, _), holder in places:
            if part.endswith("_bias"):
                ignored["biases of norms" if holder.role.category == "norm" else "biases"].add(holder.name)
            elif part in NO_MATRIX or part == "first_norm":
                ignored["vectors"].add(holder.name)
        said += [f"{len(names)} {what} are left out, such as {min(names)}" for what, names in ignored.items() if names]
        if incomplete := [layer for layer in self.layers if not self.mlps(layer)]:
            said.append(f"no complete MLP in layers {', '.join(map(str, incomplete))}")
        if ambiguous := self._parts.ambiguous:
            said.append(f"{len(ambiguous)} tensors have the place of another one, such as {min(ambiguous)}")
        return tuple(said)

    def parts(self, layer: int) -> frozenset[str]:
        """What a layer has beside its MLPs: matrices (q, k, v, o, q_a, …, router) and norms (attention_norm, …)."""
        return frozenset(
            part
            for _, whose, part, _ in self._parts.by_layer.get(layer, {})
            if whose is None and part not in MLP_PARTS and part not in NO_MATRIX and not part.endswith("_bias")
        )

    def has(self, part: str, layer: int | None = None) -> bool:
        """Is a part (of `parts`, or of the whole model: embedding, head, final_norm) stored?"""
        return self._parts.holds(part, layer)

    def matrix(self, part: str, layer: int | None = None) -> Tensor:
        """A part as it works on column vectors: [out, in], not folded; embedding and head (also a tied one): [V, d].

        Raises KeyError for what is not there or no matrix, CheckpointUnavailable when it cannot be read.
        """
        holder = self._head_holder() if (part, layer) == ("head", None) else self._parts.find(part, layer)
        if holder.role.category == "norm" or part in NO_MATRIX or part.endswith("_bias"):
            raise KeyError(f"{part!r} is no matrix; ask `gain` for norms")
        return self._parts.matrix(holder, part, None, self.device)

    def gain(self, part: str, layer: int | None = None) -> Tensor:
        """A norm as the gains [d] that it multiplies by: 1 + what is stored where that is zero-centred.

        Raises KeyError for what is not there or no norm, CheckpointUnavailable when it cannot be read.
        """
        if (part, layer) not in self._gains:
            holder = self._parts.find(part, layer)
            if holder.role.category != "norm" or part.endswith("_bias"):
                raise KeyError(f"{part!r} is no norm")
            gain = self._parts.vector(holder, self.device)
            self._gains[part, layer] = gain + 1 if holder.role.layout.zero_centred else gain
        return self._gains[part, layer].clone()

    def folded(self, part: str, layer: int | None = None) -> Tensor:
        """A part with the norm that it reads or writes through, so that the norm's own gains are one.

        With gains g, a reader: W·diag(g), and for LayerNorm W·diag(g)·(I - 11ᵀ/d). A writer with a norm behind it:
        diag(g)·W, and for LayerNorm diag(g)·(I - 11ᵀ/d)·W. What has no norm stands as it is; biases of norms are left
        out, see `notes`.
        The division by the norm's root mean square is one number for each token, which no weight can hold.
        Of a tied head it is a copy of the embedding that is folded.
        """
        if part != "head":
            holder = self._parts.find(part, layer)
            return self._fold(self.matrix(part, layer), holder, holder.role.layout.norm, layer)
        holder = self._head_holder()
        is_tied = holder.role.part != "head" and self.unfolded_because is None and self.has("final_norm")
        return self._fold(self.head(), holder, "final_norm" if is_tied else holder.role.layout.norm, None)

    def mlps(self, layer: int) -> tuple[MlpPlace, ...]:
        """Every MLP of a layer that is complete (up and down), from headers: dense, shared, routed by number."""
        found = []
        for whose, kind in KINDS.items():
            for expert in self._parts.experts(layer, whose):
                if not self._parts.holds("down", layer, whose, expert):
                    continue
                units, width = self._parts.shape(self._parts.find("up", layer, whose, expert), "up")
                has_gate = self._parts.holds("gate", layer, whose, expert)
                elements = units * width * (2 + has_gate)
                found.append(MlpPlace(layer, kind, expert, units, has_gate, elements))
        return tuple(found)

    def mlp(self, place: MlpPlace, folded: bool = False, rows: Tensor | None = None) -> Mlp:
        """The matrices of one MLP; `rows` are the hidden units that are wanted, in this order.

        Raises KeyError for a place that is not there, CheckpointUnavailable when it cannot be read.
        """
        whose = None if place.kind == "dense" else place.kind
        names = ("gate", "up", "down") if place.has_gate else ("up", "down")
        holders = {part: self._parts.find(part, place.layer, whose, place.expert) for part in names}
        matrices: dict[str, Tensor] = {}
        for part, holder in holders.items():
            if part not in matrices:
                together = [one for one in names if holders[one] is holder]
                matrices |= self._parts.matrices(holder, together, place.expert, self.device, widen=rows is None)
            matrix = matrices[part]
            if matrix.shape[part == "down"] != place.units:
                raise CheckpointUnavailable(
                    f"{self._source.where}: {holder.name} holds {matrix.shape[part == 'down']} hidden units as {part}, "
                    f"and {place.units} as up; the checkpoint does not fit its own names"
                )
            if rows is not None:
                matrix = matrix.index_select(int(part == "down"), rows.to(matrix.device)).float()
            norm = holder.role.layout.norm if folded else None
            matrices[part] = self._fold(matrix, holder, norm, place.layer)
        return Mlp(matrices.get("gate"), matrices["up"], matrices["down"])

    def embedding(self, rows: Tensor | None = None) -> Tensor:
        """The token embedding [V, d], or those of its rows that are asked for.

        Raises CheckpointUnavailable for one of another width, which a projection takes to the residual stream.
        """
        width = self._parts.shape(self._parts.find("embedding"), "embedding")[1]
        if width != self.hidden_size:
            raise CheckpointUnavailable(
                f"{self._source.where}: the embedding is {width} wide and the residual stream {self.hidden_size}; "
                "embeddings behind a projection are not compared"
            )
        if rows is None:
            return self.matrix("embedding")
        return self._parts.rows_of(self._parts.find("embedding"), rows, self.device)

    def head(self, rows: Tensor | None = None) -> Tensor:
        """The output projection [V, d], not folded; the embedding where the two are tied."""
        if rows is None:
            return self.matrix("head")
        return self._parts.rows_of(self._head_holder(), rows, self.device)

    def _head_holder(self) -> Holder:
        return self._parts.find("head" if self.has("head") else "embedding")

    def _fold(self, matrix: Tensor, holder: Holder, norm: str | None, layer: int | None) -> Tensor:
        """A norm multiplied into a matrix, in place."""
        if norm is None:
            return matrix
        at = layer if self.has(norm, layer) else None
        if not self.has(norm, at):
            raise CheckpointUnavailable(
                f"{self._source.where}: {holder.name} stands behind {norm} of layer {layer}, which is missing; the "
                "checkpoint is incomplete: download it again"
            )
        centred = self._parts.find(norm, at).role.layout.norm_function == "layer"
        gain = self.gain(norm, at)
        writes = holder.role.layout.residual == "writer" and norm != "final_norm"
        across = 0 if writes else 1
        if gain.shape[0] != matrix.shape[across]:
            raise CheckpointUnavailable(
                f"{self._source.where}: {holder.name} is {list(matrix.shape)}, but {norm} has {gain.shape[0]} gains; "
                "the checkpoint does not fit its own names"
            )
        if writes:
            matrix = matrix.sub_(matrix.mean(0)) if centred else matrix
            return matrix.mul_(gain[:, None])
        matrix.mul_(gain)
        return matrix.sub_(matrix.mean(1, keepdim=True)) if centred else matrix


def latent_query(model: CanonicalModel, layer: int, folded: bool = True) -> Tensor:
    """Multi-head latent attention: W_qb·diag(g)·W_qa, what makes queries of the residual stream; [heads · size, d].

    Free of the basis of the latent space, which the factors are not. The latent norm's root mean square, one number
    for each token, is left out. `folded`: the norm before attention is folded into W_qa.
    Source: DeepSeek-V2, arXiv 2405.04434, equations 37 to 41. Raises KeyError without latent queries.
    """
    first = model.folded("q_a", layer) if folded else model.matrix("q_a", layer)
    return model.folded("q_b", layer) @ first


def latent_key_value(model: CanonicalModel, layer: int, folded: bool = True) -> Tensor:
    """Multi-head latent attention: W_kvb·diag(g)·W_kva, keys without position and values; [heads · (nope + v), d].

    As `latent_query`; the rows of W_kva that are rotated keys of their own stand behind its latent rows, see
    `latent_rotary_key`. Source: arXiv 2405.04434, equations 9 to 11, 41 to 43.
    """
    second = model.folded("kv_b", layer)
    first = model.folded("kv_a", layer) if folded else model.matrix("kv_a", layer)
    return second @ first[: second.shape[1]]


def latent_rotary_key(model: CanonicalModel, layer: int, folded: bool = True) -> Tensor:
    """Multi-head latent attention: the key that all heads share and that alone is rotated; [rope, d].

    Source: arXiv 2405.04434, equation 43.
    """
    rank = model.matrix("kv_b", layer).shape[1]
    first = model.folded("kv_a", layer) if folded else model.matrix("kv_a", layer)
    return first[rank:]
