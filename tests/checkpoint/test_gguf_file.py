from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers.modeling_gguf_pytorch_utils
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checks.checkpoint.canonical import CanonicalModel
from checks.checkpoint.checkpoint import Checkpoint
from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.gguf_file import MODEL_TYPES, GgufFile
from checks.checkpoint.gguf_header import check_gguf_header
from tests.checkpoint.tiny_models import build

gguf = pytest.importorskip("gguf")
ARCHITECTURES = {model_type: name for name, model_type in MODEL_TYPES.items()} | {"mixtral": "llama"}


def paired(values: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rotated rows as llama.cpp wants them: the two of a frequency side by side."""
    return values.reshape(heads, 2, -1, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


def write_gguf(path: Path, model: Any, model_type: str, kind: Any = None) -> dict[str, torch.Tensor]:
    """A GGUF file as llama.cpp's converter makes it; returns the original tensors, a stack of experts taken apart."""
    config, architecture = model.config, ARCHITECTURES[model_type]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", 48))
    writer.add_head_count(config.num_attention_heads)
    key_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    writer.add_head_count_kv(key_heads)
    writer.add_layer_norm_rms_eps(getattr(config, "rms_norm_eps", 1e-5))
    writer.add_layer_norm_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_context_length(64)
    writer.add_vocab_size(64)
    writer.add_key_length(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    writer.add_rope_dimension_count(getattr(config, "head_dim", None) or 8)
    writer.add_token_list([f"t{token}" for token in range(64)])
    if experts := getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(getattr(config, "moe_intermediate_size", 48))
    names = gguf.get_tensor_name_map(next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture), 4)
    originals: dict[str, torch.Tensor] = {}
    stacks: dict[str, np.ndarray[Any, Any]] = {}
    leaves = ("w1", "w3", "w2") if model_type == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        front, middle, part = name.partition(".experts.")
        if middle:
            front = front.replace(".mlp", ".block_sparse_moe") if model_type == "mixtral" else front
            whole = value.chunk(2, 1) if part == "gate_up_proj" else (value,)
            for leaf, matrices in zip(leaves if len(whole) == 2 else leaves[2:], whole, strict=False):
                stacks[f"{front}.experts.{leaf}.weight"] = matrices.numpy()
                originals |= {f"{front}.experts.{at}.{leaf}.weight": one for at, one in enumerate(matrices)}
            continue
        name = name.replace(".mlp.gate.", ".block_sparse_moe.gate.") if model_type == "mixtral" else name
        originals[name] = value
        stacks[name] = value.numpy()
    for name, values in stacks.items():
        if architecture == "llama" and (".q_proj." in name or ".k_proj." in name):
            values = paired(values, config.num_attention_heads if ".q_proj." in name else key_heads)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            values = values + 1
        if architecture == "gpt2" and any(f".{one}.weight" in name for one in ("c_attn", "c_proj", "c_fc")):
            values = values.T
        stem, _, leaf = name.rpartition(".")
        stored = f"{names.get_name(stem)}.{leaf}"
        values = values[0] if stored.endswith("ffn_gate_inp_shexp.weight") else np.ascontiguousarray(values)
        if kind is not None and values.ndim > 1 and values.shape[-1] % 32 == 0:
            writer.add_tensor(stored, gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(stored, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return originals


def model_of(model_type: str) -> Any:
    model = build(model_type, **({"num_hidden_layers": 2} if model_type == "qwen2_moe" else {})).eval()
    for value in model.state_dict().values():
        value.normal_(0, 0.25)
    return model


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_the_original_tensors_under_their_names(tmp_path: Path, model_type: str) -> None:
    if model_type in ("llama", "qwen2_moe"):  # whose biases and dense layers the library's map has not
        changes = {"attention_bias": False, "mlp_bias": False} if model_type == "llama" else {"mlp_only_layers": []}
        model = build(model_type, **changes)
    else:
        model = model_of(model_type)
    originals = write_gguf(tmp_path / "model.gguf", model, model_type)
    file = GgufFile(tmp_path / "model.gguf")
    assert file.config["model_type"] == model_type
    assert file.tensors.keys() == originals.keys()
    for name, value in originals.items():
        assert file.tensors[name].shape == tuple(value.shape), name
        torch.testing.assert_close(file.read(name), value, rtol=0, atol=1e-6)
        torch.testing.assert_close(file.read(name, slice(1, 3)), value[1:3], rtol=0, atol=1e-6)
    assert (file.roles.unassigned, file.roles.problems, file.roles.inferred_because) == ((), {}, None)
    assert file.roles.missing_count == 0


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "gpt2", "qwen3_moe"])
def test_transformers_reads_the_same(tmp_path: Path, model_type: str) -> None:
    changes = {"attention_bias": False, "mlp_bias": False} if model_type == "llama" else {}
    path, loaded = tmp_path / "model.gguf", build(model_type, **changes)
    write_gguf(path, loaded, model_type)
    for value in loaded.state_dict().values():
        value.zero_()
    reader = transformers.modeling_gguf_pytorch_utils.load_gguf_checkpoint
    tensors = reader(path, return_tensors=True, model_to_load=loaded)["tensors"]
    assert not loaded.load_state_dict(tensors, strict=False).unexpected_keys
    model = CanonicalModel(GgufFile(path))
    loaded.save_pretrained(tmp_path / "saved")
    again = CanonicalModel(Checkpoint(tmp_path / "saved"))
    for part in ("q", "k", "v", "o"):
        torch.testing.assert_close(model.folded(part, 1), again.folded(part, 1), rtol=0, atol=1e-6)
    torch.testing.assert_close(model.folded("head"), again.folded("head"), rtol=0, atol=1e-6)
    assert model.mlps(1) == again.mlps(1)
    place = model.mlps(1)[-1]
    torch.testing.assert_close(model.mlp(place, True).up, again.mlp(place, True).up, rtol=0, atol=1e-6)


def test_quantised_values_are_those_of_the_library(tmp_path: Path) -> None:
    model = build("qwen3_moe")
    kind = gguf.GGMLQuantizationType.Q8_0
    originals = write_gguf(tmp_path / "model.gguf", model, "qwen3_moe", kind)
    file = GgufFile(tmp_path / "model.gguf")
    for name, value in originals.items():
        values, rough = value.numpy(), file.read(name)
        if values.ndim > 1 and values.shape[-1] % 32 == 0:
            expected = gguf.dequantize(gguf.quantize(values, kind), kind)
            assert np.array_equal(rough.numpy(), expected), name
            assert not torch.equal(rough, value)
            assert torch.equal(file.read(name, slice(2, 5)), rough[2:5])


def test_what_is_read_may_be_changed(tmp_path: Path) -> None:
    write_gguf(tmp_path / "model.gguf", build("qwen2"), "qwen2")
    model = CanonicalModel(GgufFile(tmp_path / "model.gguf"))
    before = model.folded("o", 0)
    model.matrix("o", 0).zero_()
    assert torch.equal(model.folded("o", 0), before)


def test_an_architecture_whose_changes_are_not_known(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "deepseek2")
    writer.add_tensor("output_norm.weight", np.ones(4, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointUnavailable, match=r"'deepseek2' models is not known here, only in gemma2"):
        GgufFile(tmp_path / "model.gguf")


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointUnavailable, match=r"from-scratch\[gguf\]"):
        GgufFile(tmp_path / "model.gguf")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "model.gguf"
    write_gguf(path, build("qwen2"), "qwen2")
    return path.read_bytes()


def test_lengths_beyond_the_file(tmp_path: Path, good: bytes) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(good)
    check_gguf_header(path)
    for cut in (0, 3, 20, 400, 2000):
        path.write_bytes(good[:cut])
        with pytest.raises(CheckpointUnavailable, match=r"model\.gguf: is no GGUF file, or was cut"):
            GgufFile(path)
    tokens = good.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 8
    for at, message in ((8, "entries of at least 24"), (16, "entries of at least 12"), (tokens, "of at least 8")):
        path.write_bytes(good[:at] + struct.pack("<Q", 2**60) + good[at + 8 :])
        with pytest.raises(CheckpointUnavailable, match=message):
            GgufFile(path)
    path.write_bytes(b"GGUF" + struct.pack("<I", 1) + good[8:])
    with pytest.raises(CheckpointUnavailable, match="version 1"):
        GgufFile(path)
    path.write_bytes(good[:-500])
    with pytest.raises(CheckpointUnavailable):
        GgufFile(path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 3000), byte=st.integers(0, 255))
def test_a_damaged_header_is_read_or_refused(tmp_path: Path, good: bytes, at: int, byte: int) -> None:
    damaged = bytearray(good)
    damaged[at] = byte
    (tmp_path / "model.gguf").write_bytes(damaged)
    try:
        file = GgufFile(tmp_path / "model.gguf")
        for name in file.tensors:
            file.read(name)
    except CheckpointUnavailable:
        pass
