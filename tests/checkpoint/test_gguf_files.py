"""A GGUF file where a claim names a checkpoint: opened through Model, and compared by a run of pytest."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checks.checkpoint.canonical import CanonicalModel
from checks.checkpoint.checkpoint import Checkpoint
from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.gguf_files import GgufCheckpoint, GgufFiles, local_files
from checks.checkpoint.gguf_header import HEADER_NAME, gguf_header, gguf_values
from checks.checkpoint.identity import identity_of
from checks.checkpoint.model import Model
from checks.claim.model import ModelSource
from checks.evidence.store import Store
from checks.pair.comparison import compare
from checks.tokens import vocabulary_of
from tests.checkpoint.tiny_models import build
from tests.claim_runs import ExampleClaim

gguf = pytest.importorskip("gguf")

from tests.checkpoint.tiny_gguf import write_gguf  # noqa: E402 - needs the library

Q8 = gguf.GGMLQuantizationType.Q8_0
LLAMA = {"attention_bias": False, "mlp_bias": False}


def model_at(path: Path) -> Model:
    return Model(ModelSource("tiny", path=str(path)), None, ("",))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A tiny Llama as a GGUF file, and its original tensors."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return path, write_gguf(path, build("llama", **LLAMA), "llama")


def test_a_model_opens_a_gguf_file(written: tuple[Path, dict[str, torch.Tensor]]) -> None:
    path, originals = written
    checkpoint = model_at(path).checkpoint
    assert isinstance(checkpoint, GgufCheckpoint)
    assert checkpoint.tensors.keys() == originals.keys()
    assert checkpoint.parameters == sum(tensor.numel() for tensor in originals.values())
    for name, tensor in originals.items():
        assert (checkpoint.tensors[name].dtype, checkpoint.tensors[name].is_float) == ("F32", True)
        assert torch.equal(checkpoint.read(name), tensor), name
        assert torch.equal(checkpoint.read(name, slice(1, 3)), tensor[1:3]), name
    assert (checkpoint.roles.inferred_because, checkpoint.roles.missing_count) == (None, 0)
    assert (checkpoint.where, checkpoint.directory) == (str(path), path.parent)
    assert checkpoint.provenance == {"gguf": f"tiny.gguf, dequantised: {len(originals)} tensors as F32"}
    assert torch.equal(CanonicalModel(checkpoint).matrix("q", 1), originals["model.layers.1.self_attn.q_proj.weight"])


def test_a_directory_with_one_gguf_file(written: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    shutil.copy(written[0], tmp_path / "a.gguf")
    (tmp_path / "notes.txt").write_text("n")
    model = model_at(tmp_path)
    assert isinstance(model.checkpoint, GgufCheckpoint)
    assert model.small_file("notes.txt") == b"n"
    assert model_at(tmp_path / "a.gguf").small_file("notes.txt") is None
    shutil.copy(written[0], tmp_path / "b.gguf")
    with pytest.raises(CheckpointUnavailable, match=r"holds 2 GGUF files \('a\.gguf', 'b\.gguf', …\)"):
        _ = model_at(tmp_path).checkpoint
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert not isinstance(local_files(tmp_path), GgufFiles)


def test_its_tokenizer_stands_in_it(written: tuple[Path, dict[str, torch.Tensor]]) -> None:
    found = vocabulary_of(model_at(written[0]))
    assert found is not None
    assert found.texts == tuple(f"t{index}".encode() for index in range(64))
    assert list(found.sha256) == [HEADER_NAME]


def test_quantised_values_are_those_of_the_library(tmp_path: Path) -> None:
    originals = write_gguf(tmp_path / "tiny.gguf", build("qwen2"), "qwen2", Q8)
    checkpoint = model_at(tmp_path / "tiny.gguf").checkpoint
    name = "model.layers.0.mlp.up_proj.weight"
    values = originals[name].numpy()
    assert np.array_equal(checkpoint.read(name).numpy(), gguf.dequantize(gguf.quantize(values, Q8), Q8))
    assert "tensors as Q8_0" in checkpoint.provenance["gguf"]


@pytest.fixture(scope="module")
def ranges(tmp_path_factory: pytest.TempPathFactory) -> tuple[GgufFiles, bytes]:
    """A Llama, whose rotated rows stand in another order, in Q8_0, and all of its values."""
    files = GgufFiles(tmp_path_factory.mktemp("ranges") / "ranges.gguf")
    write_gguf(files.path, build("llama", **LLAMA), "llama", Q8)
    return files, b"".join(files.file.read(name).numpy().tobytes() for name in files.file.tensors)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_range_of_bytes_is_that_of_the_whole(ranges: tuple[GgufFiles, bytes], data: st.DataObject) -> None:
    files, whole = ranges
    start = data.draw(st.integers(0, len(whole)))
    buffer = bytearray(data.draw(st.integers(0, min(9000, len(whole) - start))))
    files.source().read_into("ranges.gguf", start, memoryview(buffer))
    assert bytes(buffer) == whole[start : start + len(buffer)]


def test_matrices_that_are_turned_and_few_rows_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("checks.checkpoint.gguf_files.AT_ONCE", 300)
    for model_type in ("gpt2", "gemma2", "qwen3_moe"):
        path = tmp_path / f"{model_type}.gguf"
        originals = write_gguf(path, build(model_type), model_type)
        checkpoint = GgufCheckpoint(GgufFiles(path))
        for name, tensor in originals.items():
            torch.testing.assert_close(checkpoint.read(name), tensor, rtol=0, atol=1e-6)


def test_bytes_that_it_has_not(written: tuple[Path, dict[str, torch.Tensor]]) -> None:
    files = GgufFiles(written[0])
    size = files.index().shards["tiny.gguf"].size
    for start in (-1, size - 3, size):
        with pytest.raises(CheckpointUnavailable, match="which it has not"):
            files.source().read_into("tiny.gguf", start, memoryview(bytearray(4)))


def test_another_file_is_another_checkpoint(written: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    """The key of what a store keeps: shapes and size alone would take one quantisation of a model for another."""

    def identity(path: Path) -> str:
        checkpoint = GgufCheckpoint(GgufFiles(path))
        return identity_of(checkpoint.index, checkpoint.prefix, checkpoint.config)

    path = tmp_path / "tiny.gguf"
    shutil.copy(written[0], path)
    first = identity(path)
    assert identity(path) == first
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(path, ns=(1, 1))
    assert identity(path) != first


@pytest.fixture
def opened(written: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> Checkpoint:
    """The tiny Llama, opened from a file of its own of which nothing but the header was read."""
    shutil.copy(written[0], tmp_path / "tiny.gguf")
    checkpoint = model_at(tmp_path / "tiny.gguf").checkpoint
    checkpoint.require_unchanged()
    return checkpoint


def changed_copy(path: Path) -> Path:
    """Another model of equal names, shapes and size."""
    data, place = path.read_bytes(), path.with_name("new")
    place.write_bytes(data[:-4096] + bytes(4096))
    os.utime(place, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns))
    return place


def test_a_file_that_is_replaced_is_noticed_and_not_read(
    opened: Checkpoint, written: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    identity = identity_of(opened.index, opened.prefix, opened.config)
    changed_copy(tmp_path / "tiny.gguf").replace(tmp_path / "tiny.gguf")
    for name, tensor in written[1].items():
        assert torch.equal(opened.read(name), tensor), name
    with pytest.raises(CheckpointUnavailable, match=r"tiny\.gguf: changed while it was read; run again"):
        opened.require_unchanged()
    replacing = model_at(tmp_path / "tiny.gguf").checkpoint
    replacing.require_unchanged()
    assert identity_of(replacing.index, replacing.prefix, replacing.config) != identity


def test_a_file_that_is_replaced_while_it_is_opened(
    written: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    """Header, tensors and identity are of one file."""
    path = tmp_path / "tiny.gguf"
    shutil.copy(written[0], path)
    files = GgufFiles(path)
    assert files.small_file(HEADER_NAME)
    new = changed_copy(path)
    write_gguf(path.with_name("other"), build("qwen2"), "qwen2")
    path.with_name("other").replace(path)
    checkpoint = GgufCheckpoint(files)
    assert checkpoint.config["model_type"] == "llama"
    assert torch.equal(checkpoint.read("lm_head.weight"), written[1]["lm_head.weight"])
    new.replace(path)
    with pytest.raises(CheckpointUnavailable, match="changed while it was read"):
        checkpoint.require_unchanged()


@pytest.mark.parametrize("how", ["in place", "removed"])
def test_a_file_that_changes_under_its_name(how: str, opened: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    time.sleep(0.02)  # the clock of a file system may tick a hundred times a second only
    if how == "removed":
        path.unlink()
    else:
        times = path.stat().st_atime_ns, path.stat().st_mtime_ns
        with path.open("r+b") as file:
            file.seek(-4, os.SEEK_END)
            file.write(bytes(4))
        os.utime(path, ns=times)
    with pytest.raises(CheckpointUnavailable, match=r"tiny\.gguf: changed while it was read"):
        opened.require_unchanged()


def test_a_file_that_is_cut_is_not_read_beyond_its_end(opened: Checkpoint, tmp_path: Path) -> None:
    """The mapped part of a file that is gone would kill the process."""
    os.truncate(tmp_path / "tiny.gguf", 4096)
    with pytest.raises(CheckpointUnavailable, match=r"has 4096 bytes, \d+ when it was opened"):
        opened.read("lm_head.weight")
    with pytest.raises(CheckpointUnavailable, match="changed while it was read"):
        opened.require_unchanged()


def test_nothing_is_kept_of_a_file_that_is_replaced(opened: Checkpoint, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    changed_copy(tmp_path / "tiny.gguf").replace(tmp_path / "tiny.gguf")
    with pytest.raises(CheckpointUnavailable, match="changed while it was read"):
        compare(opened, model_at(tmp_path / "tiny.gguf").checkpoint, store=store)
    assert not list(store.directory.glob("??/*.json"))


def test_what_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointUnavailable, match=r"gone\.gguf: no such file; correct the path"):
        _ = model_at(tmp_path / "gone.gguf").checkpoint
    (tmp_path / "text.gguf").write_text("no weights")
    with pytest.raises(CheckpointUnavailable, match=r"text\.gguf: is no GGUF file"):
        _ = model_at(tmp_path / "text.gguf").checkpoint
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "link.gguf").symlink_to(tmp_path / "text.gguf")
    with pytest.raises(CheckpointUnavailable, match="outside its directory"):
        _ = model_at(tmp_path / "elsewhere").checkpoint
    with pytest.raises(CheckpointUnavailable, match="outside its directory"):
        model_at(tmp_path / "elsewhere").small_file(HEADER_NAME)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(CheckpointUnavailable, match=r"pip install 'from-scratch\[gguf\]'"):
        _ = model_at(tmp_path / "text.gguf").checkpoint


def test_the_header_of_a_file(written: tuple[Path, dict[str, torch.Tensor]]) -> None:
    header = gguf_header(written[0], 1 << 20)
    assert written[0].read_bytes().startswith(header)
    values = gguf_values(header, ["llama.block_count", "general.architecture", "tokenizer.ggml.tokens", "absent"])
    assert values["tokenizer.ggml.tokens"] == [f"t{index}" for index in range(64)]
    assert (values["llama.block_count"], values["general.architecture"], len(values)) == (2, "llama", 3)
    with pytest.raises(CheckpointUnavailable, match="100 are read"):
        gguf_header(written[0], 100)
    with pytest.raises(ValueError, match="left"):
        gguf_values(header[:-1], ["absent"])


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The example models as GGUF files with their tokenizers, matrices in Q8_0."""
    import transformers

    directory, examples = tmp_path_factory.mktemp("examples"), Path(__file__).parents[2] / "examples" / "checkpoints"
    model = json.loads((examples / "base" / "tokenizer.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    merges = [one if isinstance(one, str) else " ".join(one) for one in model["merges"]]
    tokenizer = {"model": "gpt2", "tokens": tokens, "merges": merges, "types": [3] + [1] * (len(tokens) - 1)}

    def convert(name: str) -> Path:
        path = directory / name / f"{name}.gguf"
        if not path.exists():
            path.parent.mkdir()
            loaded = transformers.AutoModelForCausalLM.from_pretrained(examples / name, dtype=torch.float32)
            write_gguf(path, loaded, "llama", Q8, tokenizer)
            shutil.copy(examples / name / "config.json", path.parent)
        return path

    return convert


@pytest.mark.parametrize(("candidate", "verdict"), [("derived", "REFUTED"), ("independent", "SUPPORTED")])
def test_a_claim_about_a_gguf_file(
    candidate: str, verdict: str, converted: Callable[[str], Path], examples: Path, example_claim: ExampleClaim
) -> None:
    path = converted(candidate)
    model = {"name": "candidate", "path": str(path), "config": str(path.with_name("config.json"))}
    without = ["architecture", "distribution", "structure", "initialization", "compute", "training_log", "behavior"]
    example_claim.write(model, [{"name": "base", "path": str(examples / "base")}], checks={"without": without})
    example_claim.run("-q")
    claim = example_claim.report()
    assert claim["verdict"] == verdict
    assert claim["cases"]["similarity.mean[base]"]["evidence"]["read"]["candidate"]["gguf"].startswith(path.name)
    # Its tokenizer, read from the header, is that of tokenizer.json, and the weights decide what that means.
    vocabulary = claim["cases"]["tokenizer.vocabulary[base]"]
    assert vocabulary["evidence"]["value"] == 1
    assert vocabulary["outcome"] == ("contradicts" if verdict == "REFUTED" else "supports")


def test_a_claim_about_directories_with_gguf_files(
    converted: Callable[[str], Path], example_claim: ExampleClaim
) -> None:
    model, base = ({"name": name, "path": str(converted(name).parent)} for name in ("derived", "base"))
    example_claim.write(model, [base])
    example_claim.run("-q", "-k", "mean or units")
    cases = example_claim.report()["cases"]
    assert cases["similarity.mean[base]"]["outcome"] == "contradicts"
    assert cases["independence.units[base]"]["outcome"] == "contradicts"


def test_without_the_library_a_claim_says_what_to_install(
    converted: Callable[[str], Path], examples: Path, example_claim: ExampleClaim, monkeypatch: pytest.MonkeyPatch
) -> None:
    example_claim.write(
        {"name": "candidate", "path": str(converted("independent").parent)},
        [{"name": "base", "path": str(examples / "base")}],
    )
    monkeypatch.setitem(sys.modules, "gguf", None)
    result = example_claim.run("-q", "-k", "mean")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*pip install 'from-scratch[[]gguf[]]'*"])
