from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from checks.checkpoint.checkpoint import Checkpoint
from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.parts import Parts, _runs

FIXTURE = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def parts(directory: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Parts:
    save_file({name: one.contiguous() for name, one in tensors.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"num_hidden_layers": 1, **config}))
    return Parts(Checkpoint(directory))


def matrix(
    found: Parts, part: str, layer: int = 0, whose: str | None = None, expert: int | None = None
) -> torch.Tensor:
    holder = found.find(part, layer, whose, expert)
    value = found.matrix(holder, part, expert, "cpu")
    assert tuple(value.shape) == found.shape(holder, part)
    assert value.is_contiguous()
    return value


@FIXTURE
@given(key_heads=st.integers(1, 3), of_each=st.integers(1, 3), size=st.integers(1, 4))
def test_queries_keys_and_values_in_groups(tmp_path: Path, key_heads: int, of_each: int, size: int) -> None:
    """GPT-NeoX's order, and with several queries to a key that of its successors."""
    heads = {"q": torch.randn(key_heads, of_each, size, 8)}
    heads |= {part: torch.randn(key_heads, 1, size, 8) for part in ("k", "v")}
    fused = torch.cat(list(heads.values()), 1).reshape(-1, 8)
    found = parts(
        tmp_path,
        {"gpt_neox.layers.0.attention.query_key_value.weight": fused},
        model_type="gpt_neox",
        num_attention_heads=key_heads * of_each,
        num_key_value_heads=key_heads,
    )
    for part, value in heads.items():
        assert torch.equal(matrix(found, part), value.reshape(-1, 8))


@FIXTURE
@given(queries=st.integers(1, 9), keys=st.integers(1, 9))
def test_queries_keys_and_values_one_after_the_other(tmp_path: Path, queries: int, keys: int) -> None:
    rows = {"q": torch.randn(queries, 8), "k": torch.randn(keys, 8), "v": torch.randn(keys, 8)}
    tensors = {
        "transformer.h.0.attn.c_attn.weight": torch.cat(list(rows.values())).T,
        "transformer.h.0.attn.c_proj.weight": torch.randn(8, queries).T,
    }
    found = parts(tmp_path, tensors, model_type="gpt2", n_layer=1)
    for part, value in rows.items():
        assert torch.equal(matrix(found, part), value)


def test_fused_rows_that_cannot_be_divided(tmp_path: Path) -> None:
    name = "gpt_neox.layers.0.attention.query_key_value.weight"
    for config in ({}, {"num_attention_heads": 5}, {"num_attention_heads": 4, "num_key_value_heads": 3}):
        found = parts(tmp_path, {name: torch.ones(24, 8)}, model_type="gpt_neox", **config)
        with pytest.raises(CheckpointUnavailable, match=r"query_key_value\.weight .* config\.json states"):
            matrix(found, "q")
    tensors = {
        "model.layers.0.self_attn.qkv_proj.weight": torch.ones(25, 8),
        "model.layers.0.self_attn.o_proj.weight": torch.ones(8, 16),
        "model.layers.0.mlp.gate_up_proj.weight": torch.ones(25, 8),
    }
    found = parts(tmp_path, tensors, model_type="phi3")
    for part in ("v", "up"):
        with pytest.raises(CheckpointUnavailable, match="25 rows cannot be those of"):
            matrix(found, part)


def test_an_expert_that_a_stack_has_not(tmp_path: Path) -> None:
    at = "model.layers.0.mlp.experts."
    tensors = {f"{at}gate_up_proj": torch.randn(3, 20, 8), f"{at}down_proj": torch.randn(3, 8, 10)}
    found = parts(tmp_path, tensors, model_type="qwen3_moe", num_experts=3)
    assert found.experts(0, "routed") == (0, 1, 2)
    assert torch.equal(matrix(found, "up", 0, "routed", 1), tensors[f"{at}gate_up_proj"][1, 10:])
    for expert in (-1, 3, None):
        with pytest.raises(KeyError, match="holds experts 0 to 2"):
            found.matrix(found.find("up", 0, "routed"), "up", expert, "cpu")
    with pytest.raises(KeyError, match=r"no 'router' of layer 0"):
        found.find("router", 0)


def test_a_stack_by_rows_of_an_unknown_number_of_experts(tmp_path: Path) -> None:
    name = "transformer.blocks.0.ffn.experts.mlp.v1"
    sparse = {"model_type": "dbrx", "n_layers": 1}
    router = {"transformer.blocks.0.ffn.router.layer.weight": torch.ones(3, 8)}
    stack = torch.randn(12, 8)
    found = parts(tmp_path, {name: stack, **router}, **sparse)
    assert torch.equal(matrix(found, "up", 0, "routed", 2), stack[8:])
    found = parts(tmp_path, {name: stack}, **sparse)
    with pytest.raises(CheckpointUnavailable, match="rows of 0 experts"):
        matrix(found, "up", 0, "routed", 2)
    found = parts(tmp_path, {name: stack}, ffn_config={"moe_num_experts": 5}, **sparse)
    with pytest.raises(CheckpointUnavailable, match="rows of 5 experts"):
        found.experts(0, "routed")


@given(st.sets(st.integers(0, 500)), st.integers(1, 50))
def test_runs_hold_every_number_once(numbers: set[int], gap: int) -> None:
    runs = _runs(torch.tensor(sorted(numbers), dtype=torch.int64), gap)
    assert [int(one) for run in runs for one in run] == sorted(numbers)
    assert all(int(run.diff().max()) <= gap for run in runs if len(run) > 1)
    assert all(int(b[0] - a[-1]) > gap for a, b in itertools.pairwise(runs))
