"""The catalogue files: all load, every figure has a declared source, errors say where they are."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from checks.catalog.architecture import Architecture
from checks.catalog.entry import (
    MODELS,
    CatalogError,
    UnknownModelError,
    comparable,
    keys,
    load,
    load_all,
    main_component,
    read,
)

GOOD = """\
name: Example
repo: {value: example/model, source: card}
developer: {value: Example, source: card}
released: {value: "2025-01", source: card}
sources:
  card: "the model card"
architecture:
  hidden_size: {value: 64, source: card}
  rope_theta: {value: 10000, source: card}
"""
REQUIRED = {
    "solar_open_100b",
    "hyperclovax_seed_think_32b",
    "axk1",
    "vaetki",
    "k_exaone_236b_a23b",
    "mixtral_8x7b",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_r1",
    "qwen2_57b_a14b",
    "llama_3_70b",
    "llama_3_1_70b",
    "qwen2_5_72b",
    "dbrx",
    "glm_4_5_air",
    "glm_4_5",
    "kimi_k2",
    "phi_3_5_moe",
    "qwen3_30b_a3b",
    "qwen3_235b_a22b",
    "llama_4_scout",
    "llama_4_maverick",
    "gpt_oss_120b",
    "mistral_7b",
    "solar_10_7b",
    "exaone_4_0_32b",
    "exaone_4_5_32b",
    "exaone_3_5_32b",
    "qwen2_5_32b",
    "hyperclovax_seed_think_14b",
    "minimax_m2",
    "internlm3_8b",
    "qwen2_5_vl_32b",
    "qwen2_5_vl_7b",
}
#: Sources that are not enough on their own.
WEAK = {"memory", "verification_repository"}


def write(directory: Path, text: str, name: str = "example.yaml") -> Path:
    path = directory / name
    path.write_text(text, encoding="utf-8")
    return path


def test_the_models_of_the_tables_are_there() -> None:
    assert set(keys()) >= REQUIRED
    assert list(keys()) == sorted(keys())


@pytest.mark.parametrize("key", keys())
def test_every_figure_has_a_declared_source(key: str) -> None:
    entry = load(key)
    assert entry.key == key
    for path, figure in entry.figures.items():
        for one in (figure, *figure.conflicting):
            assert one.source in entry.sources, path
            assert one.unverified or one.source not in WEAK, f"{path} rests on {one.source} alone"


@pytest.mark.parametrize("key", keys())
def test_every_declared_source_is_used(key: str) -> None:
    entry = load(key)
    used = {one.source for figure in entry.figures.values() for one in (figure, *figure.conflicting)}
    assert used == set(entry.sources)


@pytest.mark.parametrize("key", keys())
def test_every_entry_says_who_when_and_where(key: str) -> None:
    entry = load(key)
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", entry.repo)
    assert entry.developer
    assert main_component(entry.components) in entry.components
    assert set(entry.prefixes) <= set(entry.components)
    assert set(entry.derived_from) <= set(keys())


def test_parts_of_one_model_have_distinct_prefixes() -> None:
    for entry in load_all().values():
        for component, prefixes in entry.prefixes.items():
            others = [name for other, names in entry.prefixes.items() if other != component for name in names]
            assert not any(one.startswith(other) for one in prefixes for other in others), entry.key


def test_no_file_names_a_machine_path() -> None:
    for path in MODELS.glob("*.yaml"):
        assert not re.search(r"/(work|home|tmp|root|Users)/", path.read_text(encoding="utf-8")), path.name


def test_corrections_of_the_first_tables() -> None:
    assert load("axk1").components["model"].num_key_value_heads is None
    assert load("axk1").components["model"].kv_lora_rank == 512
    assert load("qwen2_5_72b").components["model"].hidden_size == 8192
    assert load("qwen2_5_72b").components["model"].num_attention_heads == 64
    assert load("qwen2_57b_a14b").components["model"].n_shared_experts == 1
    assert load("llama_3_70b").components["model"].vocab_size == 128256
    assert any("MLA, not MHA" in note for note in load("axk1").notes)


def test_conflicting_figures_are_all_kept() -> None:
    tokens = load("vaetki").training["tokens"]
    assert [tokens.value, *(other.value for other in tokens.conflicting)] == [5.1e12, 9.8e12]


def test_an_unverified_figure_is_marked() -> None:
    assert load("k_exaone_236b_a23b").training["tokens"].unverified
    assert load("hyperclovax_seed_think_32b").figures["components.text.architecture.rope_theta"].unverified
    assert not load("solar_open_100b").figures["architecture.hidden_size"].unverified


def test_parts_of_hyperclovax() -> None:
    entry = load("hyperclovax_seed_think_32b")
    assert set(entry.components) == {"text", "vision", "projector"}
    assert entry.components["projector"] == Architecture()
    assert entry.prefixes["vision"] == ("model.vision_model.",)
    assert main_component(entry.components) == "text"


def test_text_and_model_are_one_kind() -> None:
    names = {name for _, name, _ in comparable("text")}
    assert names == {"text", "model"}
    assert {name for _, name, _ in comparable("vision")} == {"vision"}


def test_a_mirror_is_a_repository_with_or_without_a_commit(tmp_path: Path) -> None:
    mirrors = f"mirrors: {{value: [a/b, a/b@{'0' * 40}], source: card}}\nsources:"
    assert read(write(tmp_path, GOOD.replace("sources:", mirrors))).mirrors == ("a/b", f"a/b@{'0' * 40}")


def test_an_unknown_model_gets_a_suggestion() -> None:
    with pytest.raises(UnknownModelError, match=r"did you mean 'glm_4_5_air'"):
        load("glm_4.5_air")
    with pytest.raises(UnknownModelError, match="no model"):
        load("../../etc/passwd")


def test_the_example_is_good(tmp_path: Path) -> None:
    architecture = read(write(tmp_path, GOOD)).components["model"]
    assert architecture == Architecture(hidden_size=64, rope_theta=10000.0)
    assert isinstance(architecture.rope_theta, float)


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("hidden_size: {value: 64", "hiden_size: {value: 64", 8, "architecture.hiden_size: unknown key"),
        ("value: 64, source: card", "value: 64", 8, "source None is not declared"),
        ("value: 64, source: card", "value: 64, source: crad", 8, "source 'crad' is not declared"),
        ("value: 64, source: card", "value: 64, source: [card]", 8, "is not declared"),
        ("{value: 64, source: card}", "64", 8, "expected a figure"),
        ("{value: 64, source: card}", "[]", 8, "expected a figure"),
        ("value: 64", "value: 6.4", 8, "expected int, found 6.4"),
        ("value: 64", "value: true", 8, "expected int, found True"),
        ("value: 10000", "value: 1e4", 9, "expected float, found '1e4'"),
        ('value: "2025-01"', "value: 2025-01-01", 4, "expected a string, number"),
        ('value: "2025-01"', "value: 2025", 4, "expected a string"),
        ('value: "2025-01"', 'value: "January"', 4, "expected YYYY"),
        ('value: "2025-01"', "value: 2025-13-45", 1, "month must be in"),
        ("name: Example", "nam: Example", 1, "nam: unknown key"),
        ("name: Example\n", "", 1, "missing key 'name'"),
        ("architecture:", "architecture: {}\narchitecture:", 8, "duplicate key"),
        ("architecture:", "components: {}\narchitecture:", 1, "either architecture or components"),
        ("  card: ", "  other: ", 8, "source 'card' is not declared"),
        ("source: card}\nsources", "source: card, why: x}\nsources", 4, "unknown key 'why'"),
        ("value: 64, source: card", "value: 64, source: card, unverified: perhaps", 8, "true or false"),
        ("value: 64, source: card", "value: 64, source: card, within: wide", 8, "within: a number"),
        ("value: 64, source: card", "value: 64, source: card, without: [eyes]", 8, "expected without"),
        ("value: 64, source: card}", "value: 64, source: card", 9, "did not find expected"),
        ("sources:", "parameters: {sum: {value: 1, source: card}}\nsources:", 5, "parameters.sum: unknown key"),
        ("sources:", "notes: [1]\nsources:", 5, "expected a list of strings"),
        ("sources:", "mirrors: {value: a/b, source: card}\nsources:", 5, "expected a list"),
        (
            "sources:",
            "mirrors: {value: [a/b@main], source: card}\nsources:",
            5,
            "expected org/name or org/name@<commit",
        ),
        ("sources:", "mirrors: {value: [../b], source: card}\nsources:", 5, "expected org/name or org/name@<commit"),
    ],
)
def test_errors_say_where_they_are(tmp_path: Path, old: str, new: str, line: int, message: str) -> None:
    assert GOOD.count(old) >= 1
    path = write(tmp_path, GOOD.replace(old, new, 1))
    with pytest.raises(CatalogError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize("text", ["", "- a\n", "just text\n", "a: [\n"])
def test_something_else_than_a_catalogue_file(tmp_path: Path, text: str) -> None:
    with pytest.raises(CatalogError, match=r"example\.yaml:\d+: "):
        read(write(tmp_path, text))


def test_a_bad_file_name(tmp_path: Path) -> None:
    with pytest.raises(CatalogError, match="file name"):
        read(write(tmp_path, GOOD, "Not A Key.yaml"))


def test_importing_the_catalogue_imports_no_framework() -> None:
    code = (
        "import sys; from checks.catalog import comparison, nearest, parameters; "
        "print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
