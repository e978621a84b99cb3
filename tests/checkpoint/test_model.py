from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from checks.catalog.architecture import Architecture, from_config
from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.hub_access import HubAccess
from checks.checkpoint.model import Model
from checks.claim.model import ModelSource
from checks.claim.training import Training
from checks.pair.candidate import Candidate

SHA = "0123456789abcdef0123456789abcdef01234567"


def test_model_opens_its_weights_once_and_only_when_asked(
    llama_tensors: Callable[..., dict[str, torch.Tensor]], save_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    model = Model(ModelSource("late", path=str(tmp_path / "late")), None, ("",))
    directory = save_checkpoint("late", llama_tensors())
    assert model.name == "late"
    assert model.checkpoint is model.checkpoint
    assert model.checkpoint.directory == directory


def test_failure_is_kept_and_raised_the_same_way(tmp_path: Path, save_checkpoint: Callable[..., Path]) -> None:
    model = Model(ModelSource("gone", path=str(tmp_path / "gone")), None, ("",))
    with pytest.raises(CheckpointUnavailable) as first:
        _ = model.checkpoint
    save_checkpoint("gone", {"a": torch.ones(2)})
    with pytest.raises(CheckpointUnavailable) as second:
        _ = model.checkpoint
    assert str(first.value) == str(second.value)
    assert first.value is not second.value


def test_prefixes_reach_the_checkpoint(save_checkpoint: Callable[..., Path]) -> None:
    directory = save_checkpoint("parts", {"text.a": torch.ones(2), "vision.b": torch.ones(3)})
    model = Model(ModelSource("parts", path=str(directory)), "vision", ("visual.", "vision."))
    assert list(model.checkpoint.tensors) == ["b"]


def test_architecture_is_that_of_the_component(llama_config: Callable[..., dict[str, Any]]) -> None:
    whole = ModelSource("llama", architectures=from_config(llama_config()))
    architecture = Model(whole, None, ("",)).architecture
    assert architecture is not None
    assert architecture.hidden_size == 64
    assert Model(whole, "text", ("",)).architecture == architecture
    assert Model(whole, "vision", ("",)).architecture is None
    parts = {"text": Architecture(hidden_size=1), "vision": Architecture(hidden_size=2)}
    assert Model(ModelSource("vlm", architectures=parts), "vision", ("",)).architecture == parts["vision"]
    assert Model(ModelSource("vlm", architectures=parts), None, ("",)).architecture == parts["text"]
    assert Model(ModelSource("unknown"), None, ("",)).architecture is None


def test_catalogue_entry_is_known_by_key_only() -> None:
    entry = Model(ModelSource("solar", catalog_key="solar_open_100b"), None, ("",)).catalog_entry
    assert entry is not None
    assert entry.repo == "upstage/Solar-Open-100B"
    assert Model(ModelSource("solar_open_100b"), None, ("",)).catalog_entry is None


def test_candidate_knows_what_the_claim_states() -> None:
    candidate = Candidate(ModelSource("mine"), None, ("",), Training(total=1e9, active=1e8), frozenset({"a"}))
    assert (candidate.training.total, candidate.training.active, candidate.panel) == (1e9, 1e8, frozenset({"a"}))


def test_path_is_taken_before_the_repository(
    llama_tensors: Callable[..., dict[str, torch.Tensor]], save_checkpoint: Callable[..., Path], hub: Any
) -> None:
    directory = save_checkpoint("local", llama_tensors())
    model = Model(ModelSource("m", path=str(directory), repo="org/name"), None, ("",))
    assert model.checkpoint.directory == directory
    assert model.checkpoint.provenance == {}
    assert not hub.requests


def test_model_without_path_and_repository_says_what_to_do() -> None:
    model = Model(ModelSource("nameless"), None, ("",))
    for ask in (lambda: model.checkpoint, lambda: model.small_file("tokenizer.json")):
        with pytest.raises(CheckpointUnavailable, match=r"^nameless: .*give the claim a path"):
            ask()


@pytest.mark.parametrize("repo", ["no-such-organisation-x9/no-such-model", "a//b", "not a repository", "../../etc"])
def test_offline_a_repository_that_is_not_cached_names_the_command_that_fetches_it(repo: str, hub: Any) -> None:
    model = Model(ModelSource("m", repo=repo, revision=SHA), None, ("",), HubAccess(offline=True))
    with pytest.raises(CheckpointUnavailable) as caught:
        _ = model.checkpoint
    assert f"`hf download {shlex.quote(repo)} --revision {SHA} --include '*.safetensors*'" in str(caught.value)
    assert "give a path" in str(caught.value)
    assert not hub.requests


def test_cached_revision_is_found_without_a_network(hub: Any, tmp_path: Path) -> None:
    snapshot = tmp_path / "cache" / "models--org--name" / "snapshots" / SHA
    snapshot.mkdir(parents=True)
    save_file({"a": torch.ones(2)}, snapshot / "model.safetensors")
    (snapshot / "config.json").write_text("{}")
    program = (
        "from checks.checkpoint.model import Model; from checks.claim.model import ModelSource;"
        f"print(Model(ModelSource('m', repo='org/name', revision={SHA!r}), None, ('',)).checkpoint.directory)"
    )
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "cache")}
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert Path(found.stdout.strip()) == snapshot
    assert not hub.requests


def test_a_repository_is_read_from_the_hub_without_a_download(
    hub: Any, llama_tensors: Callable[..., dict[str, torch.Tensor]], save_checkpoint: Callable[..., Path]
) -> None:
    commit = hub.add_directory("org/name", save_checkpoint("served", llama_tensors(), {"model_type": "llama"}))
    model = Model(ModelSource("m", repo="org/name", revision="main"), None, ("",))
    assert model.checkpoint.directory is None
    assert model.checkpoint.config == {"model_type": "llama"}
    assert model.checkpoint.provenance == {"repository": "org/name", "revision": commit}
    assert model.small_file("config.json") == b'{"model_type": "llama"}'
    assert model.small_file("tokenizer.json") is None
    assert not list(Path(constants.HF_HUB_CACHE).glob("**/*.safetensors"))


def test_small_files_need_no_weights(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    model = Model(ModelSource("m", path=str(tmp_path)), None, ("",))
    assert model.small_file("tokenizer.json") == b"{}"
    with pytest.raises(CheckpointUnavailable, match="is no plain file name"):
        model.small_file("../tokenizer.json")


def test_opening_a_model_imports_no_torch_before_weights_are_asked_for() -> None:
    program = (
        "import sys; from checks.checkpoint.model import Model; from checks.claim.model import ModelSource;"
        "m = Model(ModelSource('solar', catalog_key='solar_open_100b'), None, ('',)); m.architecture, m.catalog_entry;"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
