"""The entries of the catalogue: one YAML file per model, every figure with its source."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from checks.catalog.architecture import FIELD_TYPES, Architecture
from checks.catalog.document import CatalogError, Document, parse

__all__ = [
    "MODELS",
    "CatalogEntry",
    "CatalogError",
    "Figure",
    "UnknownModelError",
    "comparable",
    "keys",
    "load",
    "load_all",
    "main_component",
    "read",
]

MODELS = Path(__file__).with_name("models")
KEY = re.compile(r"[a-z0-9_.]+")
# A repository of the hub, and the commit if one is named: a mirror is read only while its shards are the original's.
MIRROR = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*(@[0-9a-f]{40})?")
DATE = re.compile(r"\d{4}(-\d{2}){0,2}")
TOP_KEYS = {
    "name",
    "repo",
    "gated",
    "mirrors",
    "developer",
    "released",
    "derived_from",
    "sources",
    "architecture",
    "prefix",
    "components",
    "parameters",
    "training",
    "tokenizer",
    "notes",
}
FIGURE_KEYS = {"value", "source", "unverified", "within", "without", "adding", "note"}
PARTS_OF_A_COUNT = {"embedding", "head", "mtp"}
TRAINING_KEYS = {
    "tokens",
    "mid_training_tokens",
    "synthetic_tokens",
    "accelerator",
    "accelerator_count",
    "accelerator_hours",
    "tokens_per_second_per_accelerator",
    "days",
    "precision",
    "sequence_length",
    "utilisation",
    "compute",
    "framework",
}
TOKENIZER_KEYS = {
    "kind",
    "entries",
    "special_tokens",
    "merges",
    "digest",
    "first_byte_id",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "image_token_id",
    "tokenizer_class",
}


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of an entry with its provenance.

    within: tolerance in the unit of the value: half a unit of the last published digit; wider only with a note.
    without: parts that the publisher's parameter count leaves out and `parameters.count` counts ("embedding", "head").
    adding: parts that it has and `parameters.count` leaves out ("mtp", the next-token-prediction block).
    conflicting: figures of other sources for the same thing that say something else.
    """

    value: Any
    source: str
    unverified: bool = False
    within: float | None = None
    without: tuple[str, ...] = ()
    adding: tuple[str, ...] = ()
    note: str | None = None
    conflicting: tuple[Figure, ...] = ()


@dataclass(frozen=True)
class CatalogEntry:
    """What is known of one model.

    parameters: figures "total", "active", "checkpoint" (every tensor of the files) and, for a part, its name.
    training, tokenizer: figures by name. prefixes: component -> its tensors are those whose
    name starts with one of these; empty for a model of one part.
    mirrors: repositories, "org/name" or "org/name@<commit sha>", that hold the same files and are not gated.
    figures: every figure by its path in the file ("architecture.hidden_size", "components.text.architecture.norm").
    """

    key: str
    name: str
    repo: str
    developer: str
    released: str
    components: Mapping[str, Architecture]
    prefixes: Mapping[str, tuple[str, ...]]
    parameters: Mapping[str, Figure]
    training: Mapping[str, Figure]
    tokenizer: Mapping[str, Figure]
    notes: tuple[str, ...]
    sources: Mapping[str, str]
    figures: Mapping[str, Figure]
    derived_from: tuple[str, ...] = ()
    mirrors: tuple[str, ...] = ()
    gated: bool | None = None


class UnknownModelError(LookupError):
    """No such model in the catalogue."""

    def __init__(self, key: str) -> None:
        close = difflib.get_close_matches(key, keys(), n=3)
        hint = f"; did you mean {' or '.join(repr(name) for name in close)}?" if close else ""
        super().__init__(f"no model {key!r} in the catalogue{hint}")
        self.key = key
        self.suggestions = tuple(close)


@cache
def keys() -> tuple[str, ...]:
    """The keys of all models in the catalogue, sorted. Lists the directory, opens no file."""
    return tuple(sorted(path.stem for path in MODELS.glob("*.yaml")))


@cache
def load(key: str) -> CatalogEntry:
    """The entry of one model. Raises UnknownModelError with a suggestion, CatalogError for a malformed file."""
    path = MODELS / f"{key}.yaml"
    if not KEY.fullmatch(key) or not path.is_file():
        raise UnknownModelError(key)
    return read(path)


def load_all() -> dict[str, CatalogEntry]:
    """All entries by key, in the order of the keys."""
    return {key: load(key) for key in keys()}


def main_component(components: Mapping[str, Architecture]) -> str:
    """Which component is the language model: "text" if there is one, else "model"."""
    return "text" if "text" in components else "model"


def comparable(component: str = "model") -> Iterator[tuple[str, str, Architecture]]:
    """All (key, component, architecture) of the catalogue of one kind: "text" and "model" are the same kind."""
    kinds = {"text", "model"} if component in ("text", "model") else {component}
    for key, entry in load_all().items():
        for name, architecture in entry.components.items():
            if name in kinds:
                yield key, name, architecture


def read(path: Path) -> CatalogEntry:
    """Reads one catalogue file from anywhere; the key is the stem of its name.

    Raises CatalogError with file, line and key for anything malformed: an unknown or duplicate key,
    a figure without a declared source, a value of the wrong type.
    """
    return _Reader(path).entry()


@dataclass
class _Reader:
    path: Path
    figures: dict[str, Figure] = field(default_factory=dict)

    def entry(self) -> CatalogEntry:
        self.document: Document = parse(self.path)
        top = self.document.mapping((), TOP_KEYS)
        key = self.path.stem
        if not KEY.fullmatch(key):
            raise self.document.error((), f"the file name must match {KEY.pattern}")
        self.sources = {
            str(name): self.document.text(("sources", name)) for name in self.document.mapping(("sources",))
        }
        components, prefixes = self._components(top)
        released = self._required_text("released")
        if not DATE.fullmatch(released):
            raise self.document.error(("released",), "expected YYYY, YYYY-MM or YYYY-MM-DD")
        gated = self._figure(("gated",)).value if "gated" in top else None
        return CatalogEntry(
            key=key,
            name=self.document.text(("name",)),
            repo=self._required_text("repo"),
            developer=self._required_text("developer"),
            released=released,
            components=components,
            prefixes=prefixes,
            parameters=self._section("parameters", {"total", "active", "checkpoint", *components}),
            training=self._section("training", TRAINING_KEYS),
            tokenizer=self._section("tokenizer", TOKENIZER_KEYS),
            notes=tuple(self.document.texts(("notes",))) if "notes" in top else (),
            sources=self.sources,
            figures=self.figures,
            derived_from=self._list("derived_from") if "derived_from" in top else (),
            mirrors=self._mirrors() if "mirrors" in top else (),
            gated=gated if isinstance(gated, bool) else None,
        )

    def _components(self, top: Mapping[str, object]) -> tuple[dict[str, Architecture], dict[str, tuple[str, ...]]]:
        if ("architecture" in top) == ("components" in top):
            raise self.document.error((), "expected either architecture or components")
        if "architecture" in top:
            prefixes = {"model": self._list("prefix")} if "prefix" in top else {}
            return {"model": self._architecture(("architecture",))}, prefixes
        components: dict[str, Architecture] = {}
        prefixes = {}
        for name in self.document.mapping(("components",)):
            part = self.document.mapping(("components", name), {"prefix", "architecture"})
            where = ("components", name)
            components[name] = (
                self._architecture((*where, "architecture")) if "architecture" in part else Architecture()
            )
            if "prefix" in part:
                prefixes[name] = self._list(*where, "prefix")
        return components, prefixes

    def _architecture(self, where: tuple[str, ...]) -> Architecture:
        row: dict[str, Any] = {}
        for name in self.document.mapping(where, set(FIELD_TYPES)):
            figure = self._figure((*where, name))
            value, kind = figure.value, FIELD_TYPES[name]
            fits = {
                "int": type(value) is int,
                "float": type(value) in (int, float),
                "str": isinstance(value, str),
                "bool": isinstance(value, bool),
                "tuple[int, ...]": isinstance(value, tuple) and all(type(item) is int for item in value),
            }[kind]
            if not fits:
                raise self.document.error((*where, name), f"expected {kind}, found {value!r}")
            row[name] = float(value) if kind == "float" else value
        return Architecture(**row)

    def _section(self, name: str, allowed: set[str]) -> dict[str, Figure]:
        if not self.document.has((name,)):
            return {}
        return {key: self._figure((name, key)) for key in self.document.mapping((name,), allowed)}

    def _figure(self, where: tuple[str, ...]) -> Figure:
        value = self.document.value(where)
        if isinstance(value, list):
            found = [self._one_figure(where, item) for item in value]
            if not found:
                raise self.document.error(where, "expected a figure {value, source}")
            figure = replace(found[0], conflicting=tuple(found[1:]))
        else:
            figure = self._one_figure(where, value)
        self.figures[".".join(where)] = figure
        return figure

    def _one_figure(self, where: tuple[str, ...], raw: object) -> Figure:
        document = self.document
        if not isinstance(raw, dict) or "value" not in raw:
            raise document.error(where, f"expected a figure {{value, source}}, found {raw!r}")
        unknown = sorted(str(key) for key in raw if key not in FIGURE_KEYS)
        if unknown:
            raise document.error(where, f"unknown key {unknown[0]!r}; known: {', '.join(sorted(FIGURE_KEYS))}")
        value, source, within, note = raw["value"], raw.get("source"), raw.get("within"), raw.get("note")
        value = tuple(value) if isinstance(value, list) else value
        if not all(isinstance(item, str | int | float) for item in (value if isinstance(value, tuple) else (value,))):
            raise document.error(where, f"expected a string, number, true or false, or a list of them, found {value!r}")
        if not isinstance(source, str) or source not in self.sources:
            raise document.error(where, f"source {source!r} is not declared under sources")
        if not isinstance(raw.get("unverified", False), bool):
            raise document.error(where, "expected unverified: true or false")
        if not isinstance(within, int | float | None) or not isinstance(note, str | None):
            raise document.error(where, "expected within: a number, note: a string")
        changes = {}
        for name in ("without", "adding"):
            listed = raw.get(name, [])
            if not isinstance(listed, list) or not PARTS_OF_A_COUNT.issuperset(map(str, listed)):
                raise document.error(where, f"expected {name}: a list of {', '.join(sorted(PARTS_OF_A_COUNT))}")
            changes[name] = tuple(listed)
        return Figure(value, source, raw.get("unverified", False), within, changes["without"], changes["adding"], note)

    def _mirrors(self) -> tuple[str, ...]:
        mirrors = self._list("mirrors")
        for mirror in mirrors:
            if not MIRROR.fullmatch(mirror):
                raise self.document.error(("mirrors",), f"expected org/name or org/name@<commit sha>, found {mirror!r}")
        return mirrors

    def _required_text(self, name: str) -> str:
        value = self._figure((name,)).value
        if not isinstance(value, str):
            raise self.document.error((name,), f"expected a string (quote dates), found {value!r}")
        return value

    def _list(self, *where: str) -> tuple[str, ...]:
        value = self._figure(where).value
        if not isinstance(value, tuple):
            raise self.document.error(where, f"expected a list, found {value!r}")
        return tuple(str(item) for item in value)
