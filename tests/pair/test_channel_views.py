from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import kstest, norm
from torch import Tensor

from checks.checkpoint.canonical import CanonicalModel, Mlp, MlpPlace
from checks.checkpoint.checkpoint import Checkpoint
from checks.pair.channel_views import channel_tests
from checks.statistics.channels import channel_permutation_test
from checks.streaming.planned_source import NotPlanned

EXAMPLES = Path(__file__).parents[2] / "examples/checkpoints"
ALL = (list(range(1024)), list(range(1024)))


def example(name: str) -> CanonicalModel:
    return CanonicalModel(Checkpoint(EXAMPLES / name))


def changed(directory: Path, name: str, **replace: Tensor | None) -> CanonicalModel:
    """An example with some of its tensors replaced or left out (double underscores stand for dots)."""
    directory.mkdir()
    tensors = load_file(EXAMPLES / name / "model.safetensors")
    for key, value in replace.items():
        where = key.replace("__", ".")
        if value is None:
            del tensors[where]
        else:
            tensors[where] = value.contiguous()
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text((EXAMPLES / name / "config.json").read_text())
    return CanonicalModel(Checkpoint(directory))


def test_derived_and_independent_models() -> None:
    base = example("base")
    derived = channel_tests(example("derived"), base, ALL)
    assert derived.whole.z > 50
    assert derived.tests == 4
    assert all(test.z > 25 for test in derived.groups.values())
    apart = channel_tests(example("independent"), base, ALL)
    assert max(abs(test.z) for test in (apart.whole, *apart.groups.values())) < 3.5
    assert apart.whole.largest_sampled > abs(apart.whole.z)
    assert apart.strongest[1].z in {apart.whole.z, *(test.z for test in apart.groups.values())}


def test_permuted_channels_hide(tmp_path: Path) -> None:
    order = torch.randperm(128, generator=torch.Generator().manual_seed(1))
    tensors = load_file(EXAMPLES / "base/model.safetensors")
    columns = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head")
    moved = {
        name.replace(".", "__"): value[:, order] if any(part in name for part in columns) else value[order]
        for name, value in tensors.items()
    }
    hidden = channel_tests(changed(tmp_path / "x", "base", **moved), example("base"), ALL)
    assert abs(hidden.whole.z) < 4


def test_p_values_are_uniform_over_permutations_of_a_trained_model() -> None:
    """Every channel order of a trained model is equally likely under the null hypothesis; one draw for each p-value."""
    tensors = load_file(EXAMPLES / "base/model.safetensors")
    writers = ("o_proj", "down_proj")
    views = [
        (value if any(part in name for part in writers) else value.T)[:, :64].float()
        for name, value in tensors.items()
        if value.dim() == 2
    ][:12]
    generator = torch.Generator().manual_seed(1)
    scores = []
    for _ in range(250):
        order = torch.randperm(128, generator=generator)
        scores.append(channel_permutation_test(views, [view[order] for view in views]).z)
    assert kstest(2 * norm.sf([abs(score) for score in scores]), "uniform").pvalue > 1e-3


def test_without_tokens_and_with_a_layer_map() -> None:
    base, derived = example("base"), example("derived")
    found = channel_tests(derived, base, None, {0: 0, 2: 2})
    assert found.whole.z > 30
    assert found.groups["embedding"].z is None
    assert found.groups["layers"].views == 2 * 7
    # Other layers share the basis, and with it the profile of the channels: far less than their own layer.
    assert abs(channel_tests(derived, base, None, {0: 3, 1: 2}).groups["layers"].z) < 12


def test_what_cannot_be_compared_is_left_out(tmp_path: Path) -> None:
    base = example("base")
    gate = torch.full((352, 128), float("nan"))
    broken = changed(
        tmp_path / "nan",
        "derived",
        model__layers__0__mlp__gate_proj__weight=gate,
        model__layers__1__input_layernorm__weight=torch.full((128,), float("inf")),
    )
    found = channel_tests(broken, base, ALL)
    assert found.whole.views == 1 + 2 + 4 * 7 - 1
    assert found.whole.z > 50


def test_models_of_other_width_are_not_compared(tmp_path: Path) -> None:
    directory = tmp_path / "narrow"
    directory.mkdir()
    tensors = {"model.embed_tokens.weight": torch.randn(64, 32), "model.norm.weight": torch.ones(32)}
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 0}))
    narrow = CanonicalModel(Checkpoint(directory))
    assert channel_tests(narrow, example("base"), ALL) is None
    alone = channel_tests(narrow, narrow, (list(range(64)), list(range(64))))
    assert alone.groups["layers"].z is alone.groups["norms"].z is None
    assert alone.whole.z == pytest.approx(alone.groups["embedding"].z)


class PartOfExperts(CanonicalModel):
    """A model of whose routed experts only some are read, although headers show all."""

    def __init__(self, checkpoint: Checkpoint, read: tuple[int, ...]) -> None:
        super().__init__(checkpoint)
        self.read = read

    def mlp(self, place: MlpPlace, folded: bool = False, rows: Tensor | None = None) -> Mlp:
        if place.expert not in self.read:
            raise NotPlanned("not read in this run")
        return super().mlp(place, folded, rows)


def test_routed_experts_that_are_not_read_are_passed_over(tmp_path: Path) -> None:
    tensors = {"model.embed_tokens.weight": torch.randn(8, 32), "model.norm.weight": torch.ones(32)}
    start = "model.layers.0.mlp."
    tensors[f"{start}gate.weight"] = torch.randn(6, 32)
    for expert in range(6):
        for part, shape in (("gate", (48, 32)), ("up", (48, 32)), ("down", (32, 48))):
            tensors[f"{start}experts.{expert}.{part}_proj.weight"] = torch.randn(*shape)
    save_file(tensors, tmp_path / "model.safetensors")
    config = {"model_type": "qwen3_moe", "num_experts": 6, "num_hidden_layers": 1, "hidden_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = Checkpoint(tmp_path)

    def views(read: tuple[int, ...]) -> int:
        model = PartOfExperts(checkpoint, read)
        return channel_tests(model, model).groups["layers"].views

    # The router, and three matrices of each of two experts at most.
    assert [views(read) for read in ((0, 1, 2, 3, 4, 5), (2, 5), (3,), ())] == [7, 7, 4, 1]
