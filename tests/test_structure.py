from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from checks.claim.model import ModelSource
from checks.claim.training import Training
from checks.evidence.record import INCONCLUSIVE, NOT_APPLICABLE, SUPPORTS, Evidence
from checks.pair.candidate import Candidate

Tensors = dict[str, torch.Tensor]
Test = Callable[..., Evidence]


@pytest.fixture
def structure(
    save_checkpoint: Callable[..., Path], llama_config: Callable[..., dict[str, Any]], judged: Callable[..., Evidence]
) -> Test:
    """The evidence of a check of the structure family on tensors."""

    def run(check: str, tensors: Tensors, **config: Any) -> Evidence:
        directory = save_checkpoint("candidate", tensors, llama_config(**config))
        source = ModelSource(name="candidate", path=str(directory))
        return judged(f"structure.{check}", Candidate(source, None, ("",), Training(), frozenset()))

    return run


def repeated(tensors: Tensors, first: int, second: int, noise: float = 0.0) -> Tensors:
    """One layer in the place of another, with noise of so many times its spread."""
    generator = torch.Generator().manual_seed(9)
    changed = dict(tensors)
    for name in tensors:
        if f".layers.{second}." in name:
            original = tensors[name.replace(f".layers.{second}.", f".layers.{first}.")]
            changed[name] = original + noise * original.std() * torch.randn(original.shape, generator=generator)
    return changed


def test_layers_of_their_own_support(llama_tensors: Callable[..., Tensors], structure: Test) -> None:
    evidence = structure("layers", llama_tensors(1))
    assert (evidence.outcome, evidence.value) == (SUPPORTS, 0)
    assert evidence.details["runs"] == []
    assert evidence.details["searched"] == 3


def test_trained_layers_of_their_own_support(base: Tensors, examples: Path, judged: Callable[..., Evidence]) -> None:
    source = ModelSource(name="base", path=str(examples / "base"))
    candidate = Candidate(source, None, ("",), Training(), frozenset())
    assert judged("structure.layers", candidate).outcome == SUPPORTS
    assert judged("structure.experts", candidate).outcome == NOT_APPLICABLE


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_a_repeated_layer_leaves_it_open_and_is_named(
    noise: float, llama_tensors: Callable[..., Tensors], structure: Test
) -> None:
    """A suspicion: it asks where the layers came from and never refutes."""
    evidence = structure("layers", repeated(llama_tensors(1), 0, 2, noise))
    assert (evidence.outcome, evidence.value) == (INCONCLUSIVE, 2)
    (copy,) = evidence.details["copies"]
    assert {copy["first"][0], copy["second"][0]} == {0, 2}
    assert copy["effect"] > 0.7
    assert evidence.details["runs"] == [{"layers": [0, 0], "repeated_from": 2, "length": 1}]


def test_depth_up_scaling_is_one_run(llama_tensors: Callable[..., Tensors], structure: Test) -> None:
    """Layers 0-3 and 2-5 of six, as SOLAR-10.7B has 0-23 and 8-31 of 32."""
    parent = llama_tensors(1, num_hidden_layers=6)
    tensors = {name: tensor for name, tensor in parent.items() if ".layers." not in name}
    for layer, origin in enumerate([0, 1, 2, 3, 2, 3, 4, 5]):
        for name, tensor in parent.items():
            if name.startswith(f"model.layers.{origin}."):
                tensors[name.replace(f".layers.{origin}.", f".layers.{layer}.")] = tensor
    evidence = structure("layers", tensors, num_hidden_layers=8)
    assert (evidence.outcome, evidence.value) == (INCONCLUSIVE, 4)
    assert evidence.details["runs"] == [{"layers": [2, 3], "repeated_from": 4, "length": 2}]


def test_a_permuted_copy_is_the_stated_limit(llama_tensors: Callable[..., Tensors], structure: Test) -> None:
    tensors = repeated(llama_tensors(1), 0, 2)
    order = torch.randperm(176, generator=torch.Generator().manual_seed(1))
    for kind in ("gate_proj", "up_proj"):
        tensors[f"model.layers.2.mlp.{kind}.weight"] = tensors[f"model.layers.2.mlp.{kind}.weight"][order]
    down = "model.layers.2.mlp.down_proj.weight"
    tensors[down] = tensors[down][:, order]
    assert structure("layers", tensors).outcome == SUPPORTS


def test_one_layer_has_no_other(llama_tensors: Callable[..., Tensors], structure: Test) -> None:
    evidence = structure("layers", llama_tensors(1, num_hidden_layers=1), num_hidden_layers=1)
    assert evidence.outcome == NOT_APPLICABLE


MIXTURE = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}


def mixture(dense: Tensors, copies: int, noise: float = 0.3) -> Tensors:
    """Four experts for each MLP: so many of them its noisy copies, the others drawn anew."""
    generator = torch.Generator().manual_seed(4)
    tensors = {name: tensor for name, tensor in dense.items() if ".mlp." not in name}
    for layer in range(3):
        start = f"model.layers.{layer}."
        tensors[f"{start}block_sparse_moe.gate.weight"] = 0.02 * torch.randn(4, 64, generator=generator)
        for expert in range(4):
            for kind, number in (("gate_proj", 1), ("up_proj", 3), ("down_proj", 2)):
                original = dense[f"{start}mlp.{kind}.weight"]
                drawn = 0.02 * torch.randn(original.shape, generator=generator)
                made = original + noise * drawn if expert < copies else drawn
                tensors[f"{start}block_sparse_moe.experts.{expert}.w{number}.weight"] = made
    return tensors


def test_experts_of_their_own_support(llama_tensors: Callable[..., Tensors], structure: Test) -> None:
    evidence = structure("experts", mixture(llama_tensors(1), 0), **MIXTURE)
    assert (evidence.outcome, evidence.value) == (SUPPORTS, 0)
    assert evidence.details["searched"] == 18


def test_upcycled_experts_leave_it_open(llama_tensors: Callable[..., Tensors], structure: Test) -> None:
    evidence = structure("experts", mixture(llama_tensors(1), 4), **MIXTURE)
    assert (evidence.outcome, evidence.value) == (INCONCLUSIVE, 12)
    assert evidence.details["runs"] == []
    assert structure("experts", mixture(llama_tensors(1), 2), **MIXTURE).value == 6


@pytest.mark.parametrize("check", ["layers", "experts"])
@pytest.mark.parametrize("mode", ["screen", "sample"])
def test_what_is_read_in_part_is_not_searched(check: str, mode: str, examples: Path, judged: Test) -> None:
    source = ModelSource(name="base", path=str(examples / "base"))
    candidate = Candidate(source, None, ("",), Training(), frozenset(), read=mode)

    class Unread:
        def read_into(self, shard: str, start: int, buffer: memoryview) -> None:
            raise AssertionError(f"{shard} is read from {start}")

    candidate.checkpoint.source = Unread()
    evidence = judged(f"structure.{check}", candidate)
    assert evidence.outcome == INCONCLUSIVE
    assert "read only in part" in evidence.reason
    assert "--read full" in evidence.reason


def test_without_read_a_model_on_this_disk_is_searched(examples: Path, judged: Test) -> None:
    source = ModelSource(name="base", path=str(examples / "base"))
    candidate = Candidate(source, None, ("",), Training(), frozenset(), read=None)
    assert judged("structure.layers", candidate).outcome == SUPPORTS
