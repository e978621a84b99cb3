"""Where each part of a model is stored, and each by itself: split from fused tensors, taken from stacks of experts.

Everything but the values comes from headers, and of the values only those are read that are asked for, as far as the
layout allows: one expert of a stack, the rows of one fused part.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.inferred import largest_stack
from checks.checkpoint.roles import TensorRole
from checks.checkpoint.stored_weight import StoredWeight, TensorSource, read_weight, stored_weight
from checks.checkpoint.template import LARGEST_COUNT, component_config, stated_count

if TYPE_CHECKING:
    from torch import Tensor

MLP_PARTS = frozenset({"gate", "up", "down"})
# Layer (None: of the whole model), whose ("routed", "shared", or None), part, expert (None: the only one, or all).
Place = tuple[int | None, str | None, str, int | None]


@dataclass(frozen=True)
class Holder:
    """The tensor that holds a part: alone, fused with others, or for every expert."""

    name: str
    role: TensorRole


class Parts:
    """The parts of one component's main stack. `component`: text or vision; None for text if there is any, else vision.

    Blocks that predict further tokens are no part of it.
    """

    def __init__(self, source: TensorSource, component: str | None = None) -> None:
        self.source = source
        roles = {name: one.role for name, one in source.tensors.items() if isinstance(one.role, TensorRole)}
        known = {role.component for role in roles.values()}
        self.component = component or ("text" if "text" in known or "vision" not in known else "vision")
        roles = {name: role for name, role in roles.items() if role.component == self.component}
        # The name prefix of the layers, where it was inferred which they are.
        self.stack = stack = largest_stack(roles.values())[1] if source.roles.inferred_because else None
        self._places: dict[Place, Holder] = {}
        self.ambiguous: dict[str, str] = {}  # tensor → another one that claims the same place
        for name, role in roles.items():
            if role.companion_of is None and (stack is None or role.layer is None or role.stack == stack):
                self._add(Holder(name, role))
        self._weights: dict[str, StoredWeight] = {}
        self.config: Mapping[str, Any] = component_config(source.config, self.component) or source.config

    def _add(self, holder: Holder) -> None:
        role = holder.role
        for part in role.layout.fused or ((role.part,) if role.part else ()):
            place = (role.layer, role.layout.experts, part, role.expert)
            other = self._places.setdefault(place, holder)
            if other is not holder:
                self.ambiguous[holder.name] = other.name

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """The numbers of the layers, ascending."""
        return tuple(sorted({layer for layer, *_ in self._places if layer is not None}))

    @cached_property
    def by_layer(self) -> Mapping[int | None, Mapping[Place, Holder]]:
        """What each layer holds; under None what belongs to none."""
        found: dict[int | None, dict[Place, Holder]] = defaultdict(dict)
        for place, holder in self._places.items():
            found[place[0]][place] = holder
        return found

    def find(self, part: str, layer: int | None = None, whose: str | None = None, expert: int | None = None) -> Holder:
        """Where a part is stored. Raises KeyError if it is not there."""
        found = self._find(part, layer, whose, expert)
        if found is None:
            which = "" if layer is None else f" of layer {layer}"
            whose = "" if whose is None else f" ({whose} expert{'' if expert is None else f' {expert}'})"
            raise KeyError(f"{self.source.where} has no {part!r}{which}{whose}")
        return found

    def holds(self, part: str, layer: int | None = None, whose: str | None = None, expert: int | None = None) -> bool:
        """Is a part stored?"""
        return self._find(part, layer, whose, expert) is not None

    def _find(self, part: str, layer: int | None, whose: str | None, expert: int | None) -> Holder | None:
        return self._places.get((layer, whose, part, expert)) or self._places.get((layer, whose, part, None))

    def experts(self, layer: int, whose: str | None) -> tuple[int | None, ...]:
        """The routed experts of a layer by number, from whatever holds their `up`; (None,) for a shared one."""
        places = self.by_layer.get(layer, {})
        single = sorted(
            expert for _, one, part, expert in places if (one, part) == (whose, "up") and expert is not None
        )
        if not self.holds("up", layer, whose):
            return tuple(single)
        holder = self.find("up", layer, whose)
        return tuple(range(self._in_stack(holder))) if holder.role.layout.stacked else (None,)

    def shape(self, holder: Holder, part: str) -> tuple[int, int]:
        """[out, in] of one part (of one expert), from headers. Raises CheckpointUnavailable for a format not read."""
        weight, layout = self._weight(holder), holder.role.layout
        shape = list(weight.shape)
        if layout.stacked == "axis":
            del shape[0]
        elif layout.stacked == "rows":
            shape[0] //= self._in_stack(holder)
        if len(shape) != 2:
            raise self._unfit(holder, "expected a matrix")
        if layout.transposed and not weight.is_oriented:
            shape.reverse()
        rows = self._split(holder, shape[0])
        return (rows[part] if rows else shape[0]), shape[1]

    def vector(self, holder: Holder, device: str) -> Tensor:
        """A tensor of one dimension as float32."""
        vector = read_weight(self.source, self._weight(holder), None, device)
        if vector.dim() != 1:
            raise self._unfit(holder, "expected one dimension")
        return vector

    def matrix(self, holder: Holder, part: str, expert: int | None, device: str) -> Tensor:
        """One part as a float32 matrix [out, in] of its own. Raises CheckpointUnavailable when it cannot be had."""
        return self.matrices(holder, (part,), expert, device)[part]

    def matrices(
        self, holder: Holder, parts: Sequence[str], expert: int | None, device: str, widen: bool = True
    ) -> dict[str, Tensor]:
        """Parts that one tensor holds, each as `matrix` gives it; what cannot be read apart is read once for all.

        Without `widen` plain weights keep their stored type.
        """
        if not self._is_whole(holder):
            return {part: self._read(holder, self._range(holder, part, expert), device, widen) for part in parts}
        whole = self._read(holder, self._range(holder, parts[0], expert), device, widen)
        rows = self._split(holder, whole.shape[0])
        return {part: self._take(holder, whole, part, rows).contiguous() if rows else whole for part in parts}

    def _read(self, holder: Holder, rows: slice | None, device: str, widen: bool) -> Tensor:
        """A stored matrix, or some of its rows, or one of a stack: [out, in]."""
        weight, layout = self._weight(holder), holder.role.layout
        matrix = read_weight(self.source, weight, rows, device, widen)
        matrix = matrix.squeeze(0) if layout.stacked == "axis" else matrix
        if matrix.dim() != 2:
            raise self._unfit(holder, "expected a matrix")
        return (matrix.T if layout.transposed and not weight.is_oriented else matrix).contiguous()

    def rows_of(self, holder: Holder, rows: Tensor, device: str) -> Tensor:
        """Some rows of a table, in the order asked for; of a plainly stored one little more than them is read."""
        import torch

        weight = self._weight(holder)
        wanted, place = torch.unique(rows.cpu().long(), return_inverse=True)
        if len(wanted) and not 0 <= int(wanted[0]) <= int(wanted[-1]) < weight.shape[0]:
            raise IndexError(f"rows {int(wanted[0])} to {int(wanted[-1])} of a table of {weight.shape[0]}")
        if not weight.has_plain_rows or holder.role.layout.transposed:
            return self.matrix(holder, str(holder.role.part), None, device)[rows.to(device)]
        runs = [
            read_weight(self.source, weight, slice(int(run[0]), int(run[-1]) + 1))[run - run[0]]
            for run in _runs(wanted, max(1, LARGEST_GAP // max(1, weight.shape[-1])))
        ]
        found = torch.cat(runs) if runs else torch.empty((0, weight.shape[-1]))
        return found[place].to(device)

    def _weight(self, holder: Holder) -> StoredWeight:
        if holder.name not in self._weights:
            self._weights[holder.name] = stored_weight(self.source, holder.name)
        return self._weights[holder.name]

    def _in_stack(self, holder: Holder) -> int:
        """How many experts one tensor holds: a stack by rows does not say, but the router has a row for each."""
        if holder.role.layout.stacked == "axis":
            return self._weight(holder).shape[0]
        stated = stated_count(self.config, "experts", 0)
        if stated == 0 and self.holds("router", holder.role.layer):
            stated = self.shape(self.find("router", holder.role.layer), "router")[0]
        if not 0 < stated <= LARGEST_COUNT or self._weight(holder).shape[0] % stated:
            raise self._unfit(holder, f"rows of {stated} experts expected")
        return stated

    def _is_whole(self, holder: Holder) -> bool:
        """Are all fused parts read together? Only rows that stand one after the other can be read apart."""
        layout, weight = holder.role.layout, self._weight(holder)
        return bool(
            layout.transposed or layout.stacked or layout.interleaved or layout.grouped or not weight.has_plain_rows
        )

    def _range(self, holder: Holder, part: str, expert: int | None) -> slice | None:
        """The entries along the first axis that hold a part; None for all."""
        layout, weight = holder.role.layout, self._weight(holder)
        if layout.stacked:
            count = self._in_stack(holder)
            if expert is None or not 0 <= expert < count:
                raise KeyError(f"{holder.name} holds experts 0 to {count - 1}, not {expert}")
            size = 1 if layout.stacked == "axis" else weight.shape[0] // count
            return slice(expert * size, (expert + 1) * size)
        rows = None if self._is_whole(holder) else self._split(holder, weight.shape[0])
        if not rows:
            return None
        start = sum(size for one, size in list(rows.items())[: list(rows).index(part)])
        return slice(start, start + rows[part])

    def _split(self, holder: Holder, total: int) -> dict[str, int]:
        """How many of `total` rows each fused part has, in stored order; nothing if the tensor holds one part."""
        fused, layer = holder.role.layout.fused, holder.role.layer
        if not fused:
            return {}
        if holder.role.layout.grouped:
            _, key_heads, size = self._heads(holder, total)
            rows = {"q": total - 2 * key_heads * size, "k": key_heads * size, "v": key_heads * size}
        elif fused == ("q", "k", "v") and self.holds("o", layer):
            # Keys and values are as wide as each other; queries as what the output projection reads.
            queries = self.shape(self.find("o", layer), "o")[1]
            rows = {"q": queries, "k": (total - queries) // 2, "v": (total - queries) // 2}
        else:
            rows = dict.fromkeys(fused, total // len(fused))
        if sum(rows.values()) != total or min(rows.values()) < 0:
            raise self._unfit(holder, f"{total} rows cannot be those of {', '.join(fused)}")
        return rows

    def _heads(self, holder: Holder, total: int) -> tuple[int, int, int]:
        """Query heads, key heads, and the rows of each."""
        heads = stated_count(self.config, "heads", 0)
        key_heads = stated_count(self.config, "key_heads", heads)
        if heads <= 0 or key_heads <= 0 or heads % key_heads or total % (heads + 2 * key_heads):
            raise self._unfit(holder, f"config.json states {heads} heads and {key_heads} of keys")
        return heads, key_heads, total // (heads + 2 * key_heads)

    def _take(self, holder: Holder, matrix: Tensor, part: str, rows: Mapping[str, int]) -> Tensor:
        """The rows of one of the fused parts."""
        layout, at = holder.role.layout, list(rows).index(part)
        if layout.interleaved:
            return matrix[at :: len(rows)]
        if layout.grouped:
            heads, key_heads, size = self._heads(holder, matrix.shape[0])
            of_each = heads // key_heads
            first, last = (0, of_each) if part == "q" else (of_each + at - 1, of_each + at)
            groups = matrix.reshape(key_heads, of_each + 2, size, matrix.shape[1])
            return groups[:, first:last].reshape(-1, matrix.shape[1])
        start = sum(list(rows.values())[:at])
        return matrix[start : start + rows[part]]

    def _unfit(self, holder: Holder, expected: str) -> CheckpointUnavailable:
        shape = list(self.source.tensors[holder.name].shape)
        return CheckpointUnavailable(
            f"{self.source.where}: {holder.name} {shape} is taken for {holder.role.part!r}, but {expected}; the "
            "checkpoint does not fit its config.json or its own names"
        )


# Numbers between two wanted rows that are rather read than skipped.
LARGEST_GAP = 1 << 15


def _runs(rows: Tensor, gap: int) -> list[Tensor]:
    """Ascending numbers, split where the step to the next is larger than `gap`."""
    if not len(rows):
        return []
    breaks = (rows.diff() > gap).nonzero().flatten() + 1
    return list(rows.tensor_split(breaks))
