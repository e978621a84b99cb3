"""What enters the MLPs agrees with what transformers' own models compute, for every family that has a template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checks.checkpoint import transformers_models
from checks.checkpoint.canonical import CanonicalModel
from checks.checkpoint.checkpoint import Checkpoint
from checks.pair import forward_model
from checks.pair import mlp_inputs as module
from checks.pair.forward_model import NoForwardPass
from checks.pair.mlp_inputs import mlp_inputs
from tests.checkpoint.tiny_models import FAMILIES, build

TEXTS = [[number * step % 60 + 1 for number in range(length)] for step, length in ((5, 12), (7, 9), (11, 3))]
POSITIONS = [(text, token) for text, ids in enumerate(TEXTS) for token in range(len(ids))]
# How transformers names what a neuron answers before its activation.
READERS = {"gate_proj": "gate", "up_proj": "up", "c_fc": "up", "dense_h_to_4h": "up", "fc1": "up"}


def saved(directory: Path, model_type: str, dtype: torch.dtype = torch.float32) -> Any:
    """A tiny model whose weights and gains are far from those of an untrained one, and its checkpoint."""
    model = build(model_type).eval()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point() and "inv_freq" not in name:
                value.normal_(0, 0.25)
                if "norm" in name or "ln_" in name:
                    value.add_(1)
    if dtype != torch.float32:
        model.to(dtype)
    model.save_pretrained(directory)
    return model.float() if dtype != torch.float32 else model


def run(directory: Path) -> tuple[CanonicalModel, dict[int, Tensor]]:
    checkpoint = Checkpoint(directory)
    model = CanonicalModel(checkpoint)
    return model, mlp_inputs(checkpoint, model, TEXTS, POSITIONS)


def read(model: Any, texts: list[list[int]]) -> tuple[dict[tuple[int, str], Tensor], dict[int, Tensor]]:
    """What dense neurons answer, by layer and reader; and what enters the MLPs, by layer: [positions, …]."""
    answers: dict[tuple[int, str], list[Tensor]] = {}
    inputs: dict[int, list[Tensor]] = {}
    decoder, layers = next(
        (module, child)
        for module in model.get_decoder().modules()
        for child in module.children()
        if isinstance(child, torch.nn.ModuleList)
    )
    for number, layer in enumerate(layers):
        for name, part in layer.named_modules():
            leaf = name.rpartition(".")[2]
            if leaf in READERS and "expert" not in name:
                part.register_forward_hook(
                    lambda _, __, out, key=(number, READERS[leaf]): answers.setdefault(key, []).append(
                        out.reshape(-1, out.shape[-1])
                    )
                )
            if name in ("mlp", "feed_forward", "block_sparse_moe", "ffn", "fc1"):
                part.register_forward_pre_hook(
                    lambda _, given, number=number: inputs.setdefault(number, []).append(
                        given[0].reshape(-1, given[0].shape[-1])
                    )
                )
    with torch.no_grad():
        for text in texts:
            decoder(input_ids=torch.tensor([text]), use_cache=False)
    joined = {key: torch.cat(values) for key, values in answers.items()}
    return joined, {layer: torch.cat(values) for layer, values in inputs.items()}


def centred(answers: Tensor) -> Tensor:
    """Answers [positions, neurons] less each neuron's mean, which biases alone decide."""
    return answers - answers.mean(0)


def assert_close(found: Tensor, expected: Tensor) -> None:
    scale = expected.abs().amax()
    assert scale > 0
    assert float((found - expected).abs().amax()) < 1e-3 * float(scale)


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_readers_answer_as_in_the_model(model_type: str, tmp_path: Path) -> None:
    original = saved(tmp_path, model_type)
    model, probes = run(tmp_path)
    answers, inputs = read(original, TEXTS)
    assert set(probes) == set(model.layers)
    for layer in model.layers:
        for place in model.mlps(layer):
            folded, plain = model.mlp(place, folded=True), model.mlp(place)
            assert_close(centred(probes[layer] @ folded.up.T), centred(inputs[layer] @ plain.up.T))
            for part, matrix in (("up", folded.up), ("gate", folded.gate)):
                if place.kind == "dense" and (layer, part) in answers and matrix is not None:
                    assert_close(centred(probes[layer] @ matrix.T), centred(answers[layer, part]))


def test_weights_of_few_bits_are_widened_layer_by_layer(tmp_path: Path) -> None:
    original = saved(tmp_path, "qwen3_moe", torch.bfloat16)
    _, probes = run(tmp_path)
    _, inputs = read(original, TEXTS)  # the same rounded weights, all of them in float32
    gain = original.model.layers[1].post_attention_layernorm.weight
    assert probes[1].dtype == torch.float32
    assert_close(probes[1], inputs[1] / gain.detach())


def test_batches_and_order_of_positions_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, "mixtral")
    checkpoint = Checkpoint(tmp_path)
    model = CanonicalModel(checkpoint)
    once = mlp_inputs(checkpoint, model, TEXTS, POSITIONS)
    monkeypatch.setattr(module, "TOKENS_AT_ONCE", 10)
    apart = mlp_inputs(checkpoint, model, TEXTS, POSITIONS[::-1])
    for layer, states in once.items():
        assert torch.allclose(states, apart[layer].flip(0), atol=1e-5)


def test_gains_of_zero_are_seen_by_no_reader(tmp_path: Path) -> None:
    original = saved(tmp_path, "llama")
    with torch.no_grad():
        original.model.layers[0].post_attention_layernorm.weight[3] = 0
    original.save_pretrained(tmp_path)
    _, probes = run(tmp_path)
    assert bool((probes[0][:, 3] == 0).all())
    assert bool(probes[0].isfinite().all())


def configured(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "unheard_of"}, "model type 'unheard_of' without code of the checkpoint"),
        ({"model_type": None}, "names no model type"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised"),
        ({"num_hidden_layers": 3}, "do not fit its config.json"),
        ({"num_hidden_layers": 10**9, "model_type": "gpt_neox_japanese"}, "1000000000 layers, and 2 are stored"),
        ({"vocab_size": 10**10, "model_type": "granite"}, "[0-9]{12} weights, and [0-9]{5} are stored"),
        ({"intermediate_size": 50}, "weights are missing or of another shape, first .*down_proj"),
    ],
)
def test_what_cannot_be_run_is_refused_with_the_reason(changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    saved(tmp_path, "llama")
    configured(tmp_path, **changes)
    with pytest.raises(NoForwardPass, match=reason):
        run(tmp_path)


def test_code_of_the_checkpoint_is_not_run(tmp_path: Path) -> None:
    saved(tmp_path, "llama")
    marker = tmp_path / "was_run"
    (tmp_path / "modeling.py").write_text(f"open({str(marker)!r}, 'w')\nclass Model: pass\nclass Config: pass\n")
    configured(tmp_path, auto_map={"AutoConfig": "modeling.Config", "AutoModelForCausalLM": "modeling.Model"})
    _, probes = run(tmp_path)
    assert set(probes) == {0, 1}
    assert not marker.exists()


def test_adapters_and_foreign_ids_are_refused(tmp_path: Path) -> None:
    saved(tmp_path, "llama")
    checkpoint = Checkpoint(tmp_path)
    model = CanonicalModel(checkpoint)
    with pytest.raises(NoForwardPass, match="token 64, and the embedding has 64 rows"):
        mlp_inputs(checkpoint, model, [[1, 64]], [(0, 1)])
    with pytest.raises(ValueError, match="outside"):
        mlp_inputs(checkpoint, model, [[1, 2]], [(0, 2)])
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(NoForwardPass, match="adapter"):
        run(tmp_path)


def test_too_large_a_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path, "llama")
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 100 kB\nMemAvailable: 50 kB\n")
    with monkeypatch.context() as patched:
        patched.setattr(transformers_models, "MEMINFO", meminfo)
        with pytest.raises(NoForwardPass, match="GB on cpu, and 0"):
            run(tmp_path)
    monkeypatch.setattr(forward_model, "MOST_ON_CPU", 1000)
    with pytest.raises(NoForwardPass, match="without a GPU"):
        run(tmp_path)


def test_broken_weights_are_refused(tmp_path: Path) -> None:
    original = saved(tmp_path, "llama")
    with torch.no_grad():
        original.model.embed_tokens.weight.fill_(float("nan"))
    original.save_pretrained(tmp_path)
    with pytest.raises(NoForwardPass, match="not finite"):
        run(tmp_path)
