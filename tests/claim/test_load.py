"""Claim files → claims: what is right is resolved, what is wrong is located, all at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checks.claim.load import load_claim
from checks.claim.source import ClaimError

Write = Callable[..., Path]


def messages_of(path: Path) -> list[str]:
    """The located messages of a claim that must be refused, without the directory."""
    with pytest.raises(ClaimError) as caught:
        load_claim(path)
    return [str(line).removeprefix(f"{path.parent}/") for line in str(caught.value).splitlines()]


def test_a_catalogue_claim_gets_the_facts_of_its_models(write_claim: Write) -> None:
    claim = load_claim(write_claim(model="solar_open_100b", references=["glm_4_5_air", "mixtral_8x7b"]))
    (component,) = claim.components
    assert component.name is None
    assert [reference.source.name for reference in component.panel] == ["glm_4_5_air", "mixtral_8x7b"]
    architecture = claim.model.architecture(None)
    assert architecture is not None
    assert architecture.num_hidden_layers == 48
    assert component.panel[0].source.repo == "zai-org/GLM-4.5-Air"


def test_paths_are_relative_to_the_claim_and_configs_are_read(
    write_claim: Write, save_checkpoint: Callable[..., Path], llama_tensors: Any, llama_config: Any
) -> None:
    save_checkpoint("models/mine", llama_tensors(), llama_config())
    claim = load_claim(
        write_claim(name="claims/mine.yaml", model={"path": "../models/mine"}, references=["mistral_7b"])
    )
    assert claim.model.name == "candidate"
    assert claim.model.path == str(write_claim().parent / "models" / "mine")
    architecture = claim.model.architecture(None)
    assert architecture is not None
    assert architecture.hidden_size == 64


def test_nearest_architectures_join_the_panel_and_say_so(write_claim: Write) -> None:
    claim = load_claim(write_claim(model="axk1", references=["deepseek_v2"], nearest=3))
    added = [reference for reference in claim.components[0].panel if reference.nearest]
    assert len(added) == 3
    assert {"kimi_k2", "deepseek_v3"} <= {reference.source.name for reference in added}
    assert "axk1" not in {reference.source.name for reference in claim.components[0].panel}


def test_a_component_takes_its_own_panel_or_the_claims(write_claim: Write) -> None:
    claim = load_claim(
        write_claim(
            model="hyperclovax_seed_think_32b",
            references=["llama_3_1_70b"],
            components={
                "text": {"prefix": "model.language_model."},
                "vision": {
                    "prefix": "model.vision_model.",
                    "references": ["qwen2_5_vl_32b"],
                    "disclosed": ["qwen2_5_vl_32b"],
                },
            },
        )
    )
    text, vision = claim.components
    assert [one.source.name for one in text.panel] == ["llama_3_1_70b"]
    assert [one.source.name for one in vision.panel] == ["qwen2_5_vl_32b"]
    assert vision.disclosed == {"qwen2_5_vl_32b"}
    assert vision.panel[0].prefixes[-1] == ""
    assert "visual." in vision.panel[0].prefixes


def test_equal_names_of_different_models_are_different_sources(
    write_claim: Write, save_checkpoint: Callable[..., Path], llama_tensors: Any, llama_config: Any
) -> None:
    for name in ("a", "b", "c"):
        save_checkpoint(name, llama_tensors(), llama_config())
    first = load_claim(write_claim(name="1.yaml", model={"path": "c"}, references=[{"name": "mixtral", "path": "a"}]))
    second = load_claim(write_claim(name="2.yaml", model={"path": "c"}, references=[{"name": "mixtral", "path": "b"}]))
    third = load_claim(write_claim(name="3.yaml", model={"path": "c"}, references=[{"name": "mixtral", "path": "a"}]))
    sources = [claim.components[0].panel[0].source for claim in (first, second, third)]
    assert sources[0] != sources[1]
    assert sources[0] == sources[2]
    assert hash(sources[0]) == hash(sources[2])


def test_all_mistakes_of_a_file_come_at_once_each_at_its_place(write_claim: Write) -> None:
    path = write_claim(
        "claim: test\n"
        "statement: x\n"
        "model: solar_open_10b\n"
        "refrences: [mixtral_8x7b]\n"
        "nearest: many\n"
        "checks: {only: [similarty]}\n"
    )
    assert messages_of(path) == [
        "claim.yaml:3:8: unknown model 'solar_open_10b'; did you mean 'solar_open_100b'?",
        "claim.yaml:4:1: unknown key 'refrences'; did you mean 'references'?",
        "claim.yaml:5:10: nearest: expected a whole number, found text 'many'",
        "claim.yaml:6:17: unknown check 'similarty'; did you mean 'similarity'?",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": "solar_open_100b", "references": ["mixtral"]}, "unknown model 'mixtral'"),
        ({"model": "mixtral_8x7b", "references": ["mixtral_8x7b"]}, "cannot be its own reference"),
        ({"model": "axk1", "references": ["kimi_k2", "kimi_k2"]}, "names 'kimi_k2' twice"),
        ({"model": "axk1", "references": []}, "the panel is empty"),
        ({"model": {"path": "nowhere"}, "references": ["kimi_k2"]}, "no directory 'nowhere' beside the claim"),
        ({"model": {"repo": "org/name"}, "references": ["kimi_k2"]}, "brings its config"),
        ({"model": {"repo": "a/b", "path": "c"}, "references": ["kimi_k2"]}, "not from both"),
        ({"model": {"prefix": "x."}, "references": ["kimi_k2"]}, "needs a path, a repo or the name"),
        ({"model": {"name": "unknown"}, "references": ["kimi_k2"]}, "unknown model 'unknown'"),
        ({"model": "axk1", "references": [{"path": ".", "revision": "x"}]}, "a revision belongs to a repo"),
        ({"model": "axk1", "references": [7]}, "expected a key of the catalogue, or a mapping"),
        ({"model": "axk1", "references": [{"pth": "x"}]}, "unknown key 'pth'; did you mean 'path'?"),
        (
            {"model": "axk1", "references": ["kimi_k2"], "thresholds": {"similarity.mean": {"reason": "r"}}},
            "at least 2",
        ),
        (
            {
                "model": "axk1",
                "references": ["kimi_k2"],
                "thresholds": {"similarity.maen": {"supports_below": 0.2, "reason": "r"}},
            },
            "did you mean 'similarity.mean'?",
        ),
        (
            {
                "model": "axk1",
                "references": ["kimi_k2"],
                "thresholds": {"identity.sha256": {"alpha": 0.5, "reason": "r"}},
            },
            "identity.sha256 has no 'alpha'",
        ),
        (
            {"model": "axk1", "references": ["kimi_k2"], "thresholds": {"similarity.mean": {"supports_below": 0.2}}},
            "missing key 'reason'",
        ),
        (
            {
                "model": "axk1",
                "components": {"text": {"prefix": "", "references": ["kimi_k2"], "disclosed": ["kimi_k3"]}},
            },
            "disclosed model 'kimi_k3' is not in this component's panel",
        ),
        (
            {"model": "axk1", "components": {"Te-xt": {"prefix": ""}}, "references": ["kimi_k2"]},
            "'Te-xt' does not match",
        ),
        ({"model": "axk1", "references": ["kimi_k2"], "claim": "Not-A-Name"}, "does not match"),
        ({"model": {"path": "a\0b"}, "references": ["kimi_k2"]}, "not a path that can be used"),
        ({"model": {"path": 5000 * "x"}, "references": ["kimi_k2"]}, "not a path that can be used"),
        (
            {"model": "axk1", "references": ["kimi_k2"], "components": {"a": {"prefix": "model.layers.3."}}},
            "components.a.prefix: 'model.layers.3.' does not match",
        ),
        ({"model": "axk1", "references": ["kimi_k2"], "components": {"a": {"prefix": "model.layers"}}}, "not match"),
        ({"model": "axk1", "references": ["kimi_k2"], "components": {"a": {"prefix": 3}}}, "text or a list of texts"),
        (
            {
                "model": "axk1",
                "references": ["kimi_k2"],
                "thresholds": {"identity.sha256": {"contradicts_from": 0, "reason": "r"}},
            },
            "supports_below 1 lies above contradicts_from 0",
        ),
    ],
)
def test_a_mistake_is_named_with_what_to_do(write_claim: Write, content: dict[str, Any], message: str) -> None:
    found = messages_of(write_claim(**content))
    assert any(message in line for line in found), found
    assert all(line.startswith("claim.yaml:") for line in found)


@pytest.mark.parametrize(
    "text", ["[1, 2]", "{", '{"hidden_size": "many"}', '{"num_hidden_layers": -4}', '{"num_hidden_layers": 9999999}']
)
def test_a_hostile_config_is_a_located_mistake(write_claim: Write, tmp_path: Path, text: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(text)
    (line,) = messages_of(write_claim(model={"path": "model"}, references=["mistral_7b"]))
    assert "cannot be used as a config.json" in line


@pytest.mark.parametrize("text", ["", "# nothing\n", "just text", "- a\n- b\n"])
def test_a_file_that_is_no_claim_says_what_a_claim_needs(write_claim: Write, text: str) -> None:
    assert messages_of(write_claim(text))


def test_a_model_name_of_the_catalogue_with_a_path_keeps_its_facts(write_claim: Write, tmp_path: Path) -> None:
    claim = load_claim(write_claim(model={"name": "mistral_7b", "path": "weights"}, references=["solar_10_7b"]))
    architecture = claim.model.architecture(None)
    assert architecture is not None
    assert architecture.num_hidden_layers == 32
    assert claim.model.path == str(tmp_path / "weights")


def test_another_model_may_not_take_a_name_of_the_catalogue(
    write_claim: Write, save_checkpoint: Callable[..., Path], llama_tensors: Any, llama_config: Any
) -> None:
    save_checkpoint("other", llama_tensors(), llama_config())
    (line,) = messages_of(write_claim(model="axk1", references=[{"name": "kimi_k2", "path": "other"}]))
    assert "not that of the catalogue's 'kimi_k2' (hidden_size 64, not 7168); give it another name" in line


def test_the_schema_file_describes_every_key_of_the_contract(repository: Path) -> None:
    schema = json.loads((repository / "checks" / "claim" / "schema.json").read_text())
    assert set(schema["properties"]) == {
        "claim",
        "statement",
        "claimant",
        "source",
        "model",
        "references",
        "nearest",
        "components",
        "training",
        "initial",
        "behavior",
        "checks",
        "thresholds",
    }
    assert schema["additionalProperties"] is False


@pytest.mark.parametrize("name", ["solar", "hyperclovax", "axk1", "vaetki", "k_exaone"])
def test_the_claims_of_the_repository_load(repository: Path, name: str) -> None:
    claim = load_claim(repository / "claims" / f"{name}.yaml")
    assert all(len(component.panel) >= 1 for component in claim.components)
