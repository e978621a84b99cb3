"""The template files themselves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from checks.checkpoint import template
from checks.checkpoint.roles import CATEGORIES
from checks.checkpoint.template import TEMPLATES, TemplateError, load


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory with the shared files and one good template."""
    for name in ("common", "llama"):
        (tmp_path / f"{name}.json").write_text(
            (TEMPLATES / f"{name}.json").read_text(encoding="utf-8"), encoding="utf-8"
        )
    return tmp_path


GOOD = {"model_types": ["own"], "source": "here", "tensors": {"a.weight": {"part": "embedding"}}}


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("{", r"own\.json: cannot be read as JSON"),
        ("[]", r"own\.json: \$: \[\] is not of type 'object'"),
        ({"model_types": ["own"]}, "'source' is a required property"),
        (GOOD | {"extend": []}, "'extend' was unexpected"),
        (GOOD | {"extends": ["nobody"]}, r"own\.json: extends: 'nobody' is absent"),
        (GOOD | {"extends": ["own"]}, r"own\.json: extends: 'own' extends it"),
        (GOOD | {"model_types": ["llama"]}, r"own\.json: model_types: 'llama' also stands in llama\.json"),
        (GOOD | {"tensors": {"a.weight": {"part": "ears"}}}, r"own\.json: tensors: a\.weight: .* no part 'ears'"),
        (GOOD | {"tensors": {"a.weight": {"part": "q", "fused": ["x"]}}}, "no part 'x'"),
        (
            GOOD | {"tensors": {"a.weight": {"part": "q", "fuse": []}}},
            r"tensors\['a\.weight'\]: .*'fuse' was unexpected",
        ),
        (GOOD | {"tensors": {"a.weight": {"part": "q", "stacked": "up"}}}, "'up' is not one of"),
        (GOOD | {"tensors": {"a.{leyer}.weight": {"part": "q"}}}, "does not match"),
    ],
)
def test_a_broken_template_names_the_file_and_the_key(directory: Path, broken: object, message: str) -> None:
    (directory / "own.json").write_text(broken if isinstance(broken, str) else json.dumps(broken), encoding="utf-8")
    with pytest.raises(TemplateError, match=message):
        load(directory)


def test_a_directory_without_what_all_templates_share(tmp_path: Path) -> None:
    with pytest.raises(TemplateError, match=r"common\.json"):
        load(tmp_path)


def test_a_good_template_loads(directory: Path) -> None:
    (directory / "own.json").write_text(json.dumps(GOOD), encoding="utf-8")
    _, by_type = load(directory)
    assert by_type["text", "own"].patterns[0].role.category == "embedding"


def test_two_patterns_with_one_name_are_an_error() -> None:
    patterns = load()[1]["text", "llama"].patterns
    short = [replace(one, name=one.name.removeprefix("model.")) for one in patterns]
    with pytest.raises(TemplateError, match=r"clash\.json: tensors: .* also fits"):
        template._table((template.Template("clash", (*patterns, *short), base="model."),))


def test_every_pattern_can_be_claimed() -> None:
    for one in load()[1].values():
        table = template._table((one,))
        for pattern in one.patterns:
            name = pattern.name.format(layer=3, expert=4, block=0)
            claim = template._claim(name, table)
            assert claim is not None, (one.name, name)
            assert claim[0].name == pattern.name, (one.name, name)
            assert claim[0].role.category in CATEGORIES
