from __future__ import annotations

import errno
import hashlib
import json
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.index import INDEX_NAME, SINGLE_NAME, CheckpointIndex
from checks.checkpoint.local import FileIdentity, LocalSource, read_local_index

Save = Callable[..., Path]
Tensors = dict[str, torch.Tensor]
SHARD = "model-00001-of-00001.safetensors"


@pytest.fixture
def tensors(llama_tensors: Callable[..., Tensors]) -> Tensors:
    return llama_tensors(hidden_size=16, intermediate_size=24, vocab_size=20, head_dim=4, num_hidden_layers=2)


def write_index(directory: Path, content: object) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / INDEX_NAME).write_text(content if isinstance(content, str) else json.dumps(content))
    return directory


def assert_holds(directory: Path, tensors: Tensors) -> CheckpointIndex:
    index = read_local_index(directory)
    assert set(index.tensors) == set(tensors)
    assert index.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert (index.origin, index.directory, index.revision) == (str(directory), directory, None)
    source = LocalSource(directory)
    for name, tensor in tensors.items():
        info = index.tensors[name]
        assert info.shape == tuple(tensor.shape)
        buffer = bytearray(info.stop - info.start)
        source.read_into(info.shard, info.start, memoryview(buffer))
        assert bytes(buffer) == tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    source.close()
    return index


def refusal(directory: Path) -> str:
    with pytest.raises(CheckpointUnavailable) as caught:
        read_local_index(directory)
    return str(caught.value)


# What is read


def test_one_file(tensors: Tensors, save_checkpoint: Save) -> None:
    index = assert_holds(save_checkpoint("one", tensors), tensors)
    assert list(index.shards) == [SINGLE_NAME]
    assert index.shards[SINGLE_NAME].published_sha256 is None


def test_shards_with_an_index(tensors: Tensors, save_checkpoint: Save) -> None:
    directory = save_checkpoint("sharded", tensors, shards=3)
    index = assert_holds(directory, tensors)
    assert {name: shard.size for name, shard in index.shards.items()} == {
        path.name: path.stat().st_size for path in directory.glob("*.safetensors")
    }


def test_several_files_without_an_index(tensors: Tensors, tmp_path: Path) -> None:
    names = sorted(tensors)
    save_file({name: tensors[name] for name in names[::2]}, tmp_path / "b.safetensors")
    save_file({name: tensors[name] for name in names[1::2]}, tmp_path / "a.safetensors")
    assert list(assert_holds(tmp_path, tensors).shards) == ["a.safetensors", "b.safetensors"]


def test_a_file_that_the_index_does_not_list_is_left_out(tensors: Tensors, save_checkpoint: Save) -> None:
    directory = save_checkpoint("sharded", tensors, shards=2)
    save_file(tensors, directory / "consolidated.safetensors")
    assert_holds(directory, tensors)


def test_single_file_comes_before_others(tensors: Tensors, save_checkpoint: Save) -> None:
    directory = save_checkpoint("one", tensors)
    save_file(tensors, directory / "adapter.safetensors")
    assert list(assert_holds(directory, tensors).shards) == [SINGLE_NAME]


def test_tensors_come_in_the_order_of_the_disk(tensors: Tensors, save_checkpoint: Save) -> None:
    infos = list(read_local_index(save_checkpoint("sharded", tensors, shards=3)).tensors.values())
    assert infos == sorted(infos, key=lambda info: (info.shard, info.start))


def test_reading_an_index_imports_neither_torch_nor_safetensors() -> None:
    program = (
        "import sys, checks.checkpoint.hub, checks.checkpoint.local\n"
        "print([name for name in ('torch', 'safetensors', 'huggingface_hub') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# What is refused


def test_directory_is_missing(tmp_path: Path) -> None:
    assert "no such directory; correct the path" in refusal(tmp_path / "absent")


def test_directory_that_may_not_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", deny)
    assert "cannot be listed (Permission denied)" in refusal(tmp_path)


def test_no_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert "holds no .safetensors file" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_only_pickles(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    assert f"holds pickle files ('{name}'), which can run code and are not read" in refusal(tmp_path)


def test_the_command_that_converts_a_pickle_works(tmp_path: Path) -> None:
    shared = torch.ones(2)
    torch.save({"a": shared, "b": shared}, tmp_path / "pytorch_model.bin")
    program = refusal(tmp_path).split('python -c "')[1].split('"')[0]
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    assert list(read_local_index(tmp_path).tensors) == ["a", "b"]


def test_a_pickle_with_a_dangerous_name_is_not_put_into_a_command(tmp_path: Path) -> None:
    (tmp_path / "$(reboot)';x.bin").touch()
    assert "torch.load('FILE'" in refusal(tmp_path)


INDEXES: dict[str, tuple[object, str]] = {
    "no JSON": ("{", "expected a JSON object"),
    "a list": ([], "expected a JSON object"),
    "no weight_map": ({"metadata": {}}, "expected a JSON object with a 'weight_map'"),
    "weight_map is a list": ({"weight_map": ["a"]}, "expected a JSON object with a 'weight_map'"),
    "weight_map is empty": ({"weight_map": {}}, "expected a JSON object with a 'weight_map'"),
    "duplicate tensor": ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "the key .*a.* stands twice"),
    "parent": ({"weight_map": {"a": "../x.safetensors"}}, "names the shard '../x.safetensors'"),
    "absolute": ({"weight_map": {"a": "/etc/x.safetensors"}}, "names the shard '/etc/x.safetensors'"),
    "folder": ({"weight_map": {"a": "b/x.safetensors"}}, "names the shard"),
    "Windows folder": ({"weight_map": {"a": "..\\x.safetensors"}}, "names the shard"),
    "dots": ({"weight_map": {"a": ".."}}, "names the shard '..'"),
    "NUL": ({"weight_map": {"a": "x\0.safetensors"}}, "names the shard"),
    "too long": ({"weight_map": {"a": "x" * 300 + ".safetensors"}}, "names the shard"),
    "a number": ({"weight_map": {"a": 1}}, "names the shard 1"),
    "a pickle": ({"weight_map": {"a": "pytorch_model.bin"}}, "names the shard 'pytorch_model.bin'"),
    "absent": ({"weight_map": {"a": "x.safetensors"}}, "lists x.safetensors, which is absent; download it"),
}


@pytest.mark.parametrize("case", INDEXES)
def test_index_is_refused(case: str, tmp_path: Path) -> None:
    content, message = INDEXES[case]
    write_index(tmp_path, content)
    with pytest.raises(CheckpointUnavailable, match=message) as caught:
        read_local_index(tmp_path)
    assert str(tmp_path / INDEX_NAME) in str(caught.value)


def test_index_that_is_a_directory_or_a_broken_link(tensors: Tensors, save_checkpoint: Save) -> None:
    directory = save_checkpoint("one", tensors)
    (directory / "model.safetensors").rename(directory / "other.safetensors")
    (directory / INDEX_NAME).symlink_to("nowhere")
    assert f"{INDEX_NAME}: cannot be opened" in refusal(directory)


def test_index_of_absurd_size(tmp_path: Path) -> None:
    with (tmp_path / INDEX_NAME).open("wb") as opened:
        opened.truncate(10**9)
    assert "has 1000000000 bytes, expected at most" in refusal(tmp_path)


def test_tensor_that_is_listed_and_absent(tensors: Tensors, tmp_path: Path) -> None:
    write_index(tmp_path, {"weight_map": dict.fromkeys([*tensors, "model.extra.weight"], SHARD)})
    save_file(tensors, tmp_path / SHARD)
    assert f"lists 'model.extra.weight' in {SHARD}, which does not hold it" in refusal(tmp_path)


def test_tensor_in_two_shards(tensors: Tensors, tmp_path: Path) -> None:
    save_file(tensors, tmp_path / "a.safetensors")
    save_file({"lm_head.weight": torch.ones(2)}, tmp_path / "b.safetensors")
    assert "tensor 'lm_head.weight' stands in a.safetensors and in b.safetensors" in refusal(tmp_path)


def test_numbered_shard_that_is_absent(tensors: Tensors, save_checkpoint: Save) -> None:
    directory = save_checkpoint("sharded", tensors, shards=3)
    (directory / INDEX_NAME).unlink()
    assert_holds(directory, tensors)
    (directory / "model-00002-of-00003.safetensors").unlink()
    assert "but not model-00002-of-00003.safetensors; download" in refusal(directory)


def test_files_without_tensors(tmp_path: Path) -> None:
    save_file({}, tmp_path / SINGLE_NAME)
    assert "hold no tensors" in refusal(tmp_path)


def test_cut_shard(tensors: Tensors, save_checkpoint: Save) -> None:
    file = save_checkpoint("one", tensors) / SINGLE_NAME
    os.truncate(file, file.stat().st_size - 10)
    assert "the file was cut: download it again" in refusal(file.parent)


def test_shard_that_is_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / SINGLE_NAME)
    assert "is no regular file" in refusal(tmp_path)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.binary(max_size=80) | st.text(max_size=40).map(lambda text: json.dumps({"weight_map": {text: text}}).encode())
)
def test_any_index_file_is_read_or_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / INDEX_NAME).write_bytes(content)
    refusal(tmp_path)


# Links


def test_links_within_the_directory_are_followed(tensors: Tensors, save_checkpoint: Save) -> None:
    directory = save_checkpoint("one", tensors)
    (directory / SINGLE_NAME).rename(directory / "weights")
    (directory / SINGLE_NAME).symlink_to("weights")
    assert_holds(directory, tensors)


def test_links_out_of_the_directory_are_refused(tensors: Tensors, save_checkpoint: Save, tmp_path: Path) -> None:
    outside = save_checkpoint("elsewhere", tensors)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / SINGLE_NAME).symlink_to(outside / SINGLE_NAME)
    message = refusal(tmp_path / "linked")
    assert "outside its directory; put the file itself there, or name the directory that holds it" in message


def test_an_index_that_links_out_of_the_directory_is_refused(tensors: Tensors, save_checkpoint: Save) -> None:
    directory = save_checkpoint("sharded", tensors, shards=2)
    (directory / INDEX_NAME).rename(directory.parent / "index")
    (directory / INDEX_NAME).symlink_to(directory.parent / "index")
    assert "outside its directory" in refusal(directory)


def test_links_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / SINGLE_NAME).symlink_to(SINGLE_NAME)
    assert "cannot be opened" in refusal(tmp_path)


def test_a_directory_may_itself_be_a_link(tensors: Tensors, save_checkpoint: Save, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(save_checkpoint("one", tensors))
    assert_holds(tmp_path / "link", tensors)


@pytest.mark.parametrize("shared", [False, True], ids=["blobs", "shared blobs"])
def test_snapshots_of_the_hub_cache_link_to_its_blobs(shared: bool, tensors: Tensors, tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    for folder in (snapshot, repository / "blobs", tmp_path / "blobs" / "ab"):
        folder.mkdir(parents=True)
    blob = repository / "blobs" / ("c" * 64)
    save_file(tensors, tmp_path / "blobs" / "ab" / "abc" if shared else blob)
    if shared:
        blob.symlink_to("../../blobs/ab/abc")
    (snapshot / SINGLE_NAME).symlink_to(f"../../blobs/{blob.name}")
    assert_holds(snapshot, tensors)


# Bytes


@pytest.fixture
def source(tmp_path: Path) -> LocalSource:
    (tmp_path / "a.safetensors").write_bytes(bytes(range(256)))
    return LocalSource(tmp_path)


def test_any_range_is_read(source: LocalSource) -> None:
    for start, size in [(0, 256), (10, 5), (255, 1), (256, 0), (0, 0)]:
        buffer = bytearray(size)
        source.read_into("a.safetensors", start, memoryview(buffer))
        assert bytes(buffer) == bytes(range(start, start + size))


def test_a_buffer_may_have_any_format(source: LocalSource) -> None:
    values = torch.empty(4, 2, dtype=torch.int16)
    source.read_into("a.safetensors", 16, memoryview(values.numpy()))
    assert values.reshape(-1).tolist() == list(struct.unpack("<8h", bytes(range(16, 32))))


@pytest.mark.parametrize("start", [250, 300])
def test_a_range_beyond_the_file_is_unavailable(start: int, source: LocalSource) -> None:
    with pytest.raises(CheckpointUnavailable, match=rf"expected bytes up to {start + 10}; the file was cut"):
        source.read_into("a.safetensors", start, memoryview(bytearray(10)))


def test_a_negative_start_is_unavailable(source: LocalSource) -> None:
    with pytest.raises(CheckpointUnavailable, match="is asked for byte -1"):
        source.read_into("a.safetensors", -1, memoryview(bytearray(10)))


def test_a_file_that_is_cut_after_it_was_opened(source: LocalSource) -> None:
    source.read_into("a.safetensors", 0, memoryview(bytearray(10)))
    os.truncate(source.directory / "a.safetensors", 100)
    with pytest.raises(CheckpointUnavailable, match="ends at byte 100"):
        source.read_into("a.safetensors", 0, memoryview(bytearray(256)))


def test_a_shard_that_is_absent(source: LocalSource) -> None:
    with pytest.raises(CheckpointUnavailable, match=r"b\.safetensors: cannot be opened"):
        source.read_into("b.safetensors", 0, memoryview(bytearray(1)))


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts descriptors in /proc")
def test_files_are_opened_once_and_closed(source: LocalSource) -> None:
    before = descriptors()
    for _ in range(3):
        source.read_into("a.safetensors", 0, memoryview(bytearray(1)))
    assert descriptors() == before + 1
    source.close()
    source.close()
    assert descriptors() == before
    with pytest.raises(CheckpointUnavailable, match="after its source was closed"):
        source.read_into("a.safetensors", 0, memoryview(bytearray(1)))


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts descriptors in /proc")
def test_a_forgotten_source_and_a_refused_checkpoint_leave_no_file_open(source: LocalSource) -> None:
    before = descriptors()
    LocalSource(source.directory).read_into("a.safetensors", 0, memoryview(bytearray(1)))
    refusal(source.directory)
    assert descriptors() == before


def test_threads_share_a_source(source: LocalSource) -> None:
    wrong = []

    def read() -> None:
        for start in range(200):
            buffer = bytearray(8)
            source.read_into("a.safetensors", start, memoryview(buffer))
            if bytes(buffer) != bytes(range(start, start + 8)):
                wrong.append(start)

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# Identity


def file_identity(directory: Path) -> FileIdentity:
    return read_local_index(directory).identities[SINGLE_NAME]


def test_identity_is_stable_and_hashes_the_header_alone(tensors: Tensors, save_checkpoint: Save) -> None:
    directory = save_checkpoint("one", tensors)
    content = (directory / SINGLE_NAME).read_bytes()
    header = content[: 8 + struct.unpack("<Q", content[:8])[0]]
    identity = file_identity(directory)
    assert identity.header_sha256 == hashlib.sha256(header).hexdigest()
    assert identity.size == len(content)
    assert file_identity(directory) == identity
    assert file_identity(directory).key == identity.key


def touch(file: Path) -> None:
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))


def replace_file(file: Path) -> None:
    state, copy = file.stat(), file.with_name("copy")
    copy.write_bytes(file.read_bytes())
    os.utime(copy, ns=(state.st_atime_ns, state.st_mtime_ns))
    copy.replace(file)


def rename_tensor(file: Path) -> None:
    state, content = file.stat(), file.read_bytes()
    file.write_bytes(content.replace(b"model.norm.weight", b"model.norm.height"))
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))


def append(file: Path) -> None:
    state = file.stat()
    with file.open("ab") as opened:
        opened.write(b"x")
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))


def change_a_byte(file: Path) -> None:
    """As rsync --inplace -t does: other content of the same size, and the time of modification set back."""
    state = file.stat()
    with file.open("r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        opened.write(b"\x7e")
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert file.stat().st_mtime_ns == state.st_mtime_ns


CHANGES = [touch, replace_file, rename_tensor, change_a_byte]


@pytest.mark.parametrize("change", CHANGES)
def test_identity_changes(change: Callable[[Path], Any], tensors: Tensors, save_checkpoint: Save) -> None:
    directory = save_checkpoint("one", tensors)
    before = file_identity(directory)
    time.sleep(0.02)  # the clock of a file system may tick a hundred times a second only
    change(directory / SINGLE_NAME)
    after = file_identity(directory)
    assert after != before
    assert after.key != before.key


@pytest.mark.parametrize("change", [*CHANGES, append])
def test_a_change_after_the_index_was_read_is_noticed(
    change: Callable[[Path], Any], tensors: Tensors, save_checkpoint: Save
) -> None:
    directory = save_checkpoint("one", tensors)
    index = read_local_index(directory)
    source = LocalSource(directory, index.identities)
    source.read_into(SINGLE_NAME, 0, memoryview(bytearray(8)))
    index.require_unchanged()
    time.sleep(0.02)
    change(directory / SINGLE_NAME)
    with pytest.raises(CheckpointUnavailable, match=f"{SINGLE_NAME}: changed while it was read; run again"):
        index.require_unchanged()
    # What was not opened yet is not taken for the file whose header was read.
    late = LocalSource(directory, index.identities)
    before = descriptors()
    with pytest.raises(CheckpointUnavailable, match="changed while it was read; run again"):
        late.read_into(SINGLE_NAME, 0, memoryview(bytearray(8)))
    assert descriptors() == before


def test_a_file_that_is_gone_after_the_index_was_read(tensors: Tensors, save_checkpoint: Save) -> None:
    directory = save_checkpoint("one", tensors)
    index = read_local_index(directory)
    (directory / SINGLE_NAME).unlink()
    with pytest.raises(CheckpointUnavailable, match=r"changed while it was read \(No such file"):
        index.require_unchanged()
