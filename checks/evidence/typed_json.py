"""Frozen dataclasses of numbers, texts, tuples, mappings and tensors as JSON and back, by their type hints.

The hint says what is expected at every place, in writing and in reading: nothing is made of what does not fit it, and
no class is named by what is read. Numbers come back to the last bit, mappings in their order.
"""

from __future__ import annotations

import base64
import dataclasses
import types
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from math import prod
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin, get_type_hints

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

# Types of tensors, and the bytes of an element.
DTYPES = {"float64": 8, "float32": 4, "int64": 8, "int32": 4, "uint8": 1, "bool": 1}


class Form:
    """Type hints as JSON and back, also where modules import a name for type checkers alone.

    `modules`: those whose dataclasses may occur; they are imported when the form is made. Raises ValueError if two of
    them have one name.
    """

    def __init__(self, modules: Sequence[str]) -> None:
        self._names: dict[str, Any] = {"Mapping": Mapping, "Sequence": Sequence}
        for name in modules:
            for one in vars(import_module(name)).values():
                is_own = isinstance(one, type) and dataclasses.is_dataclass(one) and one.__module__ == name
                if is_own and self._names.setdefault(one.__name__, one) is not one:
                    raise ValueError(f"two classes are called {one.__name__}")
        self._names["Tensor"] = import_module("torch").Tensor
        self._hints_of: dict[Any, dict[str, Any]] = {}

    def result_hint(self, function: Callable[..., Any]) -> Any:
        """What a function says it returns."""
        return get_type_hints(function, localns=self._names)["return"]

    def write(self, value: Any, hint: Any) -> Any:
        """A value as what JSON holds. Raises TypeError for one that does not fit the hint."""
        origin, arguments = get_origin(hint), get_args(hint)
        if origin in (Union, types.UnionType):
            return self._first(lambda one: self.write(value, one), arguments, value)
        if hint is types.NoneType and value is None:
            return None
        if dataclasses.is_dataclass(hint) and type(value) is hint:
            return {name: self.write(getattr(value, name), one) for name, one in self._hints(hint).items()}
        if origin is tuple and isinstance(value, tuple):
            return [self.write(*one) for one in zip(value, _items(arguments, len(value)), strict=True)]
        if origin in (Sequence, list) and isinstance(value, list | tuple):
            return [self.write(one, arguments[0]) for one in value]
        if origin in (Mapping, dict) and isinstance(value, Mapping):
            return [[self.write(key, arguments[0]), self.write(one, arguments[1])] for key, one in value.items()]
        if hint is self._names["Tensor"] and isinstance(value, hint):
            return _write_tensor(value)
        return _scalar(value.item() if isinstance(value, np.generic) else value, hint)

    def read(self, stored: Any, hint: Any) -> Any:
        """What was written. Raises TypeError or ValueError for anything else."""
        origin, arguments = get_origin(hint), get_args(hint)
        if origin in (Union, types.UnionType):
            return self._first(lambda one: self.read(stored, one), arguments, stored)
        if hint is types.NoneType and stored is None:
            return None
        if dataclasses.is_dataclass(hint) and isinstance(stored, dict):
            hints = self._hints(hint)
            if stored.keys() != hints.keys():
                raise ValueError(f"a {hint} has {sorted(hints)}, not {sorted(stored)}")
            return hint(**{name: self.read(stored[name], one) for name, one in hints.items()})  # type: ignore[operator]
        if origin is tuple and isinstance(stored, list):
            return tuple(self.read(*one) for one in zip(stored, _items(arguments, len(stored)), strict=True))
        if origin in (Sequence, list) and isinstance(stored, list):
            found = [self.read(one, arguments[0]) for one in stored]
            return found if origin is list else tuple(found)
        if origin in (Mapping, dict) and isinstance(stored, list):
            return {self.read(key, arguments[0]): self.read(one, arguments[1]) for key, one in stored}
        if hint is self._names["Tensor"]:
            return _read_tensor(stored)
        return _scalar(stored, hint)

    def _hints(self, kind: Any) -> dict[str, Any]:
        """The hint of each field of a dataclass."""
        if kind not in self._hints_of:
            hints = get_type_hints(kind, localns=self._names)
            self._hints_of[kind] = {one.name: hints[one.name] for one in dataclasses.fields(kind) if one.init}
        return self._hints_of[kind]

    @staticmethod
    def _first(convert: Callable[[Any], Any], hints: Sequence[Any], value: Any) -> Any:
        """What the first hint that fits gives."""
        for hint in hints:
            try:
                return convert(hint)
            except (TypeError, ValueError):
                continue
        raise TypeError(f"{type(value).__name__} is none of {', '.join(map(str, hints))}")


def _scalar(value: Any, hint: Any) -> Any:
    """A number, text or truth value. A float may be a whole number, as in Python's own hints; it stays one."""
    if hint in (bool, int, float, str) and (type(value) is hint or (hint is float and type(value) is int)):
        return value
    raise TypeError(f"{type(value).__name__} where {hint} is expected")


def _items(arguments: tuple[Any, ...], count: int) -> tuple[Any, ...]:
    """The hints of the items of a tuple."""
    return (arguments[0],) * count if len(arguments) == 2 and arguments[1] is ... else arguments


def _write_tensor(tensor: Tensor) -> dict[str, Any]:
    values = tensor.detach().cpu().contiguous().numpy()
    if values.dtype.name not in DTYPES:
        raise TypeError(f"a tensor of {values.dtype.name} is not kept")
    data = base64.b64encode(values.tobytes()).decode()
    return {"dtype": values.dtype.name, "shape": [*values.shape], "data": data}


def _read_tensor(stored: Any) -> Tensor:
    import torch

    if not isinstance(stored, dict) or stored.keys() != {"dtype", "shape", "data"}:
        raise ValueError("no tensor")
    dtype, shape = stored["dtype"], stored["shape"]
    if dtype not in DTYPES or not isinstance(shape, list) or not all(type(one) is int and one >= 0 for one in shape):
        raise ValueError(f"no tensor of {dtype} and shape {shape}")
    data = base64.b64decode(stored["data"], validate=True)
    if len(data) != prod(shape) * DTYPES[dtype]:
        raise ValueError(f"{len(data)} bytes are no {dtype} of shape {shape}")
    return torch.from_numpy(np.frombuffer(data, dtype).reshape(shape).copy())
