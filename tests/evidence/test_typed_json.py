from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checks.evidence.typed_json import DTYPES, Form

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Inner:
    number: int
    place: tuple[int, int | None]


@dataclass(frozen=True)
class Outer:
    z: float | None
    name: str
    is_found: bool
    inner: tuple[Inner, ...]
    by_layer: Mapping[int, float]
    detail: dict[str, float | str] = field(default_factory=dict)
    ids: Sequence[int] = ()
    points: Tensor | None = None


FORM = Form([__name__])
floats = st.floats(allow_nan=False)
outers = st.builds(
    Outer,
    st.none() | floats,
    st.text(max_size=5),
    st.booleans(),
    st.lists(st.builds(Inner, st.integers(), st.tuples(st.integers(), st.none() | st.integers()))).map(tuple),
    st.dictionaries(st.integers(), floats, max_size=4),
    st.dictionaries(st.text(max_size=5), floats | st.text(max_size=5), max_size=4),
    st.lists(st.integers(), max_size=4).map(tuple),
)


def again(value: Any, hint: Any) -> Any:
    return FORM.read(json.loads(json.dumps(FORM.write(value, hint))), hint)


@given(outers)
def test_what_is_read_is_what_was_written(value: Outer) -> None:
    found = again(value, Outer)
    assert found == value
    assert repr(found) == repr(value)
    assert again(None, Outer | None) is None
    assert again((value, value), tuple[Outer, ...]) == (value, value)


@pytest.mark.parametrize("value", [-0.0, 5e-324, 0.1, math.inf, -math.inf, 1])
def test_numbers_come_back_to_the_last_bit(value: float) -> None:
    assert repr(again(value, float | None)) == repr(value)
    assert math.isnan(again(math.nan, float))
    assert type(again(np.float64(0.1), float)) is float
    assert type(again(np.int64(3), int)) is int


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors(dtype: str) -> None:
    for shape in ((3, 2), (0, 4), ()):
        tensor = torch.arange(math.prod(shape)).reshape(shape).to(getattr(torch, dtype))
        turned = tensor.permute(tuple(reversed(range(len(shape)))))
        found = again(turned, torch.Tensor)
        assert found.dtype == tensor.dtype
        assert torch.equal(found, turned)
    with pytest.raises(TypeError, match=r"(?i)bfloat16"):
        again(torch.zeros(2, dtype=torch.bfloat16), torch.Tensor)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ("1", int),
        (1.0, int),
        (True, int),
        (1, bool),
        (None, float),
        (1, str),
        ((1, 2, 3), tuple[int, int]),
        (("a",), tuple[int, ...]),
        ({"a": 1}, Mapping[int, int]),
        ({}, Outer),
        (object(), Any),
        (Inner(1, (2, None)), Outer),
        (Inner(1.5, (2, None)), Inner),  # type: ignore[arg-type]
    ],
)
def test_what_does_not_fit_is_not_written(value: Any, hint: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        FORM.write(value, hint)


GOOD: dict[str, Any] = {"number": 1, "place": [2, None]}
TENSOR: dict[str, Any] = {"dtype": "float32", "shape": [2], "data": "AACAPwAAAEA="}


@pytest.mark.parametrize(
    ("stored", "hint"),
    [
        ({**GOOD, "number": "1"}, Inner),
        ({**GOOD, "number": True}, Inner),
        ({**GOOD, "place": [2]}, Inner),
        ({**GOOD, "place": [2, None, 3]}, Inner),
        ({**GOOD, "place": {"2": 3}}, Inner),
        ({**GOOD, "more": 1}, Inner),
        ({"number": 1}, Inner),
        ([1, [2, None]], Inner),
        (None, Inner),
        ([["1", 2.0]], Mapping[int, float]),
        ([[1, 2.0, 3.0]], Mapping[int, float]),
        ({"1": 2.0}, Mapping[int, float]),
        ({**TENSOR, "dtype": "object"}, torch.Tensor),
        ({**TENSOR, "shape": [3]}, torch.Tensor),
        ({**TENSOR, "shape": [-2]}, torch.Tensor),
        ({**TENSOR, "shape": 2}, torch.Tensor),
        ({**TENSOR, "data": "AACAPwAAA!A="}, torch.Tensor),
        ({**TENSOR, "data": 3}, torch.Tensor),
        ([1.0, 2.0], torch.Tensor),
    ],
)
def test_what_does_not_fit_is_not_read(stored: Any, hint: Any) -> None:
    assert FORM.read(GOOD, Inner) == Inner(1, (2, None))
    assert FORM.read(TENSOR, torch.Tensor).tolist() == [1, 2]
    with pytest.raises((TypeError, ValueError)):
        FORM.read(stored, hint)


def test_two_classes_of_one_name() -> None:
    with pytest.raises(ValueError, match="two classes are called Outer"):
        Form([__name__, "tests.evidence.other_outer"])
