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
from checks.checkpoint.gguf_file import GgufFile
from checks.checkpoint.gguf_header import check_gguf_header
from tests.checkpoint.tiny_models import build

gguf = pytest.importorskip("gguf")

from tests.checkpoint.tiny_gguf import ARCHITECTURES, write_gguf  # noqa: E402 - needs the library


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
