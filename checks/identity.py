"""Equal tensors: a copy is a copy, whatever it is called."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from checks.checkpoint.pair import Pair
    from checks.evidence.judge import Judge


def sha256(pair: Pair, judge: Judge) -> None:
    """Does the candidate hold a tensor of the reference, bit for bit?

    Null hypothesis: independent training; equal bytes in a trained tensor have no chance.
    Statistic: number of the candidate's tensors whose SHA-256 and dtype equal those of any tensor of the reference,
    names and shapes ignored. Tensors that any model could have (constants, masks, rotary tables, fixed transforms) are
    recognised by their content, listed, and do not count.
    Documented: weight-analysis.md, "Weight Tensor 해시 비교".
    Blind to: any change of a byte: one training step, a cast, a permutation. A count of zero proves nothing.
    """
    comparison = pair.elementwise()
    judge(
        len(comparison.identical),
        read=pair.read(),
        tensors=[ours if ours == theirs else f"{ours} = {theirs}" for ours, theirs in comparison.identical],
        candidate_tensors=len(comparison.candidate.tensors),
        ordinary=comparison.ordinary,
    )
