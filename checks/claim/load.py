"""Claim file → Claim. Reads YAML and small JSON configurations only: no network, no weights, no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from checks.catalog import entry as catalog
from checks.catalog.architecture import Architecture, from_config
from checks.catalog.comparison import five_keys
from checks.catalog.entry import keys as catalog_keys
from checks.catalog.nearest import nearest
from checks.claim.behavior import behavior_from
from checks.claim.discovery import check_names
from checks.claim.initial import InitialWeights, initial_from
from checks.claim.model import Claim, Component, ModelSource, Reference, ThresholdOverride
from checks.claim.schema import schema_problems
from checks.claim.source import ClaimError, KeyPath, Mark, Problem, Source, read_source, suggestion
from checks.claim.training import training_from
from checks.evidence.thresholds import ThresholdError, families, threshold

DEFAULT_NEAREST = 3
MOST_LAYERS = 1000


def load_claim(path: Path) -> Claim:
    """Read one claim file.

    Raises ClaimError with every mistake of the file, each as `path:line:column: message` with what to do.
    """
    source = read_source(path)
    problems = schema_problems(source)
    if problems:
        # A reader wants all mistakes at once: names are checked as far as the shape of the data allows.
        raise ClaimError(path, [*problems, *_NameProblems(source).of_misshapen()])
    return _ClaimBuilder(source).build()


class _NameProblems:
    """Mistakes in names (models, checks), found without needing the rest of the file to be right."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.data = source.data if isinstance(source.data, dict) else {}

    def of_misshapen(self) -> list[Problem]:
        problems = [*self.of_checks(), *self.of_thresholds()]
        references = self.data.get("references")
        if isinstance(references, list):
            for position, reference in enumerate(references):
                if isinstance(reference, str):
                    problems.extend(self.of_key(reference, ("references", position)))
        if isinstance(self.data.get("model"), str):
            problems.extend(self.of_key(self.data["model"], ("model",)))
        return problems

    def of_key(self, key: str, path: KeyPath) -> list[Problem]:
        if key in catalog_keys():
            return []
        hint = suggestion(key, catalog_keys()) or "; write {name: ..., path: ...} for a model outside the catalogue"
        return [Problem(self.source.value_mark(path), f"unknown model {key!r}{hint}")]

    def of_checks(self) -> list[Problem]:
        selection = self.data.get("checks")
        if not isinstance(selection, dict):
            return []
        known = [*families(), *check_names()]
        return [
            Problem(
                self.source.value_mark(("checks", which, position)), f"unknown check {name!r}{suggestion(name, known)}"
            )
            for which in ("only", "without")
            for position, name in enumerate(selection.get(which) or ())
            if isinstance(name, str) and name not in known
        ]

    def of_thresholds(self) -> list[Problem]:
        overrides = self.data.get("thresholds")
        if not isinstance(overrides, dict):
            return []
        return [
            Problem(
                self.source.mark(("thresholds", name)), f"unknown check {name!r}{suggestion(name, list(check_names()))}"
            )
            for name in overrides
            if name not in check_names()
        ]


class _ClaimBuilder:
    """Turns data that fits the schema into a Claim, collecting every mistake on the way."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.data: dict[str, Any] = source.data
        self.directory = source.path.parent
        self.names = _NameProblems(source)
        self.problems: list[Problem] = [*self.names.of_checks(), *self.names.of_thresholds()]

    def build(self) -> Claim:
        model = self._model(self.data["model"], ("model",), default_name="candidate")
        selection = self.data.get("checks", {})
        overrides = self._overrides()
        components = self._components(model) if model else ()
        initial, behavior = self._initial(), self.data.get("behavior")
        if self.problems or model is None:
            raise ClaimError(self.source.path, self.problems)
        return Claim(
            path=self.source.path,
            name=self.data["claim"],
            statement=self.data["statement"],
            claimant=self.data.get("claimant"),
            source=self.data.get("source"),
            model=model,
            components=components,
            only=tuple(selection.get("only", ())),
            without=tuple(selection.get("without", ())),
            overrides=overrides,
            training=training_from(self.data.get("training", {}), self.directory),
            initial=initial,
            behavior=behavior_from(behavior, self.directory) if behavior is not None else None,
            line=self.source.mark(("claim",)).line,
        )

    # Models

    def _model(self, value: str | dict[str, str], path: KeyPath, default_name: str | None = None) -> ModelSource | None:
        if isinstance(value, str):
            return self._catalogued(value, path)
        if "path" in value and "repo" in value:
            self._problem((*path, "repo"), "a model is read from a path or from a repo, not from both")
            return None
        if "revision" in value and "repo" not in value:
            self._problem((*path, "revision"), "a revision belongs to a repo")
        name = value.get("name") or default_name or _name_from(value)
        if "path" not in value and "repo" not in value:
            if "name" not in value:
                self._problem(path, "a model needs a path, a repo or the name of a catalogue entry")
                return None
            return self._catalogued(name, (*path, "name"), prefix=value.get("prefix"))
        directory = self._directory(value, path)
        architectures = self._architectures(value, path, directory, name)
        return ModelSource(
            name=name,
            catalog_key=name if name in catalog_keys() else None,
            path=str(directory) if directory else None,
            repo=value.get("repo"),
            revision=value.get("revision"),
            prefix=value.get("prefix"),
            architectures=MappingProxyType(dict(architectures)),
        )

    def _catalogued(self, key: str, path: KeyPath, prefix: str | None = None) -> ModelSource | None:
        problems = self.names.of_key(key, path)
        if problems:
            self.problems.extend(problems)
            return None
        return catalogued_source(key, prefix)

    def _directory(self, value: dict[str, str], path: KeyPath) -> Path | None:
        if "path" not in value:
            return None
        try:
            directory = (self.directory / value["path"]).resolve()
            holds_weights = directory.is_dir() or (directory.is_file() and directory.suffix == ".gguf")
        except (OSError, ValueError) as error:
            self._problem((*path, "path"), f"not a path that can be used: {error}")
            return None
        if not holds_weights and "config" not in value and value.get("name") not in catalog_keys():
            self._problem(
                (*path, "path"),
                f"no directory {value['path']!r} beside the claim (looked for {directory}); "
                "give the model's config too if its weights are elsewhere for now",
            )
        return directory

    def _architectures(
        self, value: dict[str, str], path: KeyPath, directory: Path | None, name: str
    ) -> Mapping[str, Architecture]:
        if "config" in value:
            return self._read_config((self.directory / value["config"]).resolve(), (*path, "config"))
        if directory is not None and (directory / "config.json").is_file():
            found = self._read_config(directory / "config.json", (*path, "path"))
            self._same_as_catalogued(name, found, path)
            return found
        if name in catalog_keys():
            return catalog.load(name).components
        if "repo" in value:
            self._problem((*path, "repo"), "a model outside the catalogue brings its config: add config: config.json")
        return {}

    def _same_as_catalogued(self, name: str, found: Mapping[str, Architecture], path: KeyPath) -> None:
        """A directory under a name of the catalogue must not be another model, which reports would then call so."""
        if name not in catalog_keys() or not found:
            return
        known = catalog.load(name).components
        for row in five_keys(found[catalog.main_component(found)], known[catalog.main_component(known)]):
            if row.equal is False:
                self._problem(
                    (*path, "name"),
                    f"this model's config.json is not that of the catalogue's {name!r} ({row.key} {row.candidate}, "
                    f"not {row.reference}); give it another name",
                )
                return

    def _read_config(self, file: Path, path: KeyPath) -> Mapping[str, Architecture]:
        try:
            architectures = from_config(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, RecursionError) as error:  # ConfigError and JSONDecodeError are ValueErrors
            self._problem(path, f"{file} cannot be used as a config.json: {error}")
            return {}
        layers = max((one.num_hidden_layers or 0 for one in architectures.values()), default=0)
        if layers > MOST_LAYERS:
            # Every layer becomes a case: a size from a checkpoint is not trusted.
            self._problem(
                path, f"{file} cannot be used as a config.json: {layers} layers, at most {MOST_LAYERS} are tested"
            )
        return architectures

    # Components and panels

    def _components(self, model: ModelSource) -> tuple[Component, ...]:
        written = self.data.get("components")
        if not written:
            return (self._component(model, None, {}, ()),)
        return tuple(self._component(model, name, value, ("components", name)) for name, value in written.items())

    def _component(self, model: ModelSource, name: str | None, value: dict[str, Any], path: KeyPath) -> Component:
        written_prefix = value.get("prefix", model.prefix or "")
        prefixes = (written_prefix,) if isinstance(written_prefix, str) else tuple(written_prefix)
        references_path: KeyPath = (*path, "references") if "references" in value else ("references",)
        written = value.get("references", self.data.get("references", []))
        panel: list[Reference] = []
        for position, one in enumerate(written):
            place = (*references_path, position)
            source = self._model(one, place)
            if source is None:
                continue
            if _same_model(source, model):
                self._problem(place, "the candidate cannot be its own reference")
            elif source.name in {reference.source.name for reference in panel}:
                self._problem(place, f"the panel names {source.name!r} twice; give one of them another name")
            else:
                mark = self.source.value_mark(place)
                panel.append(Reference(source, reference_prefixes(source, name, prefixes), line=mark.line))
        panel.extend(self._nearest(model, name, prefixes, panel))
        disclosed = value.get("disclosed", [])
        named = [reference.source.name for reference in panel]
        for position, one in enumerate(disclosed):
            if one not in named:
                self._problem(
                    (*path, "disclosed", position),
                    f"disclosed model {one!r} is not in this component's panel{suggestion(one, named)}",
                )
        if not panel and not self.problems:
            self._problem(path or ("model",), "the panel is empty: name references, or leave nearest above 0")
        mark = self.source.mark(path or ("model",))
        return Component(name, prefixes, tuple(panel), frozenset(disclosed), line=mark.line)

    def _nearest(
        self, model: ModelSource, component: str | None, prefixes: tuple[str, ...], panel: list[Reference]
    ) -> list[Reference]:
        wanted = int(self.data.get("nearest", DEFAULT_NEAREST))
        architecture = model.architecture(component)
        if not wanted or architecture is None:
            return []
        present = {reference.source.catalog_key for reference in panel} | {model.catalog_key}
        present |= {reference.source.name for reference in panel}
        neighbours = nearest(
            architecture, wanted, exclude=tuple(sorted(key for key in present if key)), component=component or "text"
        )
        line = self.source.mark(("nearest",) if "nearest" in self.data else ("model",)).line
        sources = [catalogued_source(neighbour.key) for neighbour in neighbours]
        return [
            Reference(source, reference_prefixes(source, component, prefixes), nearest=True, line=line)
            for source in sources
        ]

    # Initial weights

    def _initial(self) -> InitialWeights | None:
        block = self.data.get("initial")
        if block is None:
            return None
        if ("seed" in block) != ("generator" in block):
            self._problem(("initial",), "a generator and a seed make initial weights again only together; name both")
        if not block.keys() & {"checkpoint", "seed"}:
            self._problem(("initial",), "name a checkpoint of the initial weights, or the generator and seed")
        try:
            return initial_from(block, self.directory)
        except ValueError as error:
            self._problem(("initial",), str(error))
            return None

    # Thresholds

    def _overrides(self) -> Mapping[str, ThresholdOverride]:
        overrides = {}
        for check, written in self.data.get("thresholds", {}).items():
            if check not in check_names():
                continue
            values = {name: float(value) for name, value in written.items() if name != "reason"}
            try:
                threshold(check).overridden(values).require_order()
            except ThresholdError as error:
                self._problem(("thresholds", check), str(error))
                continue
            line = self.source.mark(("thresholds", check)).line
            overrides[check] = ThresholdOverride(check, MappingProxyType(values), written["reason"], line)
        return MappingProxyType(overrides)

    def _problem(self, path: KeyPath, message: str) -> None:
        mark: Mark = self.source.mark(path) if path and isinstance(path[-1], str) else self.source.value_mark(path)
        self.problems.append(Problem(mark, message))


def catalogued_source(key: str, prefix: str | None = None) -> ModelSource:
    """The source of a catalogue entry: its hub repository and its architectures."""
    known = catalog.load(key)
    return ModelSource(
        name=key,
        catalog_key=key,
        repo=known.repo,
        prefix=prefix,
        architectures=MappingProxyType(dict(known.components)),
    )


def reference_prefixes(
    source: ModelSource, component: str | None, candidate_prefixes: tuple[str, ...]
) -> tuple[str, ...]:
    """Prefixes to try on a reference's tensor names, in order; the empty one fits a checkpoint of that part alone.

    The claim's own prefix is final. Otherwise: what the catalogue knows, then the candidate's prefix, then none.
    """
    if source.prefix is not None:
        return (source.prefix,)
    if component is None:
        return ("",)
    known = catalog.load(source.catalog_key).prefixes.get(component, ()) if source.catalog_key else ()
    return tuple(dict.fromkeys([*known, *candidate_prefixes, ""]))


def _name_from(value: dict[str, str]) -> str:
    """A name for cases from a path or repository: `Llama-3.1-8B` → `llama_3.1_8b`."""
    last = Path(value.get("path") or value.get("repo") or "model").name
    return re.sub(r"[^a-z0-9_.]+", "_", last.lower()) or "model"


def _same_model(one: ModelSource, other: ModelSource) -> bool:
    if one.path or other.path:
        return one.path == other.path
    return one.repo == other.repo and one.revision == other.revision
