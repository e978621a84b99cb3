from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from checks.checkpoint.errors import CheckpointUnavailable
from checks.pair.forward_probes import ForwardProbes
from checks.pair.mlp_samples import sample_mlps
from checks.pair.probed_matching import (
    BY_TEXT,
    BY_TOKENS,
    either_probes,
    match_by_probes,
    match_by_text,
    match_by_tokens,
    no_matching,
    shows_origin,
    token_probes,
)
from checks.statistics.block_matching import BlockPair, MatchingNull, MatchingTest
from checks.statistics.double_matching import DoubleMatching
from tests.pair.example_models import ALL, CRITICAL, example, hidden, save, weights
from tests.zoo import derive, symmetry


def test_disguised_copy_is_found(tmp_path: Path) -> None:
    test = match_by_tokens(*sample_mlps(save(tmp_path / "hidden", hidden("derived")), example("base")), ALL)
    assert test.layer_map == {0: 0, 1: 1, 2: 2, 3: 3}
    assert test.agreement > 0.99
    assert test.units == 4 * 352
    assert test.z > 18
    assert test.searched == 16
    assert "borrow" in test.abstains_because
    assert test.with_borrowed(test.null.matchings).finding(CRITICAL).dependent is True


def test_independent_models_are_not_found() -> None:
    test = match_by_tokens(*sample_mlps(example("independent"), example("base")), ALL)
    assert max(block.matching.agreement for block in test.blocks) < 0.05
    assert test.null.largest_agreement < 0.05
    assert test.null.count >= 8
    assert test.with_borrowed(test.null.matchings).finding(CRITICAL).dependent is False


def test_depth_and_width_may_differ(tmp_path: Path) -> None:
    deeper = derive.select_layers(weights("derived"), [0, 1, 2, 1, 2, 3])
    narrow = symmetry.rotate_residual(derive.prune_neurons(deeper, 0.6), 2)
    test = match_by_tokens(*sample_mlps(save(tmp_path / "narrow", narrow), example("base")), ALL)
    assert test.abstains_because is None
    assert test.finding(CRITICAL).dependent is True
    assert test.agreement > 0.95
    assert list(test.layer_map.values()) == [0, 1, 2, 1, 2, 3]


def test_experts_copied_from_a_dense_mlp(tmp_path: Path) -> None:
    copied = derive.upcycle_copied(weights("derived"), 1, 4, 2)
    test = match_by_tokens(*sample_mlps(save(tmp_path / "copied", copied), example("base")), ALL)
    assert len(test.blocks) == 16
    assert {block.candidate[1] for block in test.blocks} == {0, 1, 2, 3}
    assert test.agreement > 0.95
    assert test.searched >= 16
    assert test.null.largest_agreement < 0.2


def test_replaced_embeddings_blind_it(tmp_path: Path) -> None:
    fresh = derive.replace_vocabulary(weights("derived"), 6, 1024)
    test = match_by_tokens(*sample_mlps(save(tmp_path / "fresh", fresh), example("base")), ALL)
    assert test.agreement < 0.05


def test_few_tokens_abstain_and_probes_of_ones_own_do_not() -> None:
    samples = sample_mlps(example("derived"), example("base"))
    few = match_by_tokens(*samples, (ALL[0][:100], ALL[1][:100]))
    assert "100 tokens are shared" in few.abstains_because
    assert few.finding(CRITICAL).dependent is None
    probes = torch.randn(600, 128, generator=torch.Generator().manual_seed(1))
    found = match_by_probes(*samples, lambda _: probes, lambda _: probes)
    assert found.agreement > 0.99
    assert found.probes == 600


def test_unused_tokens_are_no_probes(tmp_path: Path) -> None:
    changed = weights("base").copy()
    table = changed.tensors["model.embed_tokens.weight"].clone()
    table[:400] = 0
    changed.tensors["model.embed_tokens.weight"] = table
    model = save(tmp_path / "unused", changed)
    ours, theirs = token_probes(model, example("base"), ALL)
    assert ours.shape == theirs.shape == (624, 128)
    assert torch.allclose(ours.square().mean(1), torch.ones(624))
    with pytest.raises(ValueError, match="same tokens"):
        token_probes(model, example("base"), ([1, 2], [1]))


def test_broken_embeddings_are_unavailable(tmp_path: Path) -> None:
    changed = weights("base").copy()
    changed.tensors["model.embed_tokens.weight"] = torch.full((1024, 128), math.inf)
    with pytest.raises(CheckpointUnavailable, match="embedding"):
        match_by_tokens(*sample_mlps(save(tmp_path / "endless", changed), example("base")), ALL)


def matching(agreements: int, by: str, blocks: int = 6) -> MatchingTest:
    """A test with so many agreeing neurons of 100 in each block, and almost none in mismatched ones."""
    one = DoubleMatching(100, agreements, 1.0, agreements / 100, agreements / 10)
    none = DoubleMatching(100, 1, 1.0, 0.0, 0.0)
    places = tuple(BlockPair((layer, None), (layer, None), one) for layer in range(blocks))
    layer_map = {layer: layer for layer in range(blocks)}
    return MatchingTest(places, MatchingNull((none,) * 16), 36, layer_map, 1024, 0, detail={"answers_to": by})


def never() -> MatchingTest:
    raise AssertionError("the text was asked for")


def test_the_text_is_asked_only_where_tokens_show_nothing() -> None:
    found = either_probes(matching(90, BY_TOKENS), never)
    assert found.detail == {"answers_to": BY_TOKENS}
    assert not shows_origin(matching(9, BY_TOKENS))
    assert shows_origin(matching(10, BY_TOKENS))
    by_text = either_probes(matching(1, BY_TOKENS), lambda: matching(90, BY_TEXT))
    assert by_text.agreement == 0.9
    assert by_text.detail["answers_to"] == BY_TEXT
    assert "1.0% of the neurons agree" in str(by_text.detail["shared_tokens"])
    neither = either_probes(matching(1, BY_TOKENS), lambda: matching(2, BY_TEXT))
    assert neither.agreement == 0.01
    assert neither.detail["answers_to"] == BY_TOKENS
    assert "2.0% of the neurons agree" in str(neither.detail["common_text"])


def test_two_tests_of_one_question_count_as_two() -> None:
    one = matching(1, BY_TOKENS)
    for found in (
        either_probes(matching(90, BY_TOKENS), never),
        either_probes(one, lambda: matching(90, BY_TEXT)),
        either_probes(one, lambda: matching(2, BY_TEXT)),
    ):
        assert found.tests >= 2 * one.tests
    abstaining = no_matching("9 tokens are shared", BY_TOKENS)
    assert either_probes(abstaining, lambda: matching(2, BY_TEXT)).tests == one.tests


def test_reasons_of_both_are_kept() -> None:
    impossible = no_matching("no forward pass: too large", BY_TEXT)
    tokens = either_probes(matching(1, BY_TOKENS), lambda: impossible)
    assert tokens.abstains_because is None
    assert tokens.detail["common_text"] == "no forward pass: too large"
    neither = either_probes(no_matching("9 tokens are shared", BY_TOKENS), lambda: impossible)
    assert neither.abstains_because == "9 tokens are shared; on common text: no forward pass: too large"
    text = either_probes(no_matching("9 tokens are shared", BY_TOKENS), lambda: matching(2, BY_TEXT))
    assert text.abstains_because is None
    assert text.detail["shared_tokens"] == "9 tokens are shared"


def test_each_layer_has_probes_of_its_own() -> None:
    samples = sample_mlps(example("derived"), example("base"))
    generator = torch.Generator().manual_seed(1)
    states = {layer: torch.randn(600, 128, generator=generator) for layer in range(4)}
    test = match_by_text(*samples, ForwardProbes(states, states, 600, "digest"))
    assert test.agreement > 0.99
    assert test.detail == {"answers_to": BY_TEXT, "text_sha256": "digest"}
    turned = {layer: states[(layer + 1) % 4] for layer in range(4)}
    assert match_by_text(*samples, ForwardProbes(states, turned, 600, "digest")).agreement < 0.05
