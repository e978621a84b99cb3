from __future__ import annotations

import math
from pathlib import Path

from checks.checkpoint.canonical import CanonicalModel
from checks.checkpoint.checkpoint import Checkpoint
from checks.pair.layer_spectra import compare_layer_spectra, layer_spectra
from checks.pair.row_clouds import compare_clouds, compare_elements
from checks.pair.self_structure import search_experts, search_layers
from tests.checkpoint.test_canonical import stored
from tests.checkpoint.tiny_models import build

EXAMPLES = Path(__file__).parents[2] / "examples/checkpoints"


def example(name: str) -> CanonicalModel:
    return CanonicalModel(Checkpoint(EXAMPLES / name))


def test_clouds_of_derived_and_independent_models() -> None:
    base = example("base")
    derived, apart = (compare_clouds(example(name), base) for name in ("derived", "independent"))
    assert derived.keys() == apart.keys() == {"embedding", "readers"}
    for name, one in derived.items():
        assert one.overlap > 0.9
        assert one.distance < 0.05
        assert apart[name].overlap < 0.5
        assert apart[name].overlap < apart[name].null_highest_overlap + 0.05
        assert apart[name].distance > 0.05


def test_element_distributions_say_nothing_of_independent_models_of_one_recipe() -> None:
    base = example("base")
    for name in ("derived", "independent"):
        found = compare_elements(example(name), base)
        assert found.keys() == {"embedding", "attention", "mlp"}
        assert max(one.distance for one in found.values()) < 0.05


def test_spectra_of_every_layer() -> None:
    for name in ("base", "independent"):
        checkpoint = Checkpoint(EXAMPLES / name)
        assert len(layer_spectra(CanonicalModel(checkpoint), checkpoint.config)) == 4
    pair = [
        (CanonicalModel(one), one.config) for one in (Checkpoint(EXAMPLES / "base"), Checkpoint(EXAMPLES / "derived"))
    ]
    found = compare_layer_spectra(pair[0], pair[1])
    assert "4 layers" in found.reason
    assert found.ratio < 0.6


def test_latent_attention_and_other_widths(tmp_path: Path) -> None:
    latent = stored(tmp_path / "latent", build("deepseek_v3"), "saved")
    model = CanonicalModel(latent)
    assert len(layer_spectra(model, latent.config)) == len(model.layers)
    assert compare_clouds(model, example("base")) == {}


def test_self_structure_of_a_real_model(tmp_path: Path) -> None:
    groups = search_layers(example("base"))
    assert [(group.name, group.found.members, group.found.searched) for group in groups] == [("dense", 4, 6)]
    assert groups[0].found.duplicates(math.log(1e-6), 0.0) == ()
    assert search_experts(example("base")) == ()
    moe = build("mixtral")
    experts = moe.model.layers[1].mlp.experts
    experts.gate_up_proj.data[1] = experts.gate_up_proj.data[0]
    experts.down_proj.data[1] = experts.down_proj.data[0]
    found = search_experts(CanonicalModel(stored(tmp_path / "moe", moe, "saved")))
    duplicates = {
        group.name: [(group.places[pair.first].expert, group.places[pair.second].expert) for pair in pairs]
        for group in found
        if (pairs := group.found.duplicates(math.log(1e-6), 0.5))
    }
    assert duplicates == {"layer 1": [(0, 1)]}
