"""Which tensors say by themselves that two models are related: whatever was learned, and nothing that a rule filled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from checks.checkpoint.checkpoint import Checkpoint
from checks.evidence.record import CONTRADICTS, SUPPORTS, Evidence
from checks.pair.comparison import compare
from checks.pair.pair import Pair
from checks.pair.telling_tensors import why_undecided
from tests.pair.random_tensors import Tensors, normal

Llama = Callable[..., Tensors]
Save = Callable[..., Path]
Open = Callable[..., Pair]
Judged = Callable[..., Evidence]
CHECKS = ("identity.sketch", "identity.mse", "similarity.mean", "similarity.early_layers", "similarity.category")


def states(seed: int) -> Tensors:
    """State matrices of 64 states, decays of 40 heads, slopes by distance: what training moved a little."""
    tables: Tensors = {}
    for layer in range(2):
        start, at = f"model.layers.{layer}.mixer.", 10 * seed + layer
        tables[start + "A_log"] = torch.arange(1.0, 65).log() + 0.1 * normal(100 + at, 256, 64)
        tables[start + "transition"] = -torch.arange(1.0, 129) * (1 + 0.1 * normal(200 + at, 300, 128))
        ramp = torch.linspace(-6, 3, 40 * 64).reshape(40, 64)
        tables[start + "attention.time_decay"] = ramp + 0.2 * normal(300 + at, 40, 64)
    return tables


def test_tables_of_states_do_not_accuse(
    llama_tensors: Llama, open_pair: Open, judged: Judged, save_checkpoint: Save
) -> None:
    tables = [states(1), states(2)]
    for name, table in tables[0].items():
        assert float(torch.corrcoef(torch.stack([table.flatten(), tables[1][name].flatten()]))[0, 1]) > 0.9
    paths = [save_checkpoint(f"model{seed}", llama_tensors(seed) | tables[seed]) for seed in (0, 1)]
    pair = open_pair(*paths)
    for check in CHECKS:
        assert judged(check, pair).outcome == SUPPORTS, check
    for layer in (0, 1):
        assert judged("similarity.layer", pair, layer=layer).outcome == SUPPORTS
    assert judged("independence.tensors", pair).outcome != CONTRADICTS
    alone = open_pair(*(save_checkpoint(f"only{number}", one) for number, one in enumerate(tables)))
    for check in CHECKS:
        assert judged(check, alone).outcome != CONTRADICTS, check


def test_tables_of_states_are_listed_with_the_reason(llama_tensors: Llama, save_checkpoint: Save) -> None:
    sides = [Checkpoint(save_checkpoint(f"model{seed}", llama_tensors(seed) | states(seed))) for seed in (1, 2)]
    comparison = compare(*sides)
    assert sorted(comparison.ordinary) == sorted(states(1))
    assert all("repeat one smooth sequence" in reason for reason in comparison.ordinary.values())
    # One side alone does not excuse: what the other one learned is compared.
    learned = {name: normal(7, *table.shape) for name, table in states(1).items()}
    other = compare(sides[0], Checkpoint(save_checkpoint("learned", llama_tensors(2) | learned)))
    assert other.ordinary == {}
    assert {one.entry.name for one in other.compared} >= set(learned)


def learned_tables(seed: int) -> Tensors:
    """Tables under names that say nothing: a large mean row, low rank, little variance, channels of any order."""
    log = torch.arange(1.0, 65).log()[normal(9, 64).argsort()]
    return {
        "blocks.0.first": 3 * normal(seed, 1, 64) + normal(seed + 1, 256, 64),
        "blocks.0.second": normal(seed + 2, 256, 2).abs() @ normal(seed + 3, 2, 64),
        "blocks.1.third": 1 + 0.001 * normal(seed + 4, 256, 64),
        "blocks.1.fourth": log[normal(seed, 64).argsort()] + 0.1 * normal(seed + 5, 256, 64),
    }


@pytest.mark.parametrize("name", list(learned_tables(0)))
def test_what_was_learned_still_decides_alone(
    name: str, open_pair: Open, judged: Judged, save_checkpoint: Save
) -> None:
    theirs = learned_tables(100)
    ours = learned_tables(200) | {name: theirs[name] + 1e-5 * normal(8, 256, 64)}
    paths = [save_checkpoint("ours", ours), save_checkpoint("theirs", theirs)]
    comparison = compare(*(Checkpoint(path) for path in paths))
    assert comparison.ordinary == comparison.undecided == {}
    pair = open_pair(*paths)
    layer = int(name.split(".")[1])
    evidence = judged("similarity.layer", pair, layer=layer)
    assert evidence.outcome == CONTRADICTS
    assert judged("similarity.layer", pair, layer=1 - layer).outcome != CONTRADICTS
    assert judged("identity.sha256", open_pair(paths[1], paths[1])).value == 4


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("layers.0.mixer.A_log", (256, 16), "shorter than 32"),
        ("layers.0.mixer.A_log", (256, 31, 1), "shorter than 32"),
        ("layers.0.mixer.A_log", (256, 32), None),
        ("layers.0.mixer.D", (256,), "a vector"),
        ("layers.0.mixer.decay", (1, 1, 4096), "a vector"),
        ("layers.0.stack", (4, 40, 50), None),
        ("layers.0.stack", (4, 5, 6), "shorter than 32"),
        ("model.layers.0.block_sparse_moe.gate.weight", (8, 4096), None),
        ("model.layers.0.self_attn.q_proj.weight", (16, 16), None),
    ],
)
def test_shapes_and_roles(name: str, shape: tuple[int, ...], words: str | None, save_checkpoint: Save) -> None:
    checkpoint = Checkpoint(save_checkpoint("one", {name: normal(1, *shape)}))
    reason = why_undecided(checkpoint.tensors[name])
    assert reason is None if words is None else words in (reason or "")
