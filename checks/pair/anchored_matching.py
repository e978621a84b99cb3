"""T2 without embeddings: the neurons of both models answer each other, and are matched twice by their answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from checks.checkpoint.canonical import MlpPlace
from checks.pair.mlp_pairs import MlpPairing, pair_mlps
from checks.pair.mlp_samples import MlpSamples

if TYPE_CHECKING:
    from torch import Tensor

    from checks.statistics.anchored import AnchoredMatchings
    from checks.statistics.block_matching import MatchingTest
    from checks.statistics.neuron_signature import Neurons


def match_by_anchors(
    candidate: MlpSamples, reference: MlpSamples, pairing: MlpPairing | None = None, seed: int = 0
) -> MatchingTest:
    """Anchored double matching of two models: no common tokens, basis, width, depth or numbering is needed.

    Layers and experts are paired by signature (`pair_mlps`), and neurons are probes for each other
    (`anchored_matchings`). Nothing but the MLPs is read. Raises CheckpointUnavailable.
    """
    from checks.statistics.anchored import anchored_matchings
    from checks.statistics.block_matching import BlockPair, MatchingNull, MatchingTest, why_abstain

    pairing = pair_mlps(candidate, reference) if pairing is None else pairing
    ours, theirs = (_Blocks(side) for side in (candidate, reference))
    mapped = [(ours.number(one), theirs.number(other)) for one, other in pairing.mapped]
    mismatched = [(ours.number(one), theirs.number(other)) for one, other in pairing.mismatched]
    result = anchored_matchings(
        ours.neurons, theirs.neurons, mapped, mismatched, (ours.signatures, theirs.signatures), seed
    )
    blocks = tuple(
        BlockPair((one.layer, one.expert), (other.layer, other.expert), matching)
        for (one, other), matching in zip(pairing.mapped, result.mapped, strict=True)
    )
    null = MatchingNull(result.mismatched)
    layer_map = dict(pairing.layer_map)
    reason = why_abstain(blocks, null, layer_map)
    return MatchingTest(blocks, null, pairing.searched, layer_map, result.anchors, seed, reason, _seen(result, seed))


def _seen(result: AnchoredMatchings, seed: int) -> dict[str, float | str]:
    """Which change of basis and numbering the anchors show; only worth reading where the test found dependence."""
    from checks.statistics.alignment import seen_transform

    if result.directions is None or len(result.directions[0]) < 8:
        return {}
    transform = seen_transform(*result.directions, seed)
    detail: dict[str, float | str] = {"basis": transform.kind, "basis_cosine": transform.cosine}
    if result.same_number is not None:
        detail["same_number"] = result.same_number
    return detail


class _Blocks:
    """The MLPs of one model that take part, numbered."""

    def __init__(self, samples: MlpSamples) -> None:
        self._samples = samples
        self._numbers: dict[MlpPlace, int] = {}
        self.neurons: list[Neurons] = []
        self.signatures: list[Tensor] = []

    def number(self, place: MlpPlace) -> int:
        """The number of an MLP, which is read when it first gets one."""
        if place not in self._numbers:
            self._numbers[place] = len(self.neurons)
            self.neurons.append(self._samples.neurons(place))
            self.signatures.append(self._samples.signature(place))
        return self._numbers[place]
