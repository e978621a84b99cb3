"""A YAML file with the line of every key, so that an error can say where it is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

Where = tuple[str, ...]
LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class CatalogError(ValueError):
    """A catalogue file is malformed; the message is `path:line: key: what`."""


@dataclass(frozen=True, slots=True)
class Document:
    """The plain data of a YAML file and the line, from 1, of every key in it."""

    path: Path
    data: Any
    lines: dict[Where, int]

    def error(self, where: Where, message: str) -> CatalogError:
        """A CatalogError that says where it is."""
        line = next(
            (self.lines[where[:length]] for length in range(len(where), -1, -1) if where[:length] in self.lines), 1
        )
        key = ".".join(where)
        return CatalogError(f"{self.path}:{line}: {key + ': ' if key else ''}{message}")

    def has(self, where: Where) -> bool:
        """Is there such a key?"""
        return where in self.lines

    def value(self, where: Where) -> Any:
        """The value under a key; raises CatalogError when it is missing."""
        data = self.data
        for length, key in enumerate(where, start=1):
            if not isinstance(data, dict) or key not in data:
                raise self.error(where[: length - 1], f"missing key {key!r}")
            data = data[key]
        return data

    def mapping(self, where: Where, allowed: Iterable[str] | None = None) -> dict[str, Any]:
        """The mapping under a key; raises CatalogError for anything else and for a key that is not allowed."""
        value = self.value(where)
        if not isinstance(value, dict):
            raise self.error(where, f"expected a mapping, found {value!r}")
        known = None if allowed is None else set(allowed)
        for key in value:
            if not isinstance(key, str) or (known is not None and key not in known):
                listed = "" if known is None else f"; known: {', '.join(sorted(known))}"
                raise self.error((*where, str(key)), f"unknown key{listed}")
        return value

    def text(self, where: Where) -> str:
        """The string under a key; raises CatalogError for anything else."""
        value = self.value(where)
        if not isinstance(value, str):
            raise self.error(where, f"expected a string, found {value!r}")
        return value

    def texts(self, where: Where) -> list[str]:
        """The list of strings under a key; raises CatalogError for anything else."""
        value = self.value(where)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(where, f"expected a list of strings, found {value!r}")
        return value


def parse(path: Path) -> Document:
    """Reads a YAML file. Raises CatalogError for bad YAML and for duplicate keys, with the line."""
    try:
        loader = LOADER(path.read_text(encoding="utf-8"))
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            raise CatalogError(f"{path}:1: expected a mapping")
        lines: dict[Where, int] = {(): 1}
        _lines(path, node, (), lines)
        return Document(path, loader.construct_document(node), lines)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        problem = getattr(error, "problem", None) or str(error)
        raise CatalogError(f"{path}:{mark.line + 1 if mark else 1}: {problem}") from error
    except CatalogError:
        raise
    except ValueError as error:  # a date or number that the resolver accepts and the constructor refuses
        raise CatalogError(f"{path}:1: {error}") from error


def _lines(path: Path, node: Any, where: Where, lines: dict[Where, int]) -> None:
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        inside = (*where, str(key.value))
        line = key.start_mark.line + 1
        if inside in lines:
            raise CatalogError(f"{path}:{line}: {'.'.join(inside)}: duplicate key, first on line {lines[inside]}")
        lines[inside] = line
        _lines(path, value, inside, lines)
