"""A claim's candidate and references as models that can be asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from checks.checkpoint.model import Model
from checks.claim.behavior import Behavior
from checks.generation.asking import Respondents, candidate_model, respondents
from checks.generation.text_model import TextModel
from checks.pair.candidate import Candidate


@dataclass(frozen=True)
class AskedClaim:
    """A candidate with what asking needs of its claim."""

    name: str
    behavior: Behavior
    references: tuple[Model, ...]
    disclosed: frozenset[str]
    device: Callable[[], str]
    offline: bool

    def open_candidate(self) -> TextModel:
        """What answers for the candidate."""
        return candidate_model(self.behavior, self.name, self.device, self.offline)

    def respondents(self) -> Respondents:
        """What answers for the references."""
        return respondents(self.behavior, self.references, self.device, self.offline)

    def related(self) -> set[frozenset[str]]:
        """Pairs of references that the catalogue calls derived from each other, or from the same third.

        Neither can show how unrelated models agree with the other's descendants.
        """
        ancestry = {}
        for reference in self.references:
            entry = reference.catalog_entry
            if entry is not None:
                ancestry[reference.name] = {entry.key, *entry.derived_from}
        return {
            frozenset((one, other))
            for one in ancestry
            for other in ancestry
            if one != other and ancestry[one] & ancestry[other]
        }


def asked_claim(candidate: Candidate) -> AskedClaim | None:
    """What asking needs; None where the claim does not say where the candidate answers."""
    behavior = candidate.behavior
    if behavior is None or not behavior.can_be_asked:
        return None
    return AskedClaim(
        candidate.name, behavior, candidate.references, candidate.disclosed, candidate.device, candidate.offline
    )
