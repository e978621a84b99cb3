"""Each byte of a pair is read once, whatever asks for it, and what is found is what reading for each check finds."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from checks.checkpoint.canonical import CanonicalModel
from checks.checkpoint.checkpoint import Checkpoint
from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.model import Model
from checks.claim.model import ModelSource
from checks.evidence.store import Store
from checks.pair import kept, layer_sweep, measures
from checks.pair.asked import layer_visitors_for
from checks.pair.comparison import compare
from checks.pair.layer_sweep import LayerSweep
from checks.pair.layer_visits import WANTED_BY
from checks.pair.mlp_pairs import REPRESENTATIVES
from checks.pair.mlp_samples import spread
from checks.pair.pair import Pair
from checks.pair.reading import Reading
from checks.statistics.channels import ChannelProducts
from checks.streaming import holding as holding_module
from checks.streaming import stream
from tests.pair.counting import CountingPages
from tests.pair.random_tensors import mixtral, normal
from tests.small_examples import cut, cut_all

Measure = Callable[[Pair], Any]
# All that wants something of every layer.
WANTED: list[Measure] = sorted({one for those in WANTED_BY.values() for one in those}, key=lambda one: one.__name__)


QWEN2_MOE = {
    "model_type": "qwen2_moe",
    "hidden_size": 32,
    "num_experts": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 1,
}


def qwen2_moe(seed: int, experts: int) -> dict[str, torch.Tensor]:
    """Random tensors of one layer with a shared expert."""
    start = "model.layers.0."
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (40, 32), "model.norm.weight": (32,)}
    shapes |= {f"{start}{norm}.weight": (32,) for norm in ("input_layernorm", "post_attention_layernorm")}
    shapes |= {f"{start}self_attn.{kind}_proj.weight": (32, 32) for kind in "qkvo"}
    shapes |= {f"{start}mlp.gate.weight": (experts, 32), f"{start}mlp.shared_expert_gate.weight": (1, 32)}
    for whose in ("shared_expert", *(f"experts.{expert}" for expert in range(experts))):
        shapes |= {f"{start}mlp.{whose}.{kind}_proj.weight": (24, 32) for kind in ("gate", "up")}
        shapes[f"{start}mlp.{whose}.down_proj.weight"] = (32, 24)
    return {name: 0.02 * normal(seed + number, *shape) for number, (name, shape) in enumerate(shapes.items())}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cut_all(tmp_path_factory.mktemp("models"))


def pair_of(candidate: Path, reference: Path, sweeps: bool = True, **how: Any) -> tuple[Pair, list[CountingPages]]:
    """A pair whose reads are counted; with `sweeps` as the plugin opens it for all checks."""
    ours, theirs = (Model(ModelSource(one.name, path=str(one)), None, ("",)) for one in (candidate, reference))
    sources = [CountingPages(candidate), CountingPages(reference)]
    ours.checkpoint.source, theirs.checkpoint.source = sources
    if sweeps:
        how["layer_visitors"] = layer_visitors_for(WANTED_BY)
    return Pair(ours, theirs, takes_fingerprints=True, **how), sources


def results(pair: Pair) -> Mapping[str, str]:
    """All that the measures find, to the last bit; or why there is nothing."""
    found = {}
    for measure in WANTED:
        try:
            written: Any = kept.form().write(pair.once(measure), kept.form().result_hint(measure))
        except CheckpointUnavailable as error:
            written = str(error)
        found[measure.__name__] = json.dumps(written)
    return found


def most_reads(source: CountingPages, checkpoint: Checkpoint) -> int:
    """How often was the byte of a tensor read that was read most?"""
    infos = [entry.stored for entry in checkpoint.tensors.values()]
    return max(int(source.counts[info.shard][info.start : info.stop].max()) for info in infos)


@pytest.mark.parametrize(("candidate", "reference"), [("derived", "base"), ("independent", "base")])
def test_each_byte_is_read_once_for_all_checks(models: Path, candidate: str, reference: str) -> None:
    pair, sources = pair_of(models / candidate, models / reference)
    found = results(pair)
    for source, side in zip(sources, (pair.candidate, pair.reference), strict=True):
        for name in side.checkpoint.tensors:
            assert source.times(side.checkpoint, name) == 1
    apart, sources = pair_of(models / candidate, models / reference, sweeps=False)
    assert results(apart) == found
    assert most_reads(sources[0], apart.candidate.checkpoint) > 3


def test_models_of_other_shapes_too(
    llama_tensors: Callable[..., Any], llama_config: Callable[..., Any], save_checkpoint: Callable[..., Path]
) -> None:
    shapes = ({}, {"hidden_size": 32, "num_hidden_layers": 3})
    paths = [
        save_checkpoint(f"{seed}", llama_tensors(seed, **shape), llama_config(**shape))
        for seed, shape in enumerate(shapes)
    ]
    pair, sources = pair_of(*paths)
    found = results(pair)
    for source, side in zip(sources, (pair.candidate, pair.reference), strict=True):
        assert most_reads(source, side.checkpoint) == 1
    assert results(pair_of(*paths, sweeps=False)[0]) == found


def test_of_many_experts_only_some_are_held(save_checkpoint: Callable[..., Path]) -> None:
    config = {"model_type": "mixtral", "hidden_size": 32, "num_local_experts": 9, "num_attention_heads": 2}
    norms = ["model.norm.weight"]
    for layer in (0, 1):
        norms += [f"model.layers.{layer}.{one}_layernorm.weight" for one in ("input", "post_attention")]
    paths = [
        save_checkpoint(f"{seed}", mixtral(seed, experts=9) | {name: torch.ones(32) for name in norms}, config)
        for seed in (1, 2)
    ]
    sides = Checkpoint(paths[0]), Checkpoint(paths[1])
    seen: list[tuple[int | None, set[int]]] = []

    def visit(layer: int | None) -> None:
        held = {name for name in sides[0].tensors if sides[0].held.get(name) is not None}
        entries = [sides[0].tensors[name].role for name in held]
        seen.append((layer, {one.expert for one in entries if one.layer == layer and one.expert is not None}))

    sweep = LayerSweep(sides, (CanonicalModel(sides[0]), CanonicalModel(sides[1])), [visit])
    compare(*sides, sweep=sweep)
    sweep.finish()
    assert dict(seen) == {None: set(), 0: {0, 1, 3, 5, 8}, 1: {0, 1, 3, 5, 8}}
    pair, sources = pair_of(*paths)
    found = results(pair)
    assert results(pair_of(*paths, sweeps=False)[0]) == found
    assert all("blocks" not in value or json.loads(value) for value in found.values())
    # Other experts may be read again, to be paired.
    attention = [name for name in sides[0].tensors if "self_attn" in name]
    assert {sources[0].times(pair.candidate.checkpoint, name) for name in attention} == {1}
    assert most_reads(sources[0], pair.candidate.checkpoint) <= 2


def test_with_little_room_the_same_is_found(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = results(pair_of(models / "derived", models / "base")[0])
    largest = max(entry.stored.stop - entry.stored.start for entry in Checkpoint(models / "base").tensors.values())
    for limit in (0, largest // 2, 2 * largest):
        monkeypatch.setattr(layer_sweep.LayerSweep.__init__, "__defaults__", (limit,))
        assert results(pair_of(models / "derived", models / "base")[0]) == expected


@pytest.mark.parametrize("threads", [2, 5])
def test_layers_come_in_the_order_in_which_they_are_stored(
    llama_tensors: Callable[..., Any],
    save_checkpoint: Callable[..., Path],
    threads: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stream, "_cores", lambda: threads)
    paths = [save_checkpoint(f"{seed}", llama_tensors(seed, num_hidden_layers=11)) for seed in (1, 2)]
    sides = Checkpoint(paths[0]), Checkpoint(paths[1])
    models = CanonicalModel(sides[0]), CanonicalModel(sides[1])
    seen: list[int | None] = []

    def visit(layer: int | None) -> None:
        seen.append(layer)
        for side, model in zip(sides, models, strict=True):
            assert all(side.held.get(name) is not None for name in model.tensors_by_layer[layer])

    sweep = LayerSweep(sides, models, [visit])
    found = compare(*sides, sweep=sweep)
    sweep.finish()
    last = {
        layer: max(sides[0].tensors[name].stored.stop for name in names)
        for layer, names in models[0].tensors_by_layer.items()
    }
    assert seen == sorted(last, key=last.__getitem__)
    assert len(seen) == 12
    assert [one.sums for one in found.compared] == [one.sums for one in compare(*sides).compared]


def test_a_visitor_that_fails_holds_up_nobody(models: Path) -> None:
    sides = Checkpoint(models / "derived"), Checkpoint(models / "base")
    seen: list[int | None] = []

    def fails(layer: int | None) -> None:
        raise CheckpointUnavailable("its layers do not fit")

    def mistaken(layer: int | None) -> None:
        raise ZeroDivisionError

    sweep = LayerSweep(sides, (CanonicalModel(sides[0]), CanonicalModel(sides[1])), [fails, mistaken, seen.append])
    compare(*sides, sweep=sweep)
    sweep.finish()
    assert sorted(seen, key=str) == [0, 1, None]
    sweep.finish()
    assert len(seen) == 3


@pytest.mark.parametrize("with_store", [False, True])
def test_what_one_check_cannot_have_keeps_nothing_from_the_others(
    models: Path, tmp_path: Path, with_store: bool
) -> None:
    directory = cut("derived", tmp_path)
    (directory / "tokenizer.json").write_text("{")
    pair, sources = pair_of(directory, models / "base", store=Store(tmp_path / "store") if with_store else None)
    found = results(pair)
    assert "tokenizer.json" in found["channels"]
    assert most_reads(sources[0], pair.candidate.checkpoint) == 1
    assert results(pair_of(directory, models / "base", sweeps=False)[0]) == found


def test_layers_that_no_pass_brings_are_read_once_for_all(models: Path, tmp_path: Path) -> None:
    first, _ = pair_of(models / "derived", models / "base", sweeps=False, store=Store(tmp_path))
    first.comparison()
    pair, sources = pair_of(models / "derived", models / "base", store=Store(tmp_path))
    found = results(pair)
    layers = [name for name in pair.candidate.checkpoint.tensors if ".layers." in name]
    assert {sources[0].times(pair.candidate.checkpoint, name) for name in layers} == {1}
    assert found == results(first)
    # What a store has is not taken again.
    third, sources = pair_of(models / "derived", models / "base", store=Store(tmp_path))
    assert results(third) == found
    assert sources[0].read == sources[1].read == 0


def test_a_part_is_read_once_for_the_pass_and_once_for_the_layers(models: Path) -> None:
    how = {"reading": Reading("sample", 2_000_000)}
    pair, sources = pair_of(models / "derived", models / "base", **how)
    found = results(pair)
    assert results(pair_of(models / "derived", models / "base", sweeps=False, **how)[0]) == found
    pair.comparison()
    assert most_reads(sources[0], pair.candidate.checkpoint) <= 4


def test_a_changed_layer_is_seen_by_all(models: Path, tmp_path: Path) -> None:
    """Guards against results of another model's layers."""
    directory = cut("derived", tmp_path)
    sides = [Checkpoint(models / "derived"), Checkpoint(directory)]
    name = next(one for one in sides[0].tensors if "layers.1.self_attn.q_proj" in one)
    shard = next(directory.glob("*.safetensors"))
    content, info = bytearray(shard.read_bytes()), sides[1].tensors[name].stored
    flat = np.frombuffer(content, np.uint8)[info.start : info.stop]
    noise = torch.randn(len(flat) // 2, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    content[info.start : info.stop] = noise.view(torch.uint8).numpy().tobytes()[: len(flat)]
    shard.write_bytes(content)
    changed = results(pair_of(directory, models / "base")[0])
    before = results(pair_of(models / "derived", models / "base")[0])
    assert {name for name in before if before[name] != changed[name]} >= {"channels", "spectra", "clouds"}


def test_nothing_is_read_where_nobody_wants_layers(models: Path) -> None:
    pair, sources = pair_of(models / "derived", models / "base", sweeps=False)
    assert len(pair.once(measures.tokens))
    assert sources[0].read == sources[1].read == 0
    pair.once(measures.tables)
    layers = [name for name in pair.candidate.checkpoint.tensors if ".layers." in name]
    assert {sources[0].times(pair.candidate.checkpoint, name) for name in layers} == {0}


def test_a_closed_pair_holds_nothing(models: Path) -> None:
    pair, _ = pair_of(models / "derived", models / "base")
    results(pair)
    names = [*pair.candidate.checkpoint.tensors]
    assert all(pair.candidate.checkpoint.held.get(name) is not None for name in names)
    pair.close()
    assert all(pair.candidate.checkpoint.held.get(name) is None for name in names)
    pair.candidate.checkpoint.read(names[0])
    assert pair.candidate.checkpoint.held.get(names[0]) is None


def test_what_is_too_large_to_be_held_is_never_copied(models: Path) -> None:
    sides = Checkpoint(models / "derived"), Checkpoint(models / "base")
    sizes = {name: entry.stored.stop - entry.stored.start for name, entry in sides[0].tensors.items()}
    limit = sorted(sizes.values())[len(sizes) // 2]
    sweep = LayerSweep(sides, (CanonicalModel(sides[0]), CanonicalModel(sides[1])), [lambda layer: None], limit)
    begun: list[int] = []

    class Noting(bytearray):
        def __init__(self, size: int) -> None:
            begun.append(size)
            super().__init__(size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(holding_module, "bytearray", Noting, raising=False)
        compare(*sides, sweep=sweep)
    assert begun
    assert max(begun) <= limit


def test_the_experts_that_stand_for_a_layer_are_held(
    save_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a shared expert comes before the routed ones, and shifts which of these are."""
    directory = save_checkpoint("shared", qwen2_moe(1, experts=16), QWEN2_MOE)
    checkpoint = Checkpoint(directory)
    model = CanonicalModel(checkpoint)
    chosen = {place.expert for place in spread(model.mlps(0), REPRESENTATIVES)} - {None}
    held = layer_sweep._held_of(checkpoint, model, 0)
    assert {checkpoint.tensors[name].role.expert for name in held} - {None} == chosen | {0, 1}
    assert len(chosen) == 3


def test_a_layer_that_fails_midway_is_added_whole_or_not(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = pair_of(models / "derived", models / "base")[0].once(measures.channels)
    add, calls = ChannelProducts.add, [0]

    def fails_once(self: ChannelProducts, *views: torch.Tensor) -> None:
        calls[0] += 1
        if calls[0] == 5:
            raise MemoryError
        add(self, *views)

    monkeypatch.setattr(ChannelProducts, "add", fails_once)
    found = pair_of(models / "derived", models / "base")[0].once(measures.channels)
    assert calls[0] > 5
    assert (found.whole.views, found.whole.columns) == (expected.whole.views, expected.whole.columns)
    assert found.whole.z == pytest.approx(expected.whole.z, rel=1e-5)
