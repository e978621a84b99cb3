"""T2: the neurons of both models answer the same tokens, or the same text, and are matched twice by their answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from checks.checkpoint.canonical import CanonicalModel, MlpPlace
from checks.checkpoint.errors import CheckpointUnavailable
from checks.pair.mlp_pairs import MlpPairing, pair_mlps
from checks.pair.mlp_samples import MlpSamples

if TYPE_CHECKING:
    from torch import Tensor

    from checks.pair.forward_probes import ForwardProbes
    from checks.statistics.block_matching import MatchingTest
    from checks.statistics.double_matching import DoubleMatching

    # Probes [p, d] of a layer.
    Probes = Callable[[int], Tensor]

# Tokens that serve as probes, and how many at least are needed.
PROBES = 1024
LEAST_PROBES = 512
# Neurons of an MLP that look for a partner when the layer map is sought.
SEARCH_ROWS = 128
# How a record names the probes.
BY_TOKENS = "embeddings of shared tokens"
BY_TEXT = "what enters the MLPs on common text"


def token_probes(
    candidate: CanonicalModel, reference: CanonicalModel, ids: tuple[Sequence[int], Sequence[int]]
) -> tuple[Tensor, Tensor]:
    """Embeddings of shared tokens at root mean square 1, in each model's own basis: [p, d_a] and [p, d_b].

    Tokens whose row is zero in either model are left out. Raises CheckpointUnavailable for non-finite rows, ValueError
    for lists of different lengths.
    """
    import torch

    if len(ids[0]) != len(ids[1]):
        raise ValueError(f"{len(ids[0])} and {len(ids[1])} ids; need those of the same tokens")
    tables = [
        model.embedding(torch.tensor(list(side))) for model, side in zip((candidate, reference), ids, strict=True)
    ]
    for table in tables:
        if not bool(table.isfinite().all()):
            raise CheckpointUnavailable("the embedding holds non-finite values; fetch the checkpoint again")
    sizes = [table.square().mean(1, keepdim=True).sqrt() for table in tables]
    used = ((sizes[0] > 0) & (sizes[1] > 0))[:, 0]
    ours, theirs = ((table / size)[used] for table, size in zip(tables, sizes, strict=True))
    return ours, theirs


def match_by_tokens(
    candidate: MlpSamples, reference: MlpSamples, ids: tuple[Sequence[int], Sequence[int]], seed: int = 0
) -> MatchingTest:
    """Double matching (T2) with embeddings of shared tokens as probes; `ids` in both vocabularies, in one order.

    Every probe is scaled to root mean square 1 and meets readers with the gains of their norm folded in, as the first
    layer would see it; deeper layers see more than embeddings, and still know their neurons by them.
    With fewer than 512 tokens the result abstains: `match_by_text` needs none in common.
    Blind to: embeddings that were replaced. Raises CheckpointUnavailable, ValueError as `token_probes`.
    """
    ours, theirs = token_probes(candidate.model, reference.model, (list(ids[0])[:PROBES], list(ids[1])[:PROBES]))
    if len(ours) < LEAST_PROBES:
        reason = f"{len(ours)} tokens are shared, {LEAST_PROBES} are needed"
        return replace(no_matching(reason, BY_TOKENS, seed), probes=len(ours))
    return _named(match_by_probes(candidate, reference, lambda _: ours, lambda _: theirs, seed), BY_TOKENS)


def match_by_text(candidate: MlpSamples, reference: MlpSamples, probes: ForwardProbes, seed: int = 0) -> MatchingTest:
    """Double matching (T2) with what enters the MLPs of both models at the same places of common text as probes.

    No token needs to be shared, and each layer meets what it meets in use.
    Measured on the setting half of the lineage zoo: 46 of 54 derived pairs are found; of 245 independent ones at most
    10 % of a block and 2.7 % of all neurons agree, 7 % of a mismatched block, and z of their blocks has mean -0.03 and
    standard deviation 0.97.
    Blind to: embeddings that were drawn anew, even where all else is kept as it is while they are trained. They come to
    say the same in other directions, to which neurons of hardly changed weights answer otherwise (`match_by_anchors`
    finds these). Layers among fresh ones.
    Raises CheckpointUnavailable.
    """
    test = match_by_probes(
        candidate, reference, lambda layer: probes.candidate[layer], lambda layer: probes.reference[layer], seed
    )
    return replace(test, detail={**test.detail, "answers_to": BY_TEXT, "text_sha256": probes.text_sha256})


def shows_origin(test: MatchingTest) -> bool:
    """Do enough neurons agree, of a block or of all, that a finding is possible at all?"""
    from checks.statistics.block_matching import LEAST_AGREEMENT, LEAST_JOINT_AGREEMENT

    return test.agreement >= LEAST_JOINT_AGREEMENT or any(
        block.matching.agreement >= LEAST_AGREEMENT for block in test.blocks
    )


def either_probes(by_tokens: MatchingTest, by_text: Callable[[], MatchingTest]) -> MatchingTest:
    """The matching by tokens; by common text, where that has too few tokens or finds nothing and the text does.

    Two tests of one question: each counts for two in a correction, unless there are no tokens to begin with.
    `by_text` is asked only if the tokens show nothing; the detail of the result says what the other one found.
    """
    both = replace(by_tokens, searched=2 * by_tokens.tests)
    if by_tokens.abstains_because is None and shows_origin(by_tokens):
        return both
    other = by_text()
    if other.abstains_because is not None:
        reason = by_tokens.abstains_because
        return replace(
            by_tokens,
            abstains_because=None if reason is None else f"{reason}; on common text: {other.abstains_because}",
            detail={**by_tokens.detail, "common_text": other.abstains_because},
        )
    if by_tokens.abstains_because is not None:
        return replace(other, detail={**other.detail, "shared_tokens": by_tokens.abstains_because})
    if shows_origin(other):
        twice = replace(other, searched=2 * other.tests)
        return replace(twice, detail={**twice.detail, "shared_tokens": _figures(by_tokens)})
    return replace(both, detail={**both.detail, "common_text": _figures(other)})


def no_matching(reason: str, answers_to: str, seed: int = 0) -> MatchingTest:
    """A test without blocks that says why there are none."""
    from checks.statistics.block_matching import MatchingNull, MatchingTest

    return MatchingTest((), MatchingNull(()), 1, {}, 0, seed, reason, {"answers_to": answers_to})


def _named(test: MatchingTest, answers_to: str) -> MatchingTest:
    return replace(test, detail={**test.detail, "answers_to": answers_to})


def _figures(test: MatchingTest) -> str:
    largest = max((block.matching.agreement for block in test.blocks), default=0.0)
    return (
        f"{test.agreement:.1%} of the neurons agree, {largest:.1%} of a block and "
        f"{test.null.largest_agreement:.1%} of a mismatched one; {test.probes} probes"
    )


def match_by_probes(
    candidate: MlpSamples, reference: MlpSamples, probes_a: Probes, probes_b: Probes, seed: int = 0
) -> MatchingTest:
    """Double matching (T2) with probes [p, d] for each layer, paired row by row.

    Probes are what enters the norm before an MLP, divided by its root mean square. The gate's and the up projection's
    answers are centred for each neuron; without a gate what a neuron reads and what it writes are compared.
    The layer map of dense models is found by the statistic itself, on 128 neurons of each MLP, and every pair of layers
    counts as a test; where layers have several MLPs, map and pairs are found by signature.
    Raises CheckpointUnavailable.
    """
    from checks.statistics.block_matching import BlockPair, MatchingNull, MatchingTest, why_abstain

    answers_a, answers_b = _Answers(candidate, probes_a), _Answers(reference, probes_b)
    pairing, searched = _paired(candidate, reference, answers_a, answers_b, seed)
    blocks = tuple(
        BlockPair((one.layer, one.expert), (other.layer, other.expert), _match(answers_a, one, answers_b, other, seed))
        for one, other in pairing.mapped
    )
    null = MatchingNull(tuple(_match(answers_a, one, answers_b, other, seed) for one, other in pairing.mismatched))
    probes = len(probes_a(next(iter(candidate.places)))) if candidate.places else 0
    layer_map = dict(pairing.layer_map)
    reason = why_abstain(blocks, null, layer_map)
    return MatchingTest(blocks, null, searched, layer_map, probes, seed, reason)


class _Answers:
    """Answers of a model's neurons to the probes, kept."""

    def __init__(self, samples: MlpSamples, probes: Probes) -> None:
        self.samples = samples
        self._probes = probes
        self._kept: dict[MlpPlace, tuple[Tensor, Tensor, bool]] = {}

    def views(self, place: MlpPlace) -> tuple[Tensor, Tensor, bool]:
        """Answers [h, p] of gate and up projection, or of reading and writing, centred and of norm 1; and whether the
        second one's sign has a meaning."""
        from checks.statistics.double_matching import centred_unit_rows

        if place not in self._kept:
            neurons = self.samples.neurons(place)
            probes = self._probes(place.layer).to(neurons.fixed.device)
            answers = [view @ probes.T for view in (neurons.fixed, neurons.others[0])]
            first, second = (centred_unit_rows(one) for one in answers)
            self._kept[place] = first, second, not neurons.sign_free
        return self._kept[place]


def _match(
    a: _Answers, one: MlpPlace, b: _Answers, other: MlpPlace, seed: int, rows: int | None = None
) -> DoubleMatching:
    from checks.statistics.double_matching import double_matching

    (first_a, second_a, has_sign), (first_b, second_b, _) = a.views(one), b.views(other)
    if rows is not None:
        # Rows are in the order of their numbers, which means nothing; of the smaller side.
        if len(first_a) <= len(first_b):
            first_a, second_a = first_a[:rows], second_a[:rows]
        else:
            first_b, second_b = first_b[:rows], second_b[:rows]
    return double_matching(first_a @ first_b.T, second_a @ second_b.T, True, has_sign, seed)


def _paired(
    candidate: MlpSamples, reference: MlpSamples, a: _Answers, b: _Answers, seed: int
) -> tuple[MlpPairing, int]:
    """Pairs of MLPs, and how many pairs the statistic itself chose among."""
    import torch

    from checks.statistics.layer_map import layer_map

    if not (candidate.places and reference.places and candidate.is_dense and reference.is_dense):
        pairing = pair_mlps(candidate, reference)
        return pairing, pairing.searched
    counts = [
        [_match(a, ours[0], b, theirs[0], seed, SEARCH_ROWS).agreements for theirs in reference.places.values()]
        for ours in candidate.places.values()
    ]
    numbers = list(reference.places)
    # Square roots of counts vary alike whatever their mean.
    path = layer_map(torch.tensor(counts, dtype=torch.float64).sqrt())
    found: Mapping[int, int] = {one: numbers[place] for one, place in zip(candidate.places, path, strict=True)}
    return pair_mlps(candidate, reference, found), len(candidate.places) * len(reference.places)
