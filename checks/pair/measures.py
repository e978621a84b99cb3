"""What checks measure of a pair, each as one function of the pair: `pair.once(tables)` measures once and is shared.

What is marked as `kept` outlives the run: raise its version with every change of what it finds, wherever that is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from checks.checkpoint.errors import CheckpointUnavailable
from checks.pair.forward_probes import text_readers
from checks.pair.kept import initial_weights, kept, token_ids
from checks.pair.pair import Pair

if TYPE_CHECKING:
    from checks.pair.aligned import Aligned, CommonFrame
    from checks.pair.channel_views import ChannelSweep, ChannelTests
    from checks.pair.embedding_rows import TableComparison
    from checks.pair.fingerprints import NamelessComparison
    from checks.pair.mapped_units import MappedUnits
    from checks.pair.mlp_pairs import MlpPairing
    from checks.pair.mlp_samples import MlpSamples
    from checks.pair.origin import Origin
    from checks.pair.shared_tokens import SharedTokens
    from checks.statistics.block_matching import MatchingTest
    from checks.statistics.double_matching import DoubleMatching
    from checks.statistics.pca import CloudOverlap
    from checks.statistics.spectrum import SpectrumComparison
    from checks.statistics.units import UnitTests
    from checks.statistics.wasserstein import DistributionDistance

SEED = 0


def tokens(pair: Pair) -> SharedTokens:
    """Tokens that both vocabularies have, by their text; none where a model has no tokenizer, or no row is read."""
    return pair.tokens


@kept("1", depends_on=token_ids)
def tables(pair: Pair) -> tuple[TableComparison, ...]:
    """Embedding and head on shared tokens. Raises CheckpointUnavailable."""
    from checks.pair.embedding_rows import compare_tables

    return compare_tables(*pair.canonical, pair.once(tokens).ids, SEED)


def channel_sweep(pair: Pair) -> ChannelSweep | None:
    """What collects the views of residual channels; None for other widths. Raises CheckpointUnavailable."""
    from checks.pair.channel_views import ChannelSweep

    ours, theirs = pair.canonical
    if ours.hidden_size != theirs.hidden_size:
        return None
    ids = pair.once(tokens).ids
    return ChannelSweep(ours, theirs, ids if len(ids[0]) else None, seed=SEED)


@kept("2", depends_on=token_ids)
def channels(pair: Pair) -> ChannelTests | None:
    """The permutation test of residual channels; None for other widths. Raises CheckpointUnavailable."""
    sweep = pair.once(channel_sweep)
    return None if sweep is None else sweep.tests()


def samples(pair: Pair) -> tuple[MlpSamples, MlpSamples]:
    """Sampled MLPs of both models."""
    from checks.pair.mlp_samples import sample_mlps

    return sample_mlps(*pair.canonical)


@kept("2")
def pairing(pair: Pair) -> MlpPairing:
    """Layers and experts that belong together, by what no renumbering changes. Raises CheckpointUnavailable."""
    from checks.pair.mlp_pairs import pair_mlps

    return pair_mlps(*pair.once(samples))


@kept("3", unless=lambda found: found.reason is not None)
def mapped_units(pair: Pair) -> MappedUnits:
    """The permutation test of MLPs in other places, or stored in another way; none where no map can be had.

    Raises CheckpointUnavailable.
    """
    from checks.pair.mapped_units import MappedUnits
    from checks.pair.mapped_units import mapped_units as test_mapped

    try:
        mapped = pair.once(pairing).mapped
    except CheckpointUnavailable as error:
        return MappedUnits((), 0, str(error))
    in_place = [(group.layer, group.category, group.expert) for group in pair.neurons()]
    return test_mapped(*pair.canonical, mapped, in_place)


def units(pair: Pair) -> UnitTests | None:
    """The permutation tests of MLPs in place and in others together; None if none could be made.

    Raises CheckpointUnavailable.
    """
    from checks.pair.mapped_units import with_mapped

    return with_mapped(pair.units(), pair.once(mapped_units), pair.neurons())


@kept("3", depends_on=token_ids)
def matching_by_tokens(pair: Pair) -> MatchingTest:
    """Double matching with embeddings of shared tokens as probes. Raises CheckpointUnavailable."""
    from checks.pair.probed_matching import match_by_tokens

    ours, theirs = pair.once(samples)
    ids = pair.once(tokens).ids
    test = match_by_tokens(ours, theirs, ids, SEED)
    if test.blocks and _needs_more_null(test):
        own = [match_by_tokens(one, one, (side, side), SEED) for one, side in ((ours, ids[0]), (theirs, ids[1]))]
        test = test.with_borrowed(_mismatched(own))
    return test


@kept("2", depends_on=text_readers, unless=lambda found: not found.blocks)
def matching_by_text(pair: Pair) -> MatchingTest:
    """Double matching with what enters the MLPs on common text as probes; none, and why, where a model cannot be run.

    Raises CheckpointUnavailable.
    """
    from checks.pair.forward_model import NoForwardPass
    from checks.pair.forward_probes import forward_probes
    from checks.pair.probed_matching import BY_TEXT, match_by_probes, match_by_text, no_matching

    if pair.plan is not None:
        mode = pair.plan.request.mode
        return no_matching(f"no forward pass: --read {mode} reads a part of the weights", BY_TEXT, SEED)
    ours, theirs = pair.once(samples)
    try:
        probes = forward_probes(pair.candidate, pair.reference, pair.canonical)
    except NoForwardPass as error:
        return no_matching(str(error), BY_TEXT, SEED)
    test = match_by_text(ours, theirs, probes, SEED)
    if test.blocks and _needs_more_null(test):
        own = [
            match_by_probes(one, one, side.__getitem__, side.__getitem__, SEED)
            for one, side in ((ours, probes.candidate), (theirs, probes.reference))
        ]
        test = test.with_borrowed(_mismatched(own))
    return test


@kept("2")
def matching_by_anchors(pair: Pair) -> MatchingTest:
    """Anchored double matching: neither tokens nor a basis in common are needed. Raises CheckpointUnavailable."""
    from checks.pair.anchored_matching import match_by_anchors

    ours, theirs = pair.once(samples)
    test = match_by_anchors(ours, theirs, pair.once(pairing), SEED)
    if test.blocks and _needs_more_null(test):
        test = test.with_borrowed(_mismatched([match_by_anchors(one, one, seed=SEED) for one in (ours, theirs)]))
    return test


def _needs_more_null(test: MatchingTest) -> bool:
    """Has a pair of few layers too few mismatched blocks for a null of its own?"""
    from checks.statistics.block_matching import LEAST_LAYERS, LEAST_NULL

    return len(test.layer_map) < LEAST_LAYERS or test.null.count < LEAST_NULL


def _mismatched(tests: Sequence[MatchingTest]) -> list[DoubleMatching]:
    """Blocks of one model that do not belong together: they share a basis and tokens, so their null is no narrower."""
    return [matching for test in tests for matching in test.null.matchings]


def frame(pair: Pair) -> CommonFrame | None:
    """The common basis of both residual streams; None with too few shared tokens. Raises CheckpointUnavailable."""
    from checks.pair.aligned import common_frame

    return common_frame(*pair.canonical, pair.once(tokens).ids, SEED)


@kept("2", depends_on=token_ids)
def alignment(pair: Pair) -> Aligned | None:
    """Procrustes alignment and unbiased CKA of mapped layers. Raises CheckpointUnavailable."""
    from checks.pair.aligned import align_in

    layer_map = pair.once(matching_by_anchors).layer_map
    common = pair.once(frame)
    return None if common is None else align_in(common, layer_map)


def nameless(pair: Pair) -> NamelessComparison:
    """Sketches and samples of all tensors of both models, names ignored, from the one pass if that was asked for them.

    Raises CheckpointUnavailable: NotPlanned if the weights are read in part.
    """
    from checks.pair.fingerprints import NamelessComparison, fingerprints

    taken = None if pair.is_sampled else pair.comparison().fingerprints
    return NamelessComparison(*(taken or (fingerprints(one.checkpoint) for one in (pair.candidate, pair.reference))))


@kept("1")
def clouds(pair: Pair) -> dict[str, CloudOverlap]:
    """Overlap of joint principal components. Raises CheckpointUnavailable."""
    from checks.pair.row_clouds import compare_clouds

    return compare_clouds(*pair.canonical, SEED)


@kept("1")
def elements(pair: Pair) -> dict[str, DistributionDistance]:
    """Distances of the distributions of elements. Raises CheckpointUnavailable."""
    from checks.pair.row_clouds import compare_elements

    return compare_elements(*pair.canonical, SEED)


@kept("1")
def spectra(pair: Pair) -> SpectrumComparison:
    """Spectra of attention products over depth. Raises CheckpointUnavailable."""
    from checks.pair.layer_spectra import compare_layer_spectra

    ours, theirs = pair.canonical
    return compare_layer_spectra((ours, pair.candidate.checkpoint.config), (theirs, pair.reference.checkpoint.config))


@kept("3", depends_on=initial_weights)
def origin(pair: Pair) -> Origin:
    """Initial weights beside both models. Raises CheckpointUnavailable."""
    from checks.pair.origin import origin as compare_origin

    if pair.initial is None:
        raise CheckpointUnavailable("the claim states no initial weights; add `initial:` to it")
    return compare_origin(
        pair.initial, pair.candidate.checkpoint, pair.reference.checkpoint, pair.candidate.open_other, pair.device
    )
