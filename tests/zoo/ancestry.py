"""Who descends from whom in the lineage zoo: ancestry.yaml, read and checked."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

FILE = Path(__file__).with_name("ancestry.yaml")
KINDS = ("base", "initial", "snapshot", "innocent", "twin", "derived", "forged")
HALVES = ("setting", "scoring", "small")


@dataclass(frozen=True)
class Training:
    """How long, on what and how fast a model is trained."""

    text: str
    steps: int
    rate: float
    batch: tuple[int, int]
    """Windows of text in a step, and tokens in each."""
    characters: int | None = None
    """How much of the text is used; None: all of it."""
    teacher: str | None = None
    """Name of the model whose predictions are learned, instead of the text alone."""
    lora: int | None = None
    """Rank of the update that is trained and merged; None: all weights are trained."""

    @property
    def tokens(self) -> int:
        """Training tokens, repetitions included."""
        return self.steps * self.batch[0] * self.batch[1]


@dataclass(frozen=True)
class ZooModel:
    """One model of one half. Names are `half/model`, which is also its directory under the zoo's."""

    name: str
    kind: str
    derivation: str
    parents: tuple[str, ...]
    changes: tuple[tuple[str, Mapping[str, Any]], ...]
    training: Training | None
    shape: Mapping[str, Any] | None
    """Keys of the configuration, for a model that starts from random weights."""
    tokenizer: Mapping[str, Any] | None
    """Text, size and (limit of) characters its tokenizer is made of; None: its first parent's."""
    initial: str | None
    order: str
    beside: tuple[str, ...]
    """Models that it is held against, besides the references of all."""
    step: int | None
    unnoticed: str | None
    seed: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "seed", seed_of(self.name))

    @property
    def half(self) -> str:
        """The half it belongs to."""
        return self.name.partition("/")[0]

    @property
    def needs(self) -> tuple[str, ...]:
        """Models that must have been made before."""
        teacher = self.training.teacher if self.training else None
        return tuple(name for name in (*self.parents, teacher, self.initial) if name)


def seed_of(name: str) -> int:
    """The seed that belongs to a name: the first 31 bits of its SHA-256."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") >> 1


@dataclass(frozen=True)
class Ancestry:
    """All models by name, parents before children within a half."""

    models: Mapping[str, ZooModel]

    def of_half(self, half: str) -> list[ZooModel]:
        """The models of one half."""
        return [model for model in self.models.values() if model.half == half]

    def origins(self, name: str) -> frozenset[str]:
        """The models trained from random weights, or random ones, whose weights this one holds.

        An innocent one's origin is itself.
        """
        model = self.models[name]
        if model.kind in ("base", "innocent", "twin", "initial"):
            return frozenset([name])
        return frozenset().union(*(self.origins(parent) for parent in model.parents))

    def relation(self, candidate: str, reference: str) -> str:
        """What is true of a pair: `derived`, `shared initialisation` or `innocent`.

        `derived` says that both hold trained weights of one origin, whichever of the two came first.
        """
        common = self.origins(candidate) & self.origins(reference)
        if any(self.models[origin].kind != "initial" for origin in common):
            return "derived"
        starts = [
            {self.models[origin].initial or origin for origin in self.origins(name)} for name in (candidate, reference)
        ]
        return "shared initialisation" if starts[0] & starts[1] else "innocent"

    def pairs(self, half: str) -> Iterator[tuple[ZooModel, ZooModel, str]]:
        """Every candidate of a half against every reference of it, with their relation.

        References are the bases and those innocent models that are a parent of something, and for one candidate the
        models that its entry names `beside` it; candidates are all models but the reference itself, the initial
        weights and the snapshots of a training.
        """
        models = self.of_half(half)
        parents = {parent for model in models if model.kind == "derived" for parent in model.parents}
        references = [m for m in models if m.kind == "base" or (m.kind == "innocent" and m.name in parents)]
        for reference in references:
            for candidate in models:
                if candidate.name != reference.name and candidate.kind not in ("initial", "snapshot", "forged"):
                    yield candidate, reference, self.relation(candidate.name, reference.name)
        for candidate in models:
            for name in candidate.beside:
                yield candidate, self.models[name], self.relation(candidate.name, name)


@cache
def load_ancestry(path: Path = FILE) -> Ancestry:
    """Read the file; every name that is used must be defined earlier in it.

    Raises ValueError for an unknown kind, name, shape or tokenizer.
    """
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    models: dict[str, ZooModel] = {}
    for half in HALVES:
        options = content["halves"][half]
        wanted = options.get("only", list(content["models"]))
        for name in content["models"]:
            if name in wanted:
                model = _expand(half, name, content["models"][name], options, content)
                if missing := [need for need in (*model.needs, *model.beside) if need not in models]:
                    raise ValueError(f"{path}: {model.name} needs {', '.join(missing)}, not defined before it")
                models[model.name] = model
    return Ancestry(models)


def _expand(
    half: str, name: str, entry: Mapping[str, Any], options: Mapping[str, Any], content: Mapping[str, Any]
) -> ZooModel:
    """One model of one half from its entry."""
    if entry["kind"] not in KINDS:
        raise ValueError(f"{name}: kind {entry['kind']!r}, expected one of {', '.join(KINDS)}")

    def full(other: str | None) -> str | None:
        return f"{half}/{other}" if other else None

    training = None
    if given := entry.get("training"):
        training = Training(
            text=given["text"],
            steps=round(content["amounts"][given["amount"]] * options["scale"]),
            rate=content["rates"][given["rate"]],
            batch=tuple(options["batch"]),
            characters=options.get("characters"),
            teacher=full(given.get("teacher")),
            lora=given.get("lora"),
        )
    try:
        shape = options["shapes"][entry["shape"]] if "shape" in entry else None
        tokenizer = None
        if "tokenizer" in entry:
            tokenizer = {**options["tokenizers"][entry["tokenizer"]], "characters": options.get("characters")}
    except KeyError as error:
        raise ValueError(f"{name}: the half {half} defines no {error}") from None
    return ZooModel(
        name=f"{half}/{name}",
        kind=entry["kind"],
        derivation=entry["derivation"],
        parents=tuple(f"{half}/{parent}" for parent in entry.get("parents", ())),
        changes=tuple(next(iter(change.items())) for change in entry.get("changes", ())),
        training=training,
        shape=shape,
        tokenizer=tokenizer,
        initial=full(entry.get("initial")),
        order=f"{half}/{entry.get('order', name)}",
        beside=tuple(f"{half}/{other}" for other in entry.get("beside", ())),
        step=entry.get("step"),
        unnoticed=entry.get("unnoticed"),
    )
