"""Which tensors and which MLPs of two checkpoints play the same part: by role where templates say, else by name."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass, replace

from checks.checkpoint.checkpoint import Checkpoint, TensorEntry
from checks.checkpoint.roles import Layout, TensorRole

# What names the tensors that belong to no layer.
OUTSIDE_LAYERS = "outside layers"

# The matrices of one MLP, by kind (gate, up, down).
Matrices = dict[str, TensorEntry]


@dataclass(frozen=True)
class MlpPair:
    """An MLP of the candidate and its counterpart, all of whose matrices have equal shapes."""

    module: str  # the candidate's name of it
    ours: Matrices
    theirs: Matrices

    @property
    def elements(self) -> int:
        """Elements of the candidate's matrices."""
        return sum(entry.elements for entry in self.ours.values())

    @property
    def bytes(self) -> int:
        """Stored bytes of the matrices of both sides."""
        entries = (*self.ours.values(), *self.theirs.values())
        return sum(entry.stored.stop - entry.stored.start for entry in entries)

    @property
    def fits(self) -> bool:
        """Do the matrices of either side agree about the number of hidden units?"""
        units = self.ours["up"].shape[0]
        gate = self.ours.get("gate", self.ours["up"])
        return self.ours["down"].shape[1] == units == gate.shape[0]


def template_role(checkpoint: Checkpoint, entry: TensorEntry) -> TensorRole | None:
    """The role that a template gives a tensor; None for one that was guessed from names and shapes."""
    is_given = checkpoint.roles.inferred_because is None and entry.stored_name in checkpoint.roles.roles
    return entry.role if is_given and isinstance(entry.role, TensorRole) else None


def predicts_further_tokens(entry: TensorEntry) -> bool:
    """Is the tensor part of a block beside the main stack, whose layer counts on after the last?"""
    return isinstance(entry.role, TensorRole) and entry.role.component == "mtp"


def layer_label(entry: TensorEntry) -> str:
    """The layer that a tensor belongs to, as text: what is measured, kept and resumed as one."""
    return OUTSIDE_LAYERS if entry.role.layer is None else f"{entry.role.stack}{entry.role.layer}"


def tensor_pairs(candidate: Checkpoint, reference: Checkpoint) -> dict[str, str]:
    """The reference's tensor for each of the candidate's that it can be compared with, element by element.

    Of equal role and stored the same way, where templates give both sides roles; else of equal name. The shapes are
    equal and both hold floats. Each tensor is in one pair.
    """
    theirs = _by_role(reference)
    pairs = {}
    for role, entry in _by_role(candidate).items():
        other = theirs.get(role)
        if other is not None and _can_be_compared(entry, other) and _storage(entry) == _storage(other):
            pairs[entry.name] = other.name
    taken = set(pairs.values())
    for name, entry in candidate.tensors.items():
        other = reference.tensors.get(name)
        if name not in pairs and other is not None and name not in taken and _can_be_compared(entry, other):
            pairs[name] = name
    return pairs


def mlp_pairs(candidate: Checkpoint, reference: Checkpoint) -> list[MlpPair]:
    """Every MLP of the candidate with a counterpart of equal shapes.

    Paired by component, layer, kind of expert and expert where templates give both sides roles; else by the name of the
    module; one whose name the reference lacks by layer, category and expert, if that is unambiguous.
    """
    ours, theirs = _mlps(candidate), _mlps(reference)
    by_place = {place: module for module, matrices in theirs.items() if (place := _place(reference, matrices))}
    paired = {}
    for module, matrices in ours.items():
        place = _place(candidate, matrices)
        if place in by_place:
            paired[module] = by_place[place]
    taken = set(paired.values())
    unnamed: dict[Hashable, list[str]] = defaultdict(list)
    for module, matrices in theirs.items():
        if module not in ours and module not in taken:
            unnamed[_rough_place(matrices)].append(module)
    for module, matrices in ours.items():
        if module in paired:
            continue
        if module in theirs and module not in taken:
            paired[module] = module
        elif len(candidates := unnamed.get(_rough_place(matrices), [])) == 1:
            paired[module] = candidates[0]
    pairs = (MlpPair(module, ours[module], theirs[paired[module]]) for module in ours if module in paired)
    return [pair for pair in pairs if _shapes(pair.ours) == _shapes(pair.theirs)]


def _by_role(checkpoint: Checkpoint) -> dict[Hashable, TensorEntry]:
    """The tensors that are alone in their place in the model."""
    places: dict[Hashable, list[TensorEntry]] = defaultdict(list)
    for entry in checkpoint.tensors.values():
        role = template_role(checkpoint, entry)
        if role is not None:
            # Several tensors may describe one weight: scales, zero points, shapes.
            leaf = entry.name.rpartition(".")[2] if role.companion_of else None
            places[role.component, role.layer, role.part, role.expert, role.layout.experts, role.packed, leaf].append(
                entry
            )
    return {place: entries[0] for place, entries in places.items() if len(entries) == 1}


def _can_be_compared(ours: TensorEntry, theirs: TensorEntry) -> bool:
    return ours.is_float and theirs.is_float and ours.shape == theirs.shape


def _storage(entry: TensorEntry) -> Layout | None:
    """How the elements are ordered; not what they are connected to."""
    if not isinstance(entry.role, TensorRole):
        return None
    return replace(entry.role.layout, residual=None, norm=None, norm_function=None, zero_centred=False, tied_to=None)


def _mlps(checkpoint: Checkpoint) -> dict[str, Matrices]:
    """Every MLP with up and down matrices, by the name of its module."""
    modules: dict[str, Matrices] = defaultdict(dict)
    for entry in checkpoint.tensors.values():
        if entry.role.kind is not None and entry.role.layer is not None and len(entry.shape) == 2 and entry.is_float:
            modules[_module(entry.name)][entry.role.kind] = entry
    return {module: matrices for module, matrices in modules.items() if {"up", "down"} <= matrices.keys()}


def _module(name: str) -> str:
    """`model.layers.0.mlp` of `model.layers.0.mlp.up_proj.weight`."""
    return name.removesuffix(".weight").rpartition(".")[0]


def _place(checkpoint: Checkpoint, matrices: Matrices) -> Hashable | None:
    role = template_role(checkpoint, matrices["up"])
    return role and role.mlp_place


def _rough_place(matrices: Matrices) -> Hashable:
    role = matrices["up"].role
    return role.layer, role.category, role.expert


def _shapes(matrices: Matrices) -> dict[str, tuple[int, ...]]:
    return {kind: entry.shape for kind, entry in matrices.items()}
