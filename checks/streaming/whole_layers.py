"""Whole layers and whole routed experts, spread by a seed over the depth of two checkpoints, within some bytes."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from checks.checkpoint.index import TensorInfo
from checks.checkpoint.roles import Role, TensorRole

# Layers that are read whole before more experts of each are.
LAYERS_WITH_EXPERTS = 6
# More experts in one tensor are not believed.
MOST_EXPERTS = 10_000
NO_MATRIX = frozenset({"embedding", "output", "norm", "router", "bias"})

# The layers that are read whole, each with its routed experts that are.
Picked = Mapping[int, tuple[int, ...]]


@dataclass
class Layer:
    """The tensors of one layer, apart from those that are read anyway. `stacked` ones hold `count` experts each."""

    base: list[TensorInfo] = field(default_factory=list)
    experts: dict[int, list[TensorInfo]] = field(default_factory=lambda: defaultdict(list))
    stacked: list[TensorInfo] = field(default_factory=list)
    count: int = 0

    @property
    def numbers(self) -> list[int]:
        """Its routed experts."""
        return sorted(self.experts) if self.experts else [*range(self.count)]

    def is_whole(self, whole: Collection[str]) -> bool:
        """Is all of it read, routed experts apart, if these tensors are?"""
        return all(tensor.name in whole for tensor in self.base)

    def whole_experts(self, whole: Collection[str], picked: Collection[int]) -> tuple[int, ...]:
        """Which of its routed experts are read, if these tensors are, and of stacked ones those that were picked?"""
        return tuple(
            number
            for number in self.numbers
            if (not self.stacked or number in picked or all(tensor.name in whole for tensor in self.stacked))
            and all(tensor.name in whole for tensor in self.experts.get(number, ()))
        )

    def bytes(self, experts: Collection[int]) -> int:
        """Bytes of the layer with these experts."""
        whole = [*self.base, *(tensor for expert in experts for tensor in self.experts.get(expert, ()))]
        return sum(map(_size, whole)) + sum(_size(tensor) // self.count for tensor in self.stacked) * len(experts)


@dataclass(frozen=True)
class Layers:
    """The layers of a checkpoint's main stack; where no name numbers a layer, every matrix is one, in stored order."""

    layers: Mapping[int, Layer]
    are_numbered: bool

    def of(self, name: str) -> int | None:
        """The layer that consists of this matrix, where no name numbers a layer."""
        if self.are_numbered:
            return None
        return next((number for number, layer in self.layers.items() if layer.base[0].name == name), None)


def layers_of(tensors: Iterable[TensorInfo], roles: Mapping[str, Role], anyway: Collection[str]) -> Layers:
    """The layers of the stack that holds the most elements. `anyway`: names of tensors that are read in any case."""
    tensors = [*tensors]
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        role = roles[tensor.name]
        if role.layer is not None and not _predicts_further(role):
            sizes[role.stack] += tensor.elements
    if not sizes:
        rest = [tensor for tensor in tensors if tensor.name not in anyway]
        matrices = [tensor for tensor in rest if roles[tensor.name].category not in NO_MATRIX]
        return Layers({number: Layer([tensor]) for number, tensor in enumerate(matrices)}, False)
    stack = sizes.most_common(1)[0][0]
    routers = {
        roles[tensor.name].layer: tensor.shape[0]
        for tensor in tensors
        if roles[tensor.name].category == "router" and len(tensor.shape) == 2
    }
    layers: dict[int, Layer] = defaultdict(Layer)
    for tensor in tensors:
        role = roles[tensor.name]
        if role.layer is None or role.stack != stack or _predicts_further(role):
            continue
        layer, count = layers[role.layer], _stacked_experts(tensor, role, routers.get(role.layer))
        if role.expert is not None:
            group = layer.experts[role.expert]
        elif count and layer.count in (0, count):
            layer.count, group = count, layer.stacked
        else:
            group = layer.base
        if tensor.name not in anyway:
            group.append(tensor)
    return Layers({number: layers[number] for number in sorted(layers)}, True)


def pick_layers(
    sides: tuple[Layers, Layers], partners: Mapping[str, str], seed: int, room: int
) -> tuple[Picked, Picked]:
    """As many layers as fit into `room` bytes of both sides together, and of routed experts as many as then fit.

    With experts first up to six layers with one expert each, then more experts, then more layers. One layer, with one
    expert, is picked even if it does not fit. `partners`: the reference's tensor by the candidate's.
    """

    def cost(layers: int, experts: int) -> int:
        return _cost(sides, _pick(sides, partners, seed, layers, experts))

    depth = len(sides[0].layers)
    width = max((len(layer.numbers) for side in sides for layer in side.layers.values()), default=0)
    if not width:
        layers = _largest(1, depth, lambda count: cost(count, 0) <= room)
        return _pick(sides, partners, seed, layers, 0)
    layers = _largest(1, min(depth, LAYERS_WITH_EXPERTS), lambda count: cost(count, 1) <= room)
    experts = _largest(1, width, lambda count: cost(layers, count) <= room)
    if experts == width:
        layers = _largest(layers, depth, lambda count: cost(count, width) <= room)
    return _pick(sides, partners, seed, layers, experts)


def least_bytes(sides: tuple[Layers, Layers], partners: Mapping[str, str], seed: int) -> int:
    """Bytes of the least that `pick_layers` picks."""
    return _cost(sides, _pick(sides, partners, seed, 1, 1))


def picked_bytes(sides: tuple[Layers, Layers], picked: tuple[Picked, Picked]) -> int:
    """Bytes of what was picked on both sides."""
    return _cost(sides, picked)


def spread(count: int, chosen: int, seed: int) -> list[int]:
    """Some of `count` places: the first, the last, and of equal strata between them one each, drawn by the seed.

    Of one any place. So no place but the ends is read in every run, and none is never read.
    """
    chosen = min(chosen, count)
    draw = random.Random(seed)
    if chosen <= 1:
        return [draw.randrange(count) for _ in range(chosen)]
    between, strata = count - 2, chosen - 2
    edges = [1 + stratum * between // strata for stratum in range(strata)] + [count - 1] if strata else []
    return [0, *(draw.randrange(start, stop) for start, stop in pairwise(edges)), count - 1]


def _pick(
    sides: tuple[Layers, Layers], partners: Mapping[str, str], seed: int, layers: int, experts: int
) -> tuple[Picked, Picked]:
    ours, theirs = ([*side.layers] for side in sides)
    places = spread(len(ours), layers, seed)
    picked = [ours[place] for place in places]
    if not sides[0].are_numbered and not sides[1].are_numbered:
        names = [sides[0].layers[number].base[0].name for number in picked]
        counterparts = {sides[1].of(partners[name]) for name in names if name in partners}
        others = sorted(number for number in counterparts if number is not None)
    else:
        # The reference's layers at the same relative depth.
        scale = (len(theirs) - 1) / max(1, len(ours) - 1)
        others = sorted({theirs[round(place * scale)] for place in places}) if theirs else []
    return (
        {number: _pick_experts(sides[0].layers[number], experts, seed) for number in picked},
        {number: _pick_experts(sides[1].layers[number], experts, seed) for number in others},
    )


def _pick_experts(layer: Layer, count: int, seed: int) -> tuple[int, ...]:
    """Evenly spread experts, turned by the seed: the same on both sides if they have equally many."""
    numbers = layer.numbers
    count = min(count, len(numbers))
    return tuple(sorted(numbers[(seed + place * len(numbers) // count) % len(numbers)] for place in range(count)))


def _cost(sides: tuple[Layers, Layers], picked: tuple[Picked, Picked]) -> int:
    return sum(
        side.layers[number].bytes(experts)
        for side, one in zip(sides, picked, strict=True)
        for number, experts in one.items()
    )


def _largest(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The largest number that fits, if it and all below do; `low` if none does."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _stacked_experts(tensor: TensorInfo, role: Role, routed: int | None) -> int:
    """How many routed experts a tensor holds one after the other; 0 if it holds none, or no whole bytes of each."""
    if not isinstance(role, TensorRole) or role.layout.experts != "routed" or not tensor.shape:
        return 0
    count = tensor.shape[0] if role.layout.stacked == "axis" else routed or 0
    if role.layout.stacked is None or not 0 < count <= MOST_EXPERTS or tensor.shape[0] % count:
        return 0
    whole = _size(tensor) and tensor.elements % count == 0 and _size(tensor) % tensor.elements == 0
    return count if whole else 0


def _predicts_further(role: Role) -> bool:
    """Does it belong to a block that predicts further tokens, behind the main stack?"""
    return isinstance(role, TensorRole) and role.component == "mtp"


def _size(tensor: TensorInfo) -> int:
    return tensor.stop - tensor.start
