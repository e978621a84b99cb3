from __future__ import annotations

import contextlib
import hashlib
import json
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from checks.checkpoint.checkpoint import Checkpoint
from checks.checkpoint.errors import CheckpointUnavailable

INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00001.safetensors"

Save = Callable[..., Path]
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def tensors(llama_tensors: Callable[..., Tensors]) -> Tensors:
    return llama_tensors(hidden_size=16, intermediate_size=24, vocab_size=20, head_dim=4, num_hidden_layers=2)


def write_index(directory: Path, content: object) -> Path:
    directory.mkdir(exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (directory / INDEX).write_text(text, encoding="utf-8")
    return directory


def raw(dtype: str, shape: list[int], size: int, data: bytes) -> bytes:
    """A safetensors file of one tensor "a", byte by byte: for what torch does not write."""
    header = json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}).encode()
    return struct.pack("<Q", len(header)) + header + data


def refusal(directory: Path, **arguments: Any) -> str:
    with pytest.raises(CheckpointUnavailable) as caught:
        Checkpoint(directory, **arguments)
    return str(caught.value)


# What is read


def assert_holds(checkpoint: Checkpoint, tensors: Mapping[str, torch.Tensor]) -> None:
    assert list(checkpoint.tensors) == sorted(tensors)
    for name, tensor in tensors.items():
        entry = checkpoint.tensors[name]
        assert entry.shape == tuple(tensor.shape)
        assert entry.elements == tensor.numel()
        assert torch.equal(checkpoint.read(name), tensor)
    assert checkpoint.parameters == sum(tensor.numel() for tensor in tensors.values())


def test_one_file_is_read(tensors: Tensors, save_checkpoint: Save) -> None:
    assert_holds(Checkpoint(save_checkpoint("one", tensors)), tensors)


def test_shards_with_an_index_are_read(tensors: Tensors, save_checkpoint: Save) -> None:
    checkpoint = Checkpoint(save_checkpoint("sharded", tensors, shards=3))
    assert_holds(checkpoint, tensors)
    assert len({entry.stored.shard for entry in checkpoint.tensors.values()}) == 3


def test_single_file_may_have_any_name(tensors: Tensors, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "pytorch weights (final).safetensors")
    assert_holds(Checkpoint(tmp_path), tensors)


def test_several_files_without_an_index_are_one_checkpoint(tensors: Tensors, tmp_path: Path) -> None:
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[::2]}, tmp_path / "b.safetensors")
    save_file({name: tensors[name] for name in names[1::2]}, tmp_path / "a.safetensors")
    assert_holds(Checkpoint(tmp_path), tensors)


def test_file_that_the_index_does_not_list_is_left_out(tensors: Tensors, save_checkpoint: Save) -> None:
    directory = save_checkpoint("sharded", tensors, shards=2)
    save_file(tensors, directory / "consolidated.safetensors")
    assert_holds(Checkpoint(directory), tensors)


def test_prefix_selects_tensors_and_is_removed(tensors: Tensors, save_checkpoint: Save) -> None:
    both = {f"text.{name}": tensor for name, tensor in tensors.items()} | {"vision.blocks.0.weight": torch.ones(2, 2)}
    directory = save_checkpoint("vlm", both)
    checkpoint = Checkpoint(directory, ("language_model.", "text."))
    assert checkpoint.prefix == "text."
    assert_holds(checkpoint, tensors)
    assert checkpoint.tensors["lm_head.weight"].stored_name == "text.lm_head.weight"
    assert checkpoint.digest() == Checkpoint(save_checkpoint("text", tensors)).digest()


SPECIAL: Tensors = {
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(1.5),
    "boolean": torch.tensor([True, False, True]),
    "int8": torch.tensor([-1, 2], dtype=torch.int8),
    "int64": torch.tensor([[1 << 40]]),
    "bfloat16": torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
    "float16": torch.tensor([1.0], dtype=torch.float16),
    "float64": torch.tensor([1.0], dtype=torch.float64),
    "e4m3": torch.tensor([1.0, -2.0]).to(torch.float8_e4m3fn),
    "e5m2": torch.tensor([1.0, -2.0]).to(torch.float8_e5m2),
}


@pytest.mark.parametrize("name", SPECIAL)
def test_every_dtype_and_shape_is_read_and_hashed(name: str, save_checkpoint: Save) -> None:
    tensor = SPECIAL[name]
    checkpoint = Checkpoint(save_checkpoint("special", {name: tensor}))
    read = checkpoint.read(name)
    assert read.dtype == tensor.dtype
    assert read.shape == tensor.shape
    stored = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
    assert checkpoint.sha256(name) == hashlib.sha256(stored).hexdigest()
    assert checkpoint.tensors[name].is_float == (name in ("empty", "scalar", "bfloat16", "float16", "float64"))


@pytest.mark.parametrize(("dtype", "shape", "size"), [("F4", [2, 4], 4), ("F8_E8M0", [4], 4), ("U16", [2], 4)])
def test_packed_and_rare_dtypes_are_hashed_and_are_no_weights_as_they_stand(
    dtype: str, shape: list[int], size: int, tmp_path: Path
) -> None:
    data = bytes(range(size))
    (tmp_path / "model.safetensors").write_bytes(raw(dtype, shape, size, data))
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.sha256("a") == hashlib.sha256(data).hexdigest()
    assert not checkpoint.tensors["a"].is_float


def test_dtype_that_torch_lacks_is_read_as_bytes_and_is_no_weight(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(raw("F6_E2M3", [4], 3, b"\1\2\3"))
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.read("a").tolist() == [1, 2, 3]
    assert checkpoint.sha256("a") == hashlib.sha256(b"\1\2\3").hexdigest()
    assert not checkpoint.tensors["a"].is_float


# Rows


@pytest.mark.parametrize("rows", [slice(2, 5), slice(None), slice(-2, None), slice(4, 2), slice(5, 100), slice(0, 1)])
@pytest.mark.parametrize("name", ["matrix", "vector", "experts", "half", "wide"])
def test_rows_are_those_of_the_tensor(name: str, rows: slice, save_checkpoint: Save) -> None:
    tensors = {
        "matrix": torch.arange(24.0).reshape(6, 4),
        "vector": torch.arange(6),
        "experts": torch.arange(72.0).reshape(6, 4, 3),
        "half": torch.arange(12.0).reshape(6, 2).to(torch.bfloat16),
        "wide": torch.zeros(6, 0),
    }
    read = Checkpoint(save_checkpoint("rows", tensors)).read(name, rows)
    assert read.dtype == tensors[name].dtype
    assert read.shape == tensors[name][rows].shape
    assert torch.equal(read, tensors[name][rows])


def test_only_the_bytes_of_the_rows_are_read(save_checkpoint: Save) -> None:
    checkpoint = Checkpoint(save_checkpoint("rows", {"a": torch.arange(24.0).reshape(6, 4)}))
    reads: list[tuple[int, int]] = []

    class Counting:
        def read_into(self, shard: str, start: int, buffer: memoryview) -> None:
            reads.append((start - checkpoint.index.tensors["a"].start, buffer.nbytes))

    checkpoint.source = Counting()
    checkpoint.read("a", slice(2, 4))
    assert reads == [(2 * 16, 2 * 16)]


def test_rows_that_are_no_whole_bytes_are_refused(tmp_path: Path, save_checkpoint: Save) -> None:
    checkpoint = Checkpoint(save_checkpoint("plain", {"a": torch.ones(6, 4), "scalar": torch.tensor(1.5)}))
    with pytest.raises(ValueError, match=r"slice\(0, 6, 2\) are no whole bytes"):
        checkpoint.read("a", slice(0, 6, 2))
    with pytest.raises(ValueError, match="'scalar' is a scalar"):
        checkpoint.read("scalar", slice(0, 1))
    (tmp_path / "model.safetensors").write_bytes(raw("F4", [2, 3], 3, b"abc"))
    with pytest.raises(ValueError, match=r"F4 of shape \[2, 3\]"):
        Checkpoint(tmp_path).read("a", slice(0, 1))


def test_rows_of_a_dtype_that_torch_lacks_come_as_bytes(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(raw("F6_E2M3", [2, 4], 6, b"abcdef"))
    assert Checkpoint(tmp_path).read("a", slice(1, 2)).tolist() == list(b"def")


def test_sha256_of_a_given_tensor_does_not_depend_on_its_strides(save_checkpoint: Save) -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    directory = save_checkpoint("strides", {"a": tensor})
    transposed_twice = tensor.T.contiguous().T
    assert not transposed_twice.is_contiguous()
    assert Checkpoint(directory).sha256("a", transposed_twice) == Checkpoint(directory).sha256("a")


# Digest


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shards=st.integers(1, 5), order=st.randoms(use_true_random=False))
def test_digest_does_not_depend_on_shards_or_order(
    shards: int, order: Any, tensors: Tensors, save_checkpoint: Save, tmp_path_factory: Any
) -> None:
    names = list(tensors)
    order.shuffle(names)
    one = save_checkpoint("one", tensors)
    other = save_checkpoint(tmp_path_factory.mktemp("other"), {name: tensors[name] for name in names}, shards=shards)
    assert Checkpoint(other).digest() == Checkpoint(one).digest()


CHANGES: dict[str, Callable[[Tensors], object]] = {
    "one byte": lambda tensors: tensors["a"].view(torch.uint8)[0].add_(1),
    "a name": lambda tensors: tensors.update(c=tensors.pop("b")),
    "a shape": lambda tensors: tensors.update(a=tensors["a"].reshape(3, 2)),
    "a dtype": lambda tensors: tensors.update(a=tensors["a"].view(torch.int32)),
    "a tensor more": lambda tensors: tensors.update(c=torch.zeros(0)),
    "a tensor less": lambda tensors: tensors.pop("b"),
    "two names exchanged": lambda tensors: tensors.update(a=tensors["b"], b=tensors["a"]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_digest_changes_with(change: str, save_checkpoint: Save) -> None:
    tensors = {"a": torch.arange(6, dtype=torch.float32), "b": torch.ones(2)}
    before = Checkpoint(save_checkpoint("before", tensors)).digest()
    CHANGES[change](tensors)
    assert Checkpoint(save_checkpoint("after", tensors)).digest() != before


# What is refused


def test_missing_directory_is_named(tmp_path: Path) -> None:
    message = refusal(tmp_path / "nowhere")
    assert str(tmp_path / "nowhere") in message
    assert "correct the path" in message


def test_path_to_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "no such directory" in refusal(tmp_path / "file")


def test_directory_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert ".safetensors" in refusal(tmp_path)


class Bomb:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.trace,))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt"])
def test_pickle_is_refused_with_the_command_that_converts_it_and_is_not_opened(name: str, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    (tmp_path / name).write_bytes(pickle.dumps(Bomb(trace)))
    message = refusal(tmp_path)
    assert name in message
    assert "torch.load(" in message
    assert "weights_only=True" in message
    assert "weights_only=True" in message
    assert not trace.exists()


def test_command_that_converts_a_pickle_works(tensors: Tensors, tmp_path: Path) -> None:
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    command = refusal(tmp_path).partition('python -c "')[2].partition('"')[0]
    subprocess.run([sys.executable, "-c", command], cwd=tmp_path, check=True)
    assert_holds(Checkpoint(tmp_path), tensors)


def saved_bytes() -> bytes:
    return save({"a": torch.arange(64, dtype=torch.float32)})


BROKEN_FILES: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "truncated data": lambda: saved_bytes()[:-10],
    "truncated header": lambda: saved_bytes()[:20],
    "bytes too many": lambda: saved_bytes() + b"\0",
    "garbage": lambda: bytes(range(256)) * 4,
    "header that is no JSON": lambda: struct.pack("<Q", 8) + b"not json",
    "absurd header length": lambda: struct.pack("<Q", (1 << 64) - 1) + b"{}",
    "large header length": lambda: struct.pack("<Q", 1 << 40) + b"{}",
    "unknown dtype": lambda: raw("Q9", [1], 1, b"\0"),
    "offsets beyond the file": lambda: raw("I8", [900], 900, b"\0"),
    "shape that does not fit the offsets": lambda: raw("F32", [900], 4, b"\0\0\0\0"),
    "shape whose product overflows": lambda: raw("F32", [1 << 62, 1 << 62], 4, b"\0\0\0\0"),
    "Git LFS pointer": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n",
}


@pytest.mark.parametrize("kind", BROKEN_FILES)
def test_broken_file_is_named_with_what_to_do(kind: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(BROKEN_FILES[kind]())
    message = refusal(tmp_path)
    assert str(tmp_path / "model.safetensors") in message
    assert "download" in message


def test_directory_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "odd.safetensors").mkdir()
    assert "holds no .safetensors file" in refusal(tmp_path)


@pytest.mark.parametrize(
    "shard",
    [
        "../model.safetensors",
        "sub/model.safetensors",
        "/etc/model.safetensors",
        "..",
        "",
        "model.bin",
        "model.safetensors.bin",
        None,
        3,
        ["model.safetensors"],
    ],
)
def test_index_may_only_name_safetensors_files_beside_it(shard: object, tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    directory = write_index(tmp_path / "checkpoint", {"weight_map": {"a": shard}})
    (directory / "sub").mkdir()
    save_file({"a": torch.ones(2)}, directory / "sub" / "model.safetensors")
    (directory / "model.bin").write_bytes(b"")
    message = refusal(directory)
    assert INDEX in message
    assert repr(shard) in message
    assert "'a'" in message


@pytest.mark.parametrize("shard", ["x" * 300 + ".safetensors", "a\0b.safetensors"])
def test_shard_name_that_no_file_system_has_is_refused(shard: str, tmp_path: Path) -> None:
    assert INDEX in refusal(write_index(tmp_path, {"weight_map": {"a": shard}}))


def test_directory_name_that_no_file_system_has_is_refused(tmp_path: Path) -> None:
    assert "xxx" in refusal(tmp_path / ("x" * 300))


def test_shard_that_is_listed_but_absent_is_named(tmp_path: Path) -> None:
    message = refusal(write_index(tmp_path, {"weight_map": {"a": SHARD}}))
    assert SHARD in message
    assert "download" in message


def test_tensor_that_is_listed_but_not_in_its_shard_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / SHARD)
    message = refusal(write_index(tmp_path, {"weight_map": {"a": SHARD, "b": SHARD}}))
    assert "'b'" in message
    assert SHARD in message
    assert "one revision" in message


def test_tensor_that_the_index_puts_into_another_shard_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "1.safetensors")
    save_file({"b": torch.ones(2)}, tmp_path / "2.safetensors")
    message = refusal(write_index(tmp_path, {"weight_map": {"a": "2.safetensors", "b": "1.safetensors"}}))
    assert "does not hold it" in message


def test_tensor_in_two_shards_is_named_with_both(tmp_path: Path) -> None:
    for number in (1, 2):
        save_file({"a": torch.full((2,), float(number))}, tmp_path / f"{number}.safetensors")
    message = refusal(tmp_path)
    assert "'a'" in message
    assert "1.safetensors" in message
    assert "2.safetensors" in message


@pytest.mark.parametrize(
    "content",
    [
        "no json",
        "[" * 100_000,
        "[]",
        "{}",
        '"weight_map"',
        '{"weight_map": []}',
        '{"weight_map": null}',
        '{"weight_map": "model.safetensors"}',
        "",
    ],
    ids=lambda text: text[:20] or "nothing",
)
def test_index_without_a_weight_map_is_named(content: str, tmp_path: Path) -> None:
    message = refusal(write_index(tmp_path, content))
    assert INDEX in message
    assert "expected a JSON object" in message


def test_index_that_is_no_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_bytes(b'{"weight_map": {"\xff": 1}}')
    assert INDEX in refusal(tmp_path)


def test_checkpoint_without_tensors_is_refused(tmp_path: Path) -> None:
    assert "expected a JSON object with a 'weight_map'" in refusal(write_index(tmp_path / "index", {"weight_map": {}}))
    (tmp_path / "file").mkdir()
    save_file({}, tmp_path / "file" / "model.safetensors")
    assert "no tensors" in refusal(tmp_path / "file")


def test_prefix_that_no_tensor_has_is_named_with_those_there_are(tensors: Tensors, save_checkpoint: Save) -> None:
    message = refusal(save_checkpoint("one", tensors), prefixes=("vision.", "visual."))
    assert "'vision.' or 'visual.'" in message
    assert "model.layers." in message
    assert "correct the prefix" in message


def test_file_that_is_damaged_after_opening_is_unavailable(tensors: Tensors, save_checkpoint: Save) -> None:
    directory = save_checkpoint("one", tensors)
    checkpoint = Checkpoint(directory)
    (directory / "model.safetensors").write_bytes(b"gone")
    with pytest.raises(CheckpointUnavailable, match="changed while it was read; run again"):
        checkpoint.read("lm_head.weight")


@given(st.binary(max_size=200))
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_bytes_are_read_or_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(data)
    with contextlib.suppress(CheckpointUnavailable):
        Checkpoint(tmp_path).digest()


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3),
    max_leaves=8,
)


@given(_JSON)
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_weight_map_is_read_or_refused(tmp_path: Path, content: object) -> None:
    with pytest.raises(CheckpointUnavailable):
        Checkpoint(write_index(tmp_path, {"weight_map": content}))


def test_a_directory_of_two_models_is_refused(tmp_path: Path, save_checkpoint: Callable[..., Path]) -> None:
    """transformers would load the one and this suite the other."""
    directory = save_checkpoint("both", {"a": torch.ones(4), "b": torch.ones(4)}, shards=2)
    save_checkpoint("both", {"a": torch.zeros(4)})
    assert "holds both" in refusal(directory)


def test_an_adapter_beside_the_weights_is_refused(save_checkpoint: Callable[..., Path]) -> None:
    directory = save_checkpoint("adapted", {"a": torch.ones(4)})
    (directory / "adapter_model.safetensors").write_bytes((directory / "model.safetensors").read_bytes())
    assert "merge it" in refusal(directory)


def test_part_of_a_numbered_series_is_refused(save_checkpoint: Callable[..., Path]) -> None:
    directory = save_checkpoint("partial", {f"t{n}": torch.ones(4) for n in range(6)}, shards=3)
    (directory / INDEX).unlink()
    Checkpoint(directory)
    (directory / "model-00002-of-00003.safetensors").unlink()
    assert "holds model-00001-of-00003.safetensors but not model-00002-of-00003.safetensors" in refusal(directory)


def test_share_outside_of_prefixes(save_checkpoint: Callable[..., Path]) -> None:
    directory = save_checkpoint("parts", {"text.a": torch.ones(6), "vision.a": torch.ones(2), "extra": torch.ones(2)})
    checkpoint = Checkpoint(directory, ("text.",))
    assert checkpoint.share_outside(("text.",)) == 0.4
    assert checkpoint.share_outside(("text.", "vision.")) == 0.2
    assert checkpoint.share_outside(("",)) == 0
