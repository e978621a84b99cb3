"""What checks measure of a pair, each as one function of the pair: `pair.once(tables)` measures once and is shared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from checks.checkpoint.errors import CheckpointUnavailable
from checks.pair.pair import Pair
from checks.tokens import shared_tokens, vocabulary_of

if TYPE_CHECKING:
    from checks.pair.aligned import Aligned
    from checks.pair.channel_views import ChannelTests
    from checks.pair.embedding_rows import TableComparison
    from checks.pair.fingerprints import NamelessComparison
    from checks.pair.mlp_samples import MlpSamples
    from checks.pair.origin import Origin
    from checks.statistics.block_matching import MatchingTest
    from checks.statistics.double_matching import DoubleMatching
    from checks.statistics.magnitude import RobustCosine
    from checks.statistics.pca import CloudOverlap
    from checks.statistics.spectrum import SpectrumComparison
    from checks.statistics.wasserstein import DistributionDistance

# Tokens for statistics of rows, per dimension of the narrower model, so that a rotation could be fitted; and at most.
TOKENS_PER_DIMENSION = 4
MOST_TOKENS = 8192
SEED = 0


@dataclass(frozen=True)
class SharedTokens:
    """Ids of tokens that both vocabularies have, in one order; none, with the reason, if a tokenizer is missing."""

    ids: tuple[Sequence[int], Sequence[int]]
    reason: str | None = None

    def __len__(self) -> int:
        return len(self.ids[0])


def tokens(pair: Pair) -> SharedTokens:
    """Tokens that both vocabularies have, by their text; none where a model has no tokenizer."""
    ours, theirs = (vocabulary_of(model) for model in (pair.candidate, pair.reference))
    if ours is None or theirs is None:
        missing = [model.name for model, one in ((pair.candidate, ours), (pair.reference, theirs)) if one is None]
        return SharedTokens(((), ()), f"no tokenizer of {' and '.join(missing)}")
    width = min(model.hidden_size for model in pair.canonical)
    found = shared_tokens(ours, theirs, min(MOST_TOKENS, max(2048, TOKENS_PER_DIMENSION * width)), SEED)
    rows = [_rows(pair, side) for side in (0, 1)]
    kept = [ids for ids in zip(*found, strict=True) if ids[0] < rows[0] and ids[1] < rows[1]]
    return SharedTokens(([one for one, _ in kept], [other for _, other in kept]))


def _rows(pair: Pair, side: int) -> int:
    """Rows of the embedding; a tokenizer may know more tokens than the checkpoint has rows for."""
    model = (pair.candidate, pair.reference)[side]
    tables = [
        entry.shape[0]
        for entry in model.checkpoint.tensors.values()
        if entry.role.category in ("embedding", "output") and len(entry.shape) == 2 and entry.role.layer is None
    ]
    return min(tables, default=0)


def tables(pair: Pair) -> tuple[TableComparison, ...]:
    """Embedding and head on shared tokens. Raises CheckpointUnavailable."""
    from checks.pair.embedding_rows import compare_tables

    return compare_tables(*pair.canonical, pair.once(tokens).ids, SEED)


def channels(pair: Pair) -> ChannelTests | None:
    """The permutation test of residual channels; None for other widths. Raises CheckpointUnavailable."""
    from checks.pair.channel_views import channel_tests

    ids = pair.once(tokens).ids
    return channel_tests(*pair.canonical, ids if len(ids[0]) else None, seed=SEED)


def samples(pair: Pair) -> tuple[MlpSamples, MlpSamples]:
    """Sampled MLPs of both models."""
    from checks.pair.mlp_samples import sample_mlps

    return sample_mlps(*pair.canonical)


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


def matching_by_anchors(pair: Pair) -> MatchingTest:
    """Anchored double matching: neither tokens nor a basis in common are needed. Raises CheckpointUnavailable."""
    from checks.pair.anchored_matching import match_by_anchors

    ours, theirs = pair.once(samples)
    test = match_by_anchors(ours, theirs, seed=SEED)
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


def alignment(pair: Pair) -> Aligned | None:
    """Procrustes alignment and unbiased CKA of mapped layers. Raises CheckpointUnavailable."""
    from checks.pair.aligned import align

    ids = pair.once(tokens).ids
    layer_map = pair.once(matching_by_anchors).layer_map
    return align(*pair.canonical, ids, layer_map, SEED)


def nameless(pair: Pair) -> NamelessComparison:
    """Sketches and samples of all tensors of both models, names ignored. Raises CheckpointUnavailable."""
    from checks.pair.fingerprints import NamelessComparison, fingerprints

    return NamelessComparison(*(fingerprints(one.checkpoint, SEED) for one in (pair.candidate, pair.reference)))


def robust(pair: Pair) -> dict[str, RobustCosine]:
    """Rank and winsorised correlations of tensors that both have. Raises CheckpointUnavailable."""
    from checks.pair.robust_cosines import robust_cosines

    return robust_cosines(pair.candidate.checkpoint, pair.reference.checkpoint, SEED)


def clouds(pair: Pair) -> dict[str, CloudOverlap]:
    """Overlap of joint principal components. Raises CheckpointUnavailable."""
    from checks.pair.row_clouds import compare_clouds

    return compare_clouds(*pair.canonical, SEED)


def elements(pair: Pair) -> dict[str, DistributionDistance]:
    """Distances of the distributions of elements. Raises CheckpointUnavailable."""
    from checks.pair.row_clouds import compare_elements

    return compare_elements(*pair.canonical, SEED)


def spectra(pair: Pair) -> SpectrumComparison:
    """Spectra of attention products over depth. Raises CheckpointUnavailable."""
    from checks.pair.layer_spectra import compare_layer_spectra

    ours, theirs = pair.canonical
    return compare_layer_spectra((ours, pair.candidate.checkpoint.config), (theirs, pair.reference.checkpoint.config))


def origin(pair: Pair) -> Origin:
    """Initial weights beside both models. Raises CheckpointUnavailable."""
    from checks.pair.origin import origin as compare_origin

    if pair.initial is None:
        raise CheckpointUnavailable("the claim states no initial weights; add `initial:` to it")
    return compare_origin(
        pair.initial, pair.candidate.checkpoint, pair.reference.checkpoint, pair.candidate.open_other, pair.device
    )
