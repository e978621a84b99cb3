"""A YAML file as data plus the place in the file of every key and value."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

# The path of a value inside the file: mapping keys and list positions from the top.
KeyPath = tuple[str | int, ...]

# YAML 1.2 core schema: PyYAML's own resolvers read `102.6e9` as text, `no` as false and `2025-05-01` as a date.
_CORE_SCHEMA = (
    ("tag:yaml.org,2002:null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    ("tag:yaml.org,2002:int", r"^[-+]?[0-9]+$", list("-+0123456789")),
    (
        "tag:yaml.org,2002:float",
        r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        list("-+0123456789."),
    ),
)
_CORE_TAGS = frozenset(f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map"))
_BASE_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _CoreLoader(_BASE_LOADER):  # type: ignore[misc]
    """PyYAML's safe loader with the types of YAML 1.2's core schema."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, Any]]] = {}  # noqa: RUF012 - PyYAML's own class attribute


def _register_core_schema() -> None:
    import re

    for tag, pattern, first in _CORE_SCHEMA:
        _CoreLoader.add_implicit_resolver(tag, re.compile(pattern), first)


_register_core_schema()


@dataclass(frozen=True, order=True)
class Mark:
    """A place in a file; line and column count from 1."""

    line: int
    column: int


@dataclass(frozen=True, order=True)
class Problem:
    """One mistake in a claim file, with its place."""

    mark: Mark
    message: str

    def render(self, path: Path) -> str:
        """`path:line:column: message`, the form that editors and compilers use."""
        return f"{path}:{self.mark.line}:{self.mark.column}: {self.message}"


class ClaimError(Exception):
    """A claim file cannot be used. The text holds one located line per mistake, all mistakes of the file at once."""

    def __init__(self, path: Path, problems: Iterable[Problem]) -> None:
        self.path = path
        self.problems = sorted(set(problems))
        super().__init__("\n".join(problem.render(path) for problem in self.problems))


@dataclass(frozen=True)
class Source:
    """The data of a YAML file and the marks of its keys and values."""

    path: Path
    data: Any
    key_marks: Mapping[KeyPath, Mark]
    value_marks: Mapping[KeyPath, Mark]

    def mark(self, key_path: KeyPath) -> Mark:
        """Where `key_path` stands: at its key if it has one, else at the value, else at the nearest parent."""
        path = tuple(key_path)
        while path:
            found = self.key_marks.get(path) or self.value_marks.get(path)
            if found:
                return found
            path = path[:-1]
        return self.value_marks.get((), Mark(1, 1))

    def value_mark(self, key_path: KeyPath) -> Mark:
        """Where the value of `key_path` stands."""
        return self.value_marks.get(tuple(key_path)) or self.mark(key_path)


def suggestion(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known word nearest to `word`, or nothing."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def read_source(path: Path) -> Source:
    """Read a YAML file into data and marks.

    Raises ClaimError for text that is no YAML, for duplicate keys (PyYAML keeps the last in silence), keys that are no
    text, aliases (a claim is read by people, top to bottom), and more than one document.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ClaimError(path, [Problem(Mark(1, 1), f"cannot be read as UTF-8 text: {error}")]) from error
    loader = _CoreLoader(text)
    try:
        node = loader.get_single_node()
        reader = _NodeReader(loader)
        data = None if node is None else reader.read(node, ())
    except yaml.YAMLError as error:
        raise ClaimError(path, [_yaml_problem(error)]) from error
    finally:
        loader.dispose()
    if reader.problems:
        raise ClaimError(path, reader.problems)
    return Source(path=path, data=data, key_marks=reader.key_marks, value_marks=reader.value_marks)


def _yaml_problem(error: yaml.YAMLError) -> Problem:
    mark = getattr(error, "problem_mark", None)
    place = Mark(mark.line + 1, mark.column + 1) if mark else Mark(1, 1)
    return Problem(place, f"not valid YAML: {getattr(error, 'problem', None) or error}")


class _NodeReader:
    """Walks composed YAML nodes, keeping marks and noting what the safe constructor would hide."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self._seen: set[int] = set()
        self.key_marks: dict[KeyPath, Mark] = {}
        self.value_marks: dict[KeyPath, Mark] = {}
        self.problems: list[Problem] = []

    def read(self, node: Any, key_path: KeyPath) -> Any:
        mark = Mark(node.start_mark.line + 1, node.start_mark.column + 1)
        self.value_marks[key_path] = mark
        if id(node) in self._seen:
            self.problems.append(Problem(mark, "aliases (*name) are not used in claims; write the value out"))
            return None
        self._seen.add(id(node))
        if node.tag not in _CORE_TAGS:
            self.problems.append(Problem(mark, f"the tag {node.tag!r} is not used in claims; write plain values"))
            return None
        if isinstance(node, yaml.MappingNode):
            return self._read_mapping(node, key_path)
        if isinstance(node, yaml.SequenceNode):
            return [self.read(child, (*key_path, position)) for position, child in enumerate(node.value)]
        return self._read_scalar(node, mark)

    def _read_scalar(self, node: Any, mark: Mark) -> Any:
        try:
            # PyYAML would read 08 as an octal number.
            value = int(node.value, 10) if node.tag == "tag:yaml.org,2002:int" else self._loader.construct_object(node)
        except ValueError as error:
            self.problems.append(Problem(mark, f"not a number that can be used: {error}"))
            return None
        if isinstance(value, float) and not math.isfinite(value):
            # Every comparison with NaN is false: a bound of NaN would pass everything.
            self.problems.append(Problem(mark, "a number must be finite"))
            return None
        return value

    def _read_mapping(self, node: Any, key_path: KeyPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            mark = Mark(key_node.start_mark.line + 1, key_node.start_mark.column + 1)
            if not isinstance(key_node, yaml.ScalarNode):
                self.problems.append(Problem(mark, "a key must be text"))
                continue
            key = str(key_node.value)
            child_path = (*key_path, key)
            if key in result:
                first = self.key_marks[child_path]
                self.problems.append(Problem(mark, f"duplicate key {key!r}; it stands first in line {first.line}"))
                continue
            self.key_marks[child_path] = mark
            result[key] = self.read(value_node, child_path)
        return result
