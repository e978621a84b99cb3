"""Claim data against the JSON Schema, with every mistake at its place in the file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checks.claim.source import KeyPath, Problem, Source, suggestion

if TYPE_CHECKING:
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import ValidationError

SCHEMA_FILE = Path(__file__).with_name("schema.json")

_TYPE_NAMES = {
    dict: "a mapping",
    list: "a list",
    str: "text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    type(None): "nothing",
}
_EXPECTED_NAMES = {
    "object": "a mapping",
    "array": "a list",
    "string": "text",
    "number": "a number",
    "integer": "a whole number",
    "boolean": "true or false",
}


@cache
def validator() -> Draft202012Validator:
    """The validator of the claim schema."""
    # Imported here: the plugin is loaded by every pytest run of its environment.
    from jsonschema import Draft202012Validator

    schema = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def schema_problems(source: Source) -> list[Problem]:
    """Every way in which the file's data breaks the schema, located; an empty list when it fits."""
    if source.data is None:
        return [Problem(source.mark(()), "the file is empty; a claim needs the keys claim, statement and model")]
    problems: list[Problem] = []
    for error in validator().iter_errors(source.data):
        problems.extend(_problems_of(source, error, ()))
    return problems


def _problems_of(source: Source, error: ValidationError, parent: KeyPath) -> Iterator[Problem]:
    path = (*parent, *error.relative_path) if parent else tuple(error.absolute_path)
    kind = str(error.validator)
    schema: Any = error.schema
    limit: Any = error.validator_value
    instance: Any = error.instance
    if kind == "anyOf":
        yield from _problems_of_best_branch(source, error, path)
    elif kind == "additionalProperties":
        known = list(schema.get("properties", {}))
        for key in instance:
            if key not in known:
                hint = suggestion(key, known) or f"; known keys: {', '.join(known)}"
                yield Problem(source.mark((*path, key)), f"unknown key {key!r}{hint}")
    elif kind == "required":
        for key in limit:
            if key not in instance:
                yield Problem(source.mark(path), f"missing key {key!r}")
    elif kind == "type":
        yield Problem(source.value_mark(path), _type_message(path, error))
    elif isinstance(error.instance, str) and (*path, error.instance) in source.key_marks:
        # propertyNames reports the key as the instance, at the path of its mapping.
        name_path = (*path, error.instance)
        yield Problem(source.mark(name_path), f"name {error.instance!r} does not match {limit}")
    else:
        yield Problem(source.value_mark(path), f"{_label(path)}: {_constraint(error)}")


def _problems_of_best_branch(source: Source, error: ValidationError, path: KeyPath) -> Iterator[Problem]:
    """A model is text or a mapping: report only what is wrong with the form that was written."""
    branches: dict[Any, list[ValidationError]] = {}
    for child in error.context or ():
        branches.setdefault(child.schema_path[0], []).append(child)
    fitting = [
        children
        for children in branches.values()
        if not any(child.validator == "type" and not child.relative_path for child in children)
    ]
    if fitting:
        for child in fitting[0]:
            yield from _problems_of(source, child, path)
    else:
        found = _TYPE_NAMES.get(type(error.instance), "something else")
        yield Problem(
            source.value_mark(path),
            f"{_label(path)}: expected {_either(path)}; found {found}",
        )


def _either(path: KeyPath) -> str:
    """The forms between which the schema chooses at a place."""
    if path and path[-1] == "prefix":
        return "text or a list of texts"
    return "a key of the catalogue, or a mapping with path or repo"


def _label(path: KeyPath) -> str:
    return ".".join(str(part) for part in path) or "claim"


def _type_message(path: KeyPath, error: ValidationError) -> str:
    expected: Any = error.validator_value
    names = [expected] if isinstance(expected, str) else list(expected)
    wanted = " or ".join(_EXPECTED_NAMES.get(name, name) for name in names)
    found = _TYPE_NAMES.get(type(error.instance), type(error.instance).__name__)
    shown = f" {error.instance!r}" if isinstance(error.instance, str | int | float | bool) else ""
    return f"{_label(path)}: expected {wanted}, found {found}{shown}"


def _constraint(error: ValidationError) -> str:
    value, limit = error.instance, error.validator_value
    messages = {
        "pattern": f"{value!r} does not match {limit}",
        "minLength": "must not be empty",
        "minimum": f"{value} is less than {limit}",
        "maximum": f"{value} is more than {limit}",
        "exclusiveMinimum": f"{value} must be more than {limit}",
        "exclusiveMaximum": f"{value} must be less than {limit}",
        "minItems": "must not be empty",
        "minProperties": f"needs at least {limit} keys" if limit != 1 else "must not be empty",
        "uniqueItems": "names something twice",
    }
    return messages.get(str(error.validator), str(error.message))
