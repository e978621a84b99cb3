from __future__ import annotations

from pathlib import Path

import torch

from checks.checkpoint.canonical import CanonicalModel
from checks.checkpoint.checkpoint import Checkpoint
from checks.pair.anchored_matching import match_by_anchors
from checks.pair.mlp_pairs import pair_mlps
from checks.pair.mlp_samples import sample_mlps
from checks.pair.probed_matching import match_by_tokens
from tests.pair.example_models import ALL, CRITICAL, example, hidden, save, weights
from tests.zoo import derive, symmetry


def test_new_vocabulary_and_basis_hide_nothing(tmp_path: Path) -> None:
    changed = derive.replace_vocabulary(hidden("derived"), 6, 900)
    test = match_by_anchors(*sample_mlps(save(tmp_path / "fresh", changed), example("base")))
    assert test.layer_map == {0: 0, 1: 1, 2: 2, 3: 3}
    assert test.agreement > 0.99
    assert test.units == 4 * 352
    assert test.detail["basis"] == "rotation"
    assert test.detail["same_number"] < 0.05
    assert "borrow" in test.abstains_because
    assert test.with_borrowed(test.null.matchings).finding(CRITICAL).dependent is True


def test_independent_models_are_not_found() -> None:
    test = match_by_anchors(*sample_mlps(example("independent"), example("base")))
    assert max(block.matching.agreement for block in test.blocks) < 0.05
    assert test.null.largest_agreement < 0.05
    assert test.null.count >= 8
    assert test.detail["basis"] == "none"
    assert test.with_borrowed(test.null.matchings).finding(CRITICAL).dependent is False


def test_depth_and_width_may_differ(tmp_path: Path) -> None:
    deeper = derive.select_layers(weights("derived"), [0, 1, 2, 1, 2, 3])
    narrow = symmetry.rotate_residual(derive.prune_neurons(deeper, 0.6), 2)
    samples = sample_mlps(save(tmp_path / "narrow", narrow), example("base"))
    test = match_by_anchors(*samples)
    assert test.abstains_because is None
    assert test.finding(CRITICAL).dependent is True
    assert test.agreement > 0.95
    assert list(test.layer_map.values()) == [0, 1, 2, 1, 2, 3]
    assert match_by_anchors(*sample_mlps(example("base"), samples[0].model)).agreement > 0.9


def test_experts_cut_from_a_dense_mlp(tmp_path: Path) -> None:
    cut = symmetry.rotate_residual(derive.upcycle_partitioned(weights("derived"), 1, 4, 2), 2)
    test = match_by_anchors(*sample_mlps(save(tmp_path / "cut", cut), example("base")))
    assert len(test.blocks) == 16
    assert {block.candidate[1] for block in test.blocks} == {0, 1, 2, 3}
    assert test.agreement > 0.95
    assert test.null.largest_agreement < 0.2


def test_renumbered_experts_are_paired(tmp_path: Path) -> None:
    mixture = derive.upcycle_partitioned(weights("base"), 1, 4, 2)
    order = save(tmp_path / "order", symmetry.permute_experts(symmetry.permute_neurons(mixture, 3), 4))
    pairing = pair_mlps(*sample_mlps(order, save(tmp_path / "mixture", mixture)))
    assert any(one.expert != other.expert for one, other in pairing.mapped)
    assert match_by_anchors(*sample_mlps(order, save(tmp_path / "again", mixture)), pairing).agreement > 0.99


def test_models_with_and_without_a_gate_are_compared_without_up(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    sizes = {"n_embd": 64, "n_layer": 6, "n_head": 4, "n_inner": 128, "vocab_size": 1024, "n_positions": 32}
    config = AutoConfig.for_model("gpt2", **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "gpt2")
    other = AutoModelForCausalLM.from_config(config)
    other.save_pretrained(tmp_path / "other")
    plain, apart = (CanonicalModel(Checkpoint(tmp_path / name)) for name in ("gpt2", "other"))
    samples = sample_mlps(plain, plain)
    for test in (match_by_tokens(*samples, ALL), match_by_anchors(*samples)):
        assert test.agreement == 1
        assert test.finding(CRITICAL).dependent is True
    for pair in (sample_mlps(plain, apart), sample_mlps(plain, example("base"))):
        for test in (match_by_tokens(*pair, ALL), match_by_anchors(*pair)):
            assert test.blocks
            assert max(block.matching.agreement for block in test.blocks) < 0.1
