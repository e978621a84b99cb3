"""The training script works on a tiny budget, and the stored checkpoints are what examples/README.md says."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
CHECKPOINTS = EXAMPLES / "checkpoints"
NAMES = ["base", "independent", "derived", "continued", "control"]
TEXTS = [
    'def greet(name: str) -> str:\n\treturn f"hello {name}"\n',
    " leading and trailing spaces , and punctuation !  ",
    "naïve café — 漢字 🐍 \x00\r\n",
]


def load_script() -> ModuleType:
    """Import examples/train.py, which is not in a package."""
    spec = importlib.util.spec_from_file_location("examples_train", EXAMPLES / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


train = load_script()


def read_log(directory: Path) -> list[dict[str, float]]:
    """The lines of one checkpoint's training log."""
    return [json.loads(line) for line in (directory / "training_log.jsonl").read_text(encoding="utf-8").splitlines()]


def read_config(name: str) -> dict[str, Any]:
    """One stored checkpoint's config.json."""
    config: dict[str, Any] = json.loads((CHECKPOINTS / name / "config.json").read_text(encoding="utf-8"))
    return config


@pytest.fixture(scope="module")
def parts() -> dict[str, list[str]]:
    """A small text in the shape collect_text returns."""
    code = [path.read_text(encoding="utf-8") for path in train.library_files()[:32]]
    documents = [train.docstrings(source) for source in code]
    return {"docs_a": documents[0::2] * 2, "docs_b": documents[1::2] * 2, "code": code}


# --- the script -----------------------------------------------------------------------------------


def test_library_files_are_sorted_and_leave_out_tests_and_packages() -> None:
    files = train.library_files()
    assert files == train.library_files()
    assert {"argparse.py", "textwrap.py"} <= {path.name for path in files}
    assert not [path for path in files if {"site-packages", "test", "tests"} & set(path.parts)]


def test_docstrings_come_in_the_order_of_the_file() -> None:
    source = '"""One."""\nclass A:\n    """Two."""\n    def f(self):\n        """Three."""\ndef g():\n    """Four."""\n'
    assert train.docstrings(source) == "One.\n\nTwo.\n\nThree.\n\nFour."
    assert train.docstrings("x = 1\n") == ""


def test_text_description_changes_with_the_text() -> None:
    first = train.describe_text({"code": ["a", "b"]})["code"]
    assert first["documents"] == 2
    assert first["bytes"] == 3
    assert first == train.describe_text({"code": ["a", "b"]})["code"]
    assert first["sha256"] != train.describe_text({"code": ["ab"]})["code"]["sha256"]


def test_batches_depend_on_the_seed_only() -> None:
    stream = torch.arange(5000)
    first = next(train.batches(stream, 1))
    assert first.shape == (train.BATCH, train.CONTEXT)
    assert torch.equal(first, next(train.batches(stream, 1)))
    assert not torch.equal(first, next(train.batches(stream, 2)))
    assert torch.equal(first[:, 1:], first[:, :-1] + 1), "a window is contiguous"


def test_every_sixteenth_document_is_held_out(parts: dict[str, list[str]]) -> None:
    tokenizer = train.train_tokenizer(parts["docs_a"], vocab_size=300)
    stream, held_out = train.encode(tokenizer, [str(number) for number in range(32)])
    assert tokenizer.decode(held_out) == f"{train.END_OF_TEXT}15{train.END_OF_TEXT}31"
    assert f"14{train.END_OF_TEXT}16" in tokenizer.decode(stream)


def test_learning_rate_warms_up_and_decays() -> None:
    recipe = train.Recipe(text="code", seed=1, steps=100, learning_rate=1.0, warmup=10)
    rates = [train.learning_rate_at(step, recipe) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([step / 10 for step in range(1, 11)])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] == pytest.approx(0.1)


def test_a_tiny_run_writes_checkpoints_and_repeats(
    tmp_path: Path, parts: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "BATCH", 4)
    scratch = train.Recipe(text="docs_a", seed=5, steps=12, learning_rate=3e-3, warmup=3)
    further = train.Recipe(text="code", seed=6, steps=4, learning_rate=1e-3, warmup=2, parent="base")
    record = train.make_checkpoint("base", scratch, parts, tmp_path / "one")
    train.make_checkpoint("base", scratch, parts, tmp_path / "two")
    train.make_checkpoint("derived", further, parts, tmp_path / "one")

    log = read_log(tmp_path / "one" / "base")
    assert [entry["step"] for entry in log] == [1, 10, 12]
    assert log[-1]["tokens"] == record["trained_tokens"] == 12 * train.BATCH * train.CONTEXT
    assert log[0]["loss"] == pytest.approx(math.log(train.VOCAB_SIZE), abs=0.3)
    assert log[-1]["loss"] < log[0]["loss"]
    assert record["validation_loss"] < record["validation_loss_before"]

    first = load_file(tmp_path / "one" / "base" / "model.safetensors")
    second = load_file(tmp_path / "two" / "base" / "model.safetensors")
    derived = load_file(tmp_path / "one" / "derived" / "model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first.keys() == derived.keys()
    assert not torch.equal(first["lm_head.weight"], derived["lm_head.weight"])
    tokenizers = [(tmp_path / "one" / name / "tokenizer.json").read_bytes() for name in ("base", "derived")]
    assert tokenizers[0] == tokenizers[1]


# --- the stored checkpoints -----------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_stored_model_loads_and_predicts(name: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINTS / name)
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINTS / name)
    assert model.dtype == torch.bfloat16
    assert (0.2e6 < model.num_parameters() < 0.25e6) if name == "control" else (0.9e6 < model.num_parameters() < 1.1e6)
    assert len(tokenizer) == model.config.vocab_size
    text = "Return the number of items in the list. If the value is not found, raise ValueError."
    ids = tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert loss < math.log(model.config.vocab_size) - 2


@pytest.mark.parametrize("name", NAMES)
def test_stored_tensors_are_finite_bf16_and_match_the_config(name: str) -> None:
    tensors = load_file(CHECKPOINTS / name / "model.safetensors")
    config = read_config(name)
    hidden, layers, head = config["hidden_size"], config["num_hidden_layers"], config["head_dim"]
    keys = config["num_key_value_heads"] * head
    layer_shapes = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (config["num_attention_heads"] * head, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, config["num_attention_heads"] * head),
        "mlp.gate_proj": (config["intermediate_size"], hidden),
        "mlp.up_proj": (config["intermediate_size"], hidden),
        "mlp.down_proj": (hidden, config["intermediate_size"]),
    }
    expected: dict[str, tuple[int, ...]] = {
        f"model.layers.{layer}.{part}.weight": shape for layer in range(layers) for part, shape in layer_shapes.items()
    }
    expected |= {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    expected["lm_head.weight"] = (config["vocab_size"], hidden)
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == expected
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all(torch.isfinite(tensor).all() for tensor in tensors.values())


@pytest.mark.parametrize("name", NAMES)
def test_stored_norms_are_trained(name: str) -> None:
    tensors = load_file(CHECKPOINTS / name / "model.safetensors")
    norms = [tensor.float() for key, tensor in tensors.items() if "norm" in key]
    assert len(norms) == 2 * read_config(name)["num_hidden_layers"] + 1
    assert all(norm.std() > 0.01 for norm in norms), "fresh ones are all equal"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("text", TEXTS)
def test_stored_tokenizer_gives_text_back(name: str, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINTS / name)
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.parametrize("name", NAMES)
def test_stored_log_follows_the_recipe(name: str) -> None:
    recipe = train.RECIPES[name]
    log = read_log(CHECKPOINTS / name)
    before = recipe.first_step - 1
    steps = [int(entry["step"]) - before for entry in log]
    assert steps == [1, *range(train.LOG_EVERY, recipe.steps + 1, train.LOG_EVERY)]
    for step, entry in zip(steps, log, strict=True):
        assert entry["tokens"] == entry["step"] * train.BATCH * train.CONTEXT
        assert entry["learning_rate"] == pytest.approx(train.learning_rate_at(step, recipe), abs=1e-6)


def test_continued_goes_on_where_base_ended() -> None:
    ended, begins = read_log(CHECKPOINTS / "base")[-1], read_log(CHECKPOINTS / "continued")[0]
    assert begins["step"] == ended["step"] + 1
    assert begins["learning_rate"] == pytest.approx(ended["learning_rate"], rel=1e-3)
    assert begins["loss"] == pytest.approx(ended["loss"], abs=0.4)


@pytest.mark.parametrize("name", ["base", "independent"])
def test_scratch_losses_start_at_ln_v_and_end_far_below(name: str) -> None:
    uniform = math.log(read_config(name)["vocab_size"])
    log = read_log(CHECKPOINTS / name)
    assert log[0]["loss"] == pytest.approx(uniform, abs=0.15)
    assert sum(entry["loss"] for entry in log[-10:]) / 10 < uniform - 3


def test_derived_loss_starts_far_below_ln_v() -> None:
    uniform = math.log(read_config("derived")["vocab_size"])
    log = read_log(CHECKPOINTS / "derived")
    assert log[0]["loss"] < uniform - 2
    assert sum(entry["loss"] for entry in log[-10:]) / 10 < log[0]["loss"] - 0.5


def test_derived_is_near_base_and_independent_is_not() -> None:
    base, independent, derived = (load_file(CHECKPOINTS / name / "model.safetensors") for name in NAMES[:3])

    def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
        first, second = (tensor.float().flatten() - tensor.float().mean() for tensor in (one, other))
        return float(first @ second / (first.norm() * second.norm()))

    matrices = [key for key in base if "norm" not in key]
    assert all(0.9 < cosine(base[key], derived[key]) < 0.999 for key in matrices)
    assert all(abs(cosine(base[key], independent[key])) < 0.1 for key in matrices)
    assert not [key for key in base if torch.equal(base[key], derived[key])]


def test_training_record_covers_the_stored_checkpoints() -> None:
    record = json.loads((CHECKPOINTS / "training.json").read_text(encoding="utf-8"))
    assert sorted(record) == sorted(NAMES)
    for name in NAMES:
        assert record[name]["seed"] == train.RECIPES[name].seed
        before = (train.RECIPES[name].first_step - 1) * train.BATCH * train.CONTEXT
        assert record[name]["trained_tokens"] == read_log(CHECKPOINTS / name)[-1]["tokens"] - before
        assert {part["sha256"] for part in record[name]["text_parts"].values()}


def test_checkpoints_are_small_and_free_of_local_paths() -> None:
    for name in NAMES:
        files = list((CHECKPOINTS / name).iterdir())
        assert sum(path.stat().st_size for path in files) < 2.5e6
        for path in files:
            if path.name in {"config.json", "generation_config.json", "tokenizer_config.json"}:
                text = path.read_text(encoding="utf-8")
                assert "_name_or_path" not in text
                assert "is_local" not in text
                assert "/" not in text
