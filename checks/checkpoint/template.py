"""Templates: which tensor of a checkpoint plays which part of the model.

One JSON file per model type, below templates/, maps patterns of tensor names to parts: q, gate, final_norm, … It holds
data only and may extend others; common.json holds what all share. No number in a name is believed before it is bounded.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import islice, product
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

from checks.checkpoint.inferred import infer_roles
from checks.checkpoint.roles import Layout, TensorRole

TEMPLATES = Path(__file__).with_name("templates")
MISSING_NAMED = 1000  # missing tensors are all counted, but named only up to this many
SHOWN = 10  # tensors of each kind that a summary names
LARGEST_COUNT = 10_000  # of layers or experts; a configuration that states more is not believed
_NUMBER = re.compile(r"(?<![^.])(?:0|[1-9][0-9]{0,5})(?![^.])")
_MERGED = ("norms", "defaults", "tensors")
_OWN = ("component", "base", "defaults", "components", "norms_when")
_STORED = ("experts", "stacked", "transposed", "interleaved", "grouped", "tied_to")
Config = Mapping[str, Any]


class TemplateError(Exception):
    """A template is broken. The text names the file, the key, and what was expected."""


@dataclass(frozen=True)
class RoleAssignment:
    """The roles of a checkpoint's tensors. `missing` names at most MISSING_NAMED tensors of `missing_count`."""

    templates: Mapping[str, str]  # component → name of its template
    roles: Mapping[str, TensorRole]
    unassigned: tuple[str, ...]
    missing: tuple[str, ...]  # as the templates write them, without the prefix of a component
    missing_count: int
    problems: Mapping[str, str]  # tensor → why it has not the role that its name claims
    inferred_because: str | None  # why roles come from names and shapes alone; None when a template gave them

    def summary(self) -> dict[str, Any]:
        """For the record: where the roles come from, and what did not fit, each with its count and some names."""
        return {
            "templates": dict(self.templates),
            "inferred_because": self.inferred_because,
            "problems": {"count": len(self.problems), "tensors": dict(islice(self.problems.items(), SHOWN))},
            "missing": {"count": self.missing_count, "tensors": list(self.missing[:SHOWN])},
            "unassigned": {"count": len(self.unassigned), "tensors": list(self.unassigned[:SHOWN])},
        }


@dataclass(frozen=True)
class Pattern:
    """One pattern of tensor names and the role that it gives; `says` is what common.json and its template say of it."""

    name: str
    role: TensorRole
    says: Mapping[str, Any]
    slots: tuple[str, ...] = ()  # its placeholders: layer, expert, block
    owner: int = 0  # which component of the checkpoint


@dataclass(frozen=True, eq=False)
class Template:
    """The tensors of one model type as one component; of a wrapper, those between its components."""

    name: str
    patterns: tuple[Pattern, ...]
    component: str = "text"
    base: str = ""
    defaults: Config = field(default_factory=dict)
    components: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    norms_when: Sequence[str] = ()


@cache
def load(directory: Path = TEMPLATES) -> tuple[Mapping[str, Any], Mapping[tuple[str, str], Template]]:
    """common.json, and every template by component and model type. Raises TemplateError for the first thing wrong."""
    schema = _read(TEMPLATES / "schema.json")
    files = {path.stem: _read(path) for path in sorted(directory.glob("*.json")) if path.stem != "schema"}
    for name, raw in {"common": None, **files}.items():
        kind = "common" if name == "common" else "template"
        for error in Draft202012Validator({**schema, "$ref": f"#/$defs/{kind}"}).iter_errors(raw):
            raise TemplateError(f"{directory / name}.json: {error.json_path}: {error.message}")
    common = files.pop("common")
    by_type: dict[tuple[str, str], Template] = {}
    for name in files:
        raw = _merged(name, files, ())
        patterns = tuple(one for item in raw["tensors"].items() for one in _patterns(name, item, raw, common["parts"]))
        own = {key: raw[key] for key in _OWN if key in raw}
        template = Template(name, patterns, **own)
        for model_type in files[name]["model_types"]:
            if (other := by_type.setdefault((template.component, model_type), template)) is not template:
                raise TemplateError(f"{name}.json: model_types: {model_type!r} also stands in {other.name}.json")
    return common, by_type


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TemplateError(f"{path}: cannot be read as JSON ({error})") from error


def _merged(name: str, files: Mapping[str, dict[str, Any]], below: tuple[str, ...]) -> dict[str, Any]:
    """A template with what it extends: its own values win, objects merge by key, a tensor set to null goes."""
    if name not in files or name in below:
        raise TemplateError(f"{below[-1]}.json: extends: {name!r} {'extends it' if name in below else 'is absent'}")
    merged: dict[str, Any] = {key: {} for key in _MERGED}
    for one in (*(_merged(parent, files, (*below, name)) for parent in files[name].get("extends", ())), files[name]):
        merged = {**merged, **one, **{key: {**merged[key], **one.get(key, {})} for key in _MERGED}}
    return merged


def _patterns(file: str, item: tuple[str, Any], raw: Config, parts: Config) -> Iterator[Pattern]:
    """The pattern of one entry of a template, and that of the bias beside it."""
    name, entry = item
    if entry is None:
        return
    part, of = entry["part"], entry["part"].removesuffix("_bias")
    for one in (of, *entry.get("fused", ()), entry.get("tied_to", of)):
        if one.removesuffix("_bias") not in parts:
            raise TemplateError(f"{file}.json: tensors: {name}: common.json knows no part {one!r}")
    facts, norms = parts[of], raw["norms"]
    is_bias, is_norm = of != part, facts["category"] == "norm"
    block = "mixture" if facts.get("block") == "mlp" and "experts" in entry else facts.get("block")
    around = norms.get(block) or norms.get("mlp" if block == "mixture" else "") or (None, None)
    residual = None if is_bias and facts.get("residual") == "reader" else facts.get("residual")
    through = around[0] if residual == "reader" else around[1] if residual else None
    layout = Layout(
        **{key: entry[key] for key in _STORED if key in entry},
        fused=tuple(entry.get("fused", ())),
        rope_layout=raw.get("rope_layout") if facts.get("rotary") else None,
        residual=residual,
        norm=through or (None if is_bias else facts.get("norm")),
        norm_function=raw.get("norm_function") if is_norm else None,
        zero_centred=is_norm and not is_bias and raw.get("zero_centred_norms", False),
    )
    category = "bias" if is_bias and not is_norm else facts["category"]
    category = f"{layout.experts} expert" if category == "mlp" and layout.experts else category
    has_meaning = category == "bias" or (not is_bias and facts.get("index_has_meaning", False))
    beside = {key: entry[key] for key in ("packed", "companion_of") if key in entry}
    kind = None if layout.stacked or layout.transposed or beside or part not in ("gate", "up", "down") else part
    category = "other" if "companion_of" in beside else category
    role = TensorRole(category, kind=kind, index_has_meaning=has_meaning, part=part, layout=layout, **beside)
    says = {**facts, **entry, **({"dimensions": 1} if is_bias else {})}
    yield Pattern(name, role, says, tuple(re.findall(r"\{(\w+)\}", name)))
    if bias := entry.get("bias"):
        own = {**entry, "part": f"{part}_bias", "bias": False, "fused": [f"{one}_bias" for one in layout.fused]}
        own |= {"transposed": False} if "transposed" in entry else {}
        own |= {"when": bias} if isinstance(bias, str) else {}
        yield from _patterns(file, (name.removesuffix("weight") + "bias", own), raw, parts)


@dataclass
class _Component:
    """One component of a checkpoint: its template, and what its configuration says."""

    template: Template
    config: Config
    outer: Config
    layers: int = 0
    experts: int = 0
    mtp: int = 0

    def says(self, keys: str) -> bool | None:
        """Is one of the keys, split by "|", true? None when neither the configuration nor the template says."""
        said = [one[key] for one in (self.outer, self.config) for key in keys.split("|") if key in one]
        said = said or [self.template.defaults[key] for key in keys.split("|") if key in self.template.defaults]
        return any(map(bool, said)) if said else None

    def needs(self, pattern: Pattern) -> bool:
        """Must the checkpoint hold the tensors of a pattern?"""
        says = pattern.says
        if says.get("optional") or says.get("layers") == "mtp" or says.keys() & {"packed", "companion_of"}:
            return False
        wanted = "when" not in says or self.says(says["when"]) is True
        return wanted and ("unless" not in says or self.says(says["unless"]) is False)

    def layers_of(self, kind: str | None) -> set[int]:
        """The layers with a mixture of experts ("sparse"), those without ("dense"), or all."""
        says, layers = {**self.template.defaults, **self.config}, set(range(self.layers))
        if kind != "sparse":
            return layers - self.layers_of("sparse") if kind else layers
        if all(pattern.says.get("layers") != "sparse" for pattern in self.template.patterns):
            return set()
        for key in ("mlp_layer_types", "is_moe_layer", "moe_layer_freq"):
            if isinstance(says.get(key), list):
                return {layer for layer, one in enumerate(says[key]) if one in ("sparse", 1)} & layers
        listed = {
            key: {one for one in says[key] if isinstance(one, int)} for key in says if isinstance(says[key], list)
        }
        if "moe_layers" in listed:
            return layers & listed["moe_layers"]
        for key, start in (("moe_layer_freq", 0), ("decoder_sparse_step", 1), ("interleave_moe_layer_step", 1)):
            if isinstance(step := says.get(key), int) and step > 0:
                layers = {layer for layer in layers if (layer + start) % step == 0}
        first = says["first_k_dense_replace"] if isinstance(says.get("first_k_dense_replace"), int) else 0
        return {layer for layer in layers if layer >= first} - listed.get("mlp_only_layers", set())

    def bound(self, claims: Iterable[tuple[Pattern, Mapping[str, int]]]) -> None:
        """Settle how many layers and experts there are: as config.json says, else as the names number them."""
        seen: dict[object, set[int]] = defaultdict(set)
        for pattern, numbers in claims:
            for slot, number in numbers.items():
                seen["mtp" if slot == "layer" and pattern.says.get("layers") == "mtp" else slot].add(number)
        self.layers = stated_count(self.config, "layers", max(seen["layer"] - seen["mtp"], default=-1) + 1)
        self.experts = stated_count(self.config, "experts", max(seen["expert"], default=-1) + 1)
        self.mtp = stated_count({**self.template.defaults, **self.config}, "mtp", 0)


def stated_count(config: Config, what: str, otherwise: int) -> int:
    """How many of `what` a configuration states: layers, experts, mtp, heads, key_heads; `otherwise` if none."""
    for key in load()[0]["config"][what]:
        value: Any = config
        for step in key.split("."):
            value = value.get(step) if isinstance(value, Mapping) else None
        if type(value) is int and 0 <= value <= LARGEST_COUNT:
            return value
    return min(otherwise, LARGEST_COUNT)


def assign_roles(tensors: Mapping[str, Sequence[int]], config: Config) -> RoleAssignment:
    """Which role has each tensor, by its name, the model type in config.json, and the shapes?

    A model type without a template, or names that do not follow it, leave roles to be inferred from names and shapes;
    `inferred_because` says why. A name that the configuration contradicts, or another name that claims its place, has
    a problem and no role. Raises nothing, whatever a checkpoint or its configuration holds.
    """
    components, because = _components(config), None
    table = _table(tuple(one.template for one in components))
    claims = {name: claim for name in sorted(tensors) if (claim := _claim(name, table))}
    if not components or 2 * len(claims) < len(tensors):
        because = f"{len(claims)} of {len(tensors)} names follow a template of {str(config.get('model_type'))[:80]!r}"
        components, claims = [], {}
    problems: dict[str, str] = {}
    roles: dict[str, TensorRole] = {}
    if because:
        layers = stated_count(component_config(config, "text"), "layers", LARGEST_COUNT)
        roles = infer_roles(tensors, load()[0], config, layers, problems)
    for index, one in enumerate(components):
        one.bound(claim for claim in claims.values() if claim[0].owner == index)
    places: dict[tuple[object, ...], list[tuple[str, object, object]]] = defaultdict(list)
    for name, claim in claims.items():
        role = _role(*claim, components[claim[0].owner], tensors[name])
        if isinstance(role, str):
            problems[name] = role
            continue
        roles[name] = role
        for part in () if role.companion_of else role.layout.fused or (role.part,):
            places[role.component, role.layer, role.layout.experts, part].append((name, role.part, role.expert))
    for held in places.values():
        if len({(part, expert is None) for _, part, expert in held}) > 1 or len({one[1:] for one in held}) < len(held):
            problems.update((name, "another tensor has the same place in the model") for name, *_ in held)
    roles = {name: role for name, role in roles.items() if name not in problems}
    missing = [_missing(one, roles.values()) for one in components]
    return RoleAssignment(
        {one.template.component: one.template.name for one in components},
        roles,
        tuple(sorted(name for name in tensors if name not in roles)),
        tuple(islice((name for names, _ in missing for name in names), MISSING_NAMED)),
        sum(count for _, count in missing),
        problems,
        because,
    )


def component_config(config: Config, component: str) -> Config:
    """What a configuration says of one component: its own section, else, of the text decoder, the whole."""
    spec = load()[0]["components"].get(component, {})
    inner = config.get(spec.get("config", ""))
    return inner if isinstance(inner, Mapping) else config if component == "text" else {}


def _components(config: Config) -> list[_Component]:
    """The components that a configuration describes, each with its template; what lies between them first."""
    common, by_type = load()
    model_type = str(config.get("model_type"))
    wrapper = by_type.get(("projector", model_type))
    whole = by_type.get(("text", model_type)) or by_type.get(("vision", model_type))
    if whole and not wrapper:
        return [_Component(whole, config, config)]
    found = [_Component(wrapper, config, config)] if wrapper else []
    for component, spec in (wrapper.components if wrapper else common["components"]).items():
        inner = config.get(spec["config"])
        own = inner if isinstance(inner, Mapping) else config if component == "text" else {}
        stated = own.get("model_type") if own is not config else None
        template = by_type.get((component, str(stated or spec.get("default"))))
        found += [_Component(template, own, config)] if template else []
    return found


@cache
def _table(templates: tuple[Template, ...]) -> Mapping[str, Pattern]:
    """Every stored name that the templates allow, numbers as "#". Raises TemplateError for a name with two meanings."""
    table: dict[str, Pattern] = {}
    common = load()[0]
    for owner, one in enumerate(templates):
        for prefix, base, pattern in product(common["prefixes"][one.component], ("", one.base), one.patterns):
            name = prefix + pattern.name.removeprefix(base)
            stack = re.match(r".*\.(?=\{(layer|block)\})", name)
            role = replace(pattern.role, component=one.component, stack=stack[0] if stack else "")
            for full, changes in _stored_names(name, role, common).items():
                claim = replace(pattern, role=replace(role, **changes), owner=owner)
                other = table.setdefault(re.sub(r"\{\w+\}", "#", full), claim)
                if other.owner == owner and other.name != pattern.name:
                    raise TemplateError(f"{one.name}.json: tensors: {full} also fits {other.name}")
    return table


def _stored_names(name: str, role: TensorRole, common: Config) -> dict[str, dict[str, Any]]:
    """The names that one tensor and the companions of a quantised one may have, and how the role of each differs."""
    stem, _, leaf = name.rpartition(".")
    beside = {"kind": None, "category": "other", "companion_of": leaf}
    if leaf == "weight":
        packed = {f"{stem}.{one}": {"kind": None, "packed": one} for one in common["packed"]}
        return {name: {}, **packed, **{f"{stem}.{one}": beside for one in common["companions"]}}
    if role.layout.stacked is None or role.packed or role.companion_of or str(role.part).endswith("_bias"):
        return {name: {}}
    suffixes = [one.removeprefix("weight") for one in common["companions"] if one.startswith("weight_")]
    return {name: {}, **{name + suffix: beside for suffix in suffixes}}


def _claim(name: str, table: Mapping[str, Pattern]) -> tuple[Pattern, Mapping[str, int]] | None:
    """The pattern that a name fits, and the numbers in the name by its placeholders."""
    pattern = None if "#" in name else table.get(name) or table.get(_NUMBER.sub("#", name))
    numbers = map(int, _NUMBER.findall(name)) if pattern and pattern.slots else ()
    return (pattern, dict(zip(pattern.slots, numbers, strict=True))) if pattern else None


def _role(pattern: Pattern, numbers: Mapping[str, int], owner: _Component, shape: Sequence[int]) -> TensorRole | str:
    """The role of one tensor, or what speaks against it."""
    role, says, layer, expert = pattern.role, pattern.says, numbers.get("layer"), numbers.get("expert")
    if says.get("layers") == "mtp" and layer is None:
        layer = owner.layers + numbers.get("block", 0)
    is_mtp = layer is not None and layer >= owner.layers
    if layer is not None and (layer >= owner.layers + owner.mtp or (says.get("layers") == "mtp" and not is_mtp)):
        return f"layer {layer}; there are {owner.layers}, and {owner.mtp} that predict further tokens"
    if expert is not None and expert >= owner.experts:
        return f"expert {expert}; there are {owner.experts}"
    stacked = role.layout.stacked == "axis"
    dimensions = says.get("dimensions", len(shape)) + stacked
    fits = len(shape) == dimensions and not (stacked and owner.experts not in (0, shape[0]))
    if not (fits or role.packed or role.companion_of):
        return f"shape {list(shape)}; expected {dimensions} dimensions, and {owner.experts} experts in a stack"
    component = "mtp" if is_mtp else role.component
    has_norms = all(owner.says(key) is not False for key in owner.template.norms_when)
    layout = role.layout if has_norms else replace(role.layout, norm=None)
    return TensorRole(**vars(role) | {"layer": layer, "expert": expert, "component": component, "layout": layout})


def follows_template(config: Config) -> Callable[[str], bool]:
    """Tells of a tensor's name whether the templates of a configuration give it a role."""
    table = _table(tuple(one.template for one in _components(config)))
    return lambda name: _claim(name, table) is not None


def _missing(owner: _Component, roles: Iterable[TensorRole]) -> tuple[Iterator[str], int]:
    """What a component lacks of what its configuration promises: the names, and how many."""
    held: dict[tuple[object, ...], set[int]] = defaultdict(set)
    for role in roles:
        if role.component == owner.template.component and not role.companion_of:
            for part in {str(role.part), *role.layout.fused}:
                held[role.layer, role.layout.experts, part].add(-1 if role.expert is None else role.expert)
    stacked = any(-1 in experts for (_, kind, _), experts in held.items() if kind == "routed")
    lacking: dict[tuple[object, ...], tuple[Pattern, range]] = {}
    for pattern in filter(owner.needs, owner.template.patterns):
        layout, each = pattern.role.layout, range(owner.experts if "{expert}" in pattern.name else 1)
        if layout.experts == "routed" and ("{expert}" in pattern.name) == stacked:
            continue
        for layer in owner.layers_of(pattern.says.get("layers")) if "{layer}" in pattern.name else (None,):
            for place in ((layer, layout.experts, part) for part in layout.fused or (pattern.role.part,)):
                if len(held.get(place, ())) < len(each):
                    lacking.setdefault(place, (pattern, each))
    names = (
        pattern.name.format(layer=place[0], expert=expert)
        for place, (pattern, each) in lacking.items()
        for expert in each
        if expert not in held.get(place, ())
    )
    return names, sum(len(each) - len(held.get(place, ())) for place, (_, each) in lacking.items())
