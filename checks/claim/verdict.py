"""From the outcomes of all cases to a verdict, per component and per claim. Pure: no pytest, no files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from checks.catalog import entry as catalog
from checks.catalog.entry import CatalogEntry
from checks.claim.cases import Case, selected_checks
from checks.claim.model import Claim, Component, ModelSource
from checks.evidence.record import (
    CONTRADICTS,
    DISCLOSED,
    ERROR,
    INCONCLUSIVE,
    NOT_APPLICABLE,
    SUPPORTS,
    UNAVAILABLE,
    Evidence,
)
from checks.evidence.thresholds import threshold, thresholds

REFUTED = "REFUTED"
SUPPORTED = "SUPPORTED"
REUSE_DISCLOSED = "DISCLOSED"
OPEN = "INCONCLUSIVE"
PARTIAL = "PARTIAL"

EXIT_SUPPORTED = 0
EXIT_REFUTED = 1
EXIT_OPEN = 10
EXIT_ERRORS = 11

# Families whose findings a start in common explains; a suspicion is confirmed by nothing but these weights.
EXPLAINED = frozenset({"architecture", "tokenizer", "identity", "similarity", "independence", "embedding"})

# Checks that a twin from the same initial weights passes and a copy does not (setting half of the lineage zoo).
BEYOND_A_START = frozenset({"identity.mse", "identity.sketch", "independence.neurons", "independence.anchored"})

# A claim that divides its candidate must name nearly all of it.
OUTSIDE_AT_MOST = 0.01

# What a claim rests on must not be undone by any of these.
DISGUISES = frozenset({"permutation", "rotation", "vocabulary"})

LIMITS = (
    "distillation, copied data, tokenizer or architecture, and ancestors outside the panel are not seen in the weights",
    "an ancestor in common that nobody published looks like independence from the panel",
    "a few inherited layers among fresh ones, once renumbered or rotated, and training so long that neurons no longer "
    "resemble what they were, are not seen either",
    "no test tells the direction of copying",
)


@dataclass(frozen=True)
class CaseResult:
    """A case and what its report said; `evidence` is None when there is no report."""

    case: Case
    evidence: Evidence | None

    @property
    def outcome(self) -> str | None:
        """The outcome of the case; None without a report."""
        return self.evidence.outcome if self.evidence else None

    @property
    def strength(self) -> str:
        """Decisive, supporting or suspicion."""
        return threshold(self.case.check).strength

    @property
    def is_decisive(self) -> bool:
        """May this case refute?"""
        return self.strength == "decisive"


@dataclass(frozen=True)
class ComponentVerdict:
    """What all evidence says of one component."""

    component: Component
    verdict: str
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    """What all evidence says of one claim."""

    claim: Claim
    verdict: str
    text: str
    components: tuple[ComponentVerdict, ...]
    results: tuple[CaseResult, ...]
    limits: tuple[str, ...] = ()
    exit_status: int = EXIT_OPEN
    counts: dict[str, int] = field(default_factory=dict)


def decide(claim: Claim, results: Sequence[CaseResult]) -> Verdict:
    """The verdict on a claim.

    `results` holds one entry for every case of the claim's own expansion, so that a case without a report is seen. A
    refutation stands whatever else is missing; otherwise a missing report leaves the claim partial.
    """
    components = tuple(
        _decide_component(claim, component, [one for one in results if one.case.component == component.name])
        for component in claim.components
    )
    verdict, text = _combine(claim, components, results)
    counts: dict[str, int] = {}
    for one in results:
        counts[one.outcome or "no report"] = counts.get(one.outcome or "no report", 0) + 1
    return Verdict(
        claim,
        verdict,
        text,
        components,
        tuple(results),
        LIMITS,
        _exit_status(verdict, results),
        dict(sorted(counts.items())),
    )


def overall_exit_status(verdicts: Iterable[Verdict]) -> int:
    """The exit status of a run: a refutation first, then errors, then open claims."""
    statuses = {verdict.exit_status for verdict in verdicts}
    return next(
        (status for status in (EXIT_REFUTED, EXIT_ERRORS, EXIT_OPEN) if status in statuses),
        EXIT_SUPPORTED,
    )


# One component


def _decide_component(claim: Claim, component: Component, results: list[CaseResult]) -> ComponentVerdict:
    by_start = _may_have_a_start_in_common(results)
    refuting = [one for one in results if one.is_decisive and one.outcome == CONTRADICTS and not by_start(one)]
    if refuting:
        return ComponentVerdict(component, REFUTED, tuple(_refutations(claim, component, refuting)))
    unreported = [one.case.id for one in results if one.outcome is None]
    if unreported:
        return ComponentVerdict(component, PARTIAL, (f"no report of {_listed(unreported)}",))
    found = sorted({str(one.case.reference) for one in results if one.is_decisive and one.outcome == DISCLOSED})
    # Where disclosed reuse was found, its references need no clearing; every other one does.
    excused = component.disclosed if found else frozenset()
    unexplained = [one for one in results if not by_start(one) or _is_beyond_a_start(one)]
    counted = [one for one in unexplained if one.case.reference not in excused]
    missing = _what_is_missing(claim, component, counted, excused)
    if missing:
        return ComponentVerdict(component, OPEN, tuple(missing))
    if found:
        return ComponentVerdict(component, REUSE_DISCLOSED, (f"disclosed and found: weights of {', '.join(found)}",))
    return ComponentVerdict(component, SUPPORTED, ())


def _may_have_a_start_in_common(results: list[CaseResult]) -> Callable[[CaseResult], bool]:
    """Which results may stem from initial weights that were made again from generator and seed?

    Those of checks of weights, but not equal bytes, against references for which `initialization.origin` passed: there
    both began at these weights, and no part of the candidate shares much beyond them.
    """
    proven = _proven(results)
    return lambda one: (
        one.case.reference in proven
        and one.case.check != "identity.sha256"
        and one.case.check.partition(".")[0] in EXPLAINED
        and one.outcome in (CONTRADICTS, INCONCLUSIVE)
    )


def _is_beyond_a_start(one: CaseResult) -> bool:
    """Does this contradict where a twin that trained long enough passes? It then neither refutes nor clears."""
    in_other_places = one.evidence is not None and one.evidence.details.get("in_other_places", False)
    return one.outcome == CONTRADICTS and (one.case.check in BEYOND_A_START or bool(in_other_places))


def _proven(results: list[CaseResult]) -> set[str | None]:
    """References for which `initialization.origin` passed."""
    return {
        one.case.reference for one in results if one.case.check == "initialization.origin" and one.outcome == SUPPORTS
    }


def _refutations(claim: Claim, component: Component, refuting: list[CaseResult]) -> list[str]:
    """One sentence per reference: what is shared, by which checks, and whether the direction is possible."""
    sentences = []
    for reference in component.panel:
        found = [one for one in refuting if one.case.reference == reference.source.name]
        if not found:
            continue
        only_shared_seed = all(threshold(one.case.check).shared_seed_trips for one in found)
        what = "inherited or same initial weights:" if only_shared_seed else "shares weights with"
        readings = dict.fromkeys(
            one.evidence.band for one in found if one.evidence and one.evidence.band and one.case.layer is None
        )
        seen = f" ({'; '.join(readings)})" if readings else ""
        checks = ", ".join(dict.fromkeys(one.case.check for one in found))
        direction = direction_of_copying(claim.model, reference.source)
        sentences.append(f"{what} {reference.source.name}{seen}, by {checks}{'; ' + direction if direction else ''}")
    return sentences


def direction_of_copying(candidate: ModelSource, reference: ModelSource) -> str:
    """What developer and release date say of the direction: possible, impossible, or the developer's own model."""
    if candidate.catalog_key is None or reference.catalog_key is None:
        return ""
    ours, theirs = catalog.load(candidate.catalog_key), catalog.load(reference.catalog_key)
    own = "a model of the same developer" if ours.developer and ours.developer == theirs.developer else ""
    if not ours.released or not theirs.released:
        return own
    digits = min(len(ours.released), len(theirs.released))
    before, after = theirs.released[:digits], ours.released[:digits]
    dates = f"{_dated(theirs)}; the candidate {_dated(ours)}"
    if before > after:
        order = f"published later ({dates})"
    elif before < after:
        order = f"published earlier ({dates})"
    else:
        order = f"published at about the same time ({dates})"
    return f"{own}, {order}" if own else order


def _dated(entry: CatalogEntry) -> str:
    """The date of publication, with a word when no primary source was found for it."""
    figure = entry.figures.get("released")
    return f"{entry.released}, unverified" if figure is not None and figure.unverified else entry.released


def _what_is_missing(
    claim: Claim, component: Component, results: list[CaseResult], excused: frozenset[str]
) -> list[str]:
    """Everything that stands between this component and SUPPORTED, apart from the reuse that was disclosed."""
    missing = []
    proven = _proven(results)
    for label, outcome in (("contradicted by", CONTRADICTS), ("errors in", ERROR)):
        names = [one.case.id for one in results if one.outcome == outcome]
        if names:
            missing.append(f"{label} {_listed(names)}")
    kept_open = [one.case.id for one in results if _keeps_open(one) and not (excused and _asks_where_from(one))]
    if kept_open:
        missing.append(f"left open by {_listed(kept_open)}")
    # A comparison whose weights are unavailable is named once, not once for each of its checks.
    unavailable = sorted({str(one.case.reference) for one in results if one.outcome == UNAVAILABLE})
    if unavailable:
        missing.append(f"weights could not be had for the comparison with {', '.join(unavailable)}")
    for reference in component.panel:
        name = reference.source.name
        if name in unavailable or name in excused or name in proven:
            continue
        passed = [one for one in results if one.case.reference == name and _carries_support(one)]
        if not passed:
            missing.append(f"no decisive check with power passed against {name}")
        elif not any(_is_robust(one.case.check) for one in passed):
            missing.append(f"no check that withstands permutation, rotation and a new vocabulary passed against {name}")
    if any(one.evidence is not None and one.evidence.read.get("may_support") is False for one in results):
        missing.append("read only in part: a screening may refute, not support; choose --read sample or --read full")
    outside = max((_of_candidate(one, "outside_components") for one in results), default=0.0)
    if outside > OUTSIDE_AT_MOST:
        missing.append(f"{outside:.1%} of the candidate's weights belong to no component of the claim")
    left_out = [
        check for check in thresholds() if threshold(check).strength == "decisive" and not _is_run(check, claim)
    ]
    if left_out:
        missing.append(f"the claim leaves out the decisive {_listed(left_out)}")
    loosened = sorted(
        f"{check}.{name}"
        for check, override in claim.overrides.items()
        for name in threshold(check).loosened_by(override.values)
    )
    if loosened:
        missing.append(f"the claim loosens {', '.join(loosened)}")
    return missing


def _keeps_open(one: CaseResult) -> bool:
    """Is this inconclusive in a way that no other check's pass excuses?"""
    weighs = one.is_decisive or _asks_where_from(one)
    return weighs and one.evidence is not None and one.evidence.keeps_open


def _asks_where_from(one: CaseResult) -> bool:
    """Is this about copies inside the candidate, which a disclosed source that was found explains?"""
    return one.case.check.partition(".")[0] == "structure"


def _of_candidate(one: CaseResult, name: str) -> float:
    """A number that the record of a case has of the candidate's checkpoint; 0 without one."""
    read = one.evidence.read if one.evidence else {}
    return float(read.get("candidate", {}).get(name, 0.0))


def _carries_support(one: CaseResult) -> bool:
    """Did a decisive check that SUPPORTED may rest on pass with power?"""
    powered = one.evidence is not None and one.evidence.powered
    return one.outcome == SUPPORTS and one.is_decisive and powered and threshold(one.case.check).carries_support


def _is_run(check: str, claim: Claim) -> bool:
    return any(one.id == check for one in selected_checks(claim))


def _is_robust(check: str) -> bool:
    return set(threshold(check).withstands) >= DISGUISES


# The whole claim


def _combine(claim: Claim, components: tuple[ComponentVerdict, ...], results: Sequence[CaseResult]) -> tuple[str, str]:
    by_verdict: dict[str, list[ComponentVerdict]] = {}
    for one in components:
        by_verdict.setdefault(one.verdict, []).append(one)
    if REFUTED in by_verdict:
        return REFUTED, _reasons(claim, by_verdict[REFUTED])
    if PARTIAL in by_verdict:
        return PARTIAL, _reasons(claim, by_verdict[PARTIAL])
    if OPEN in by_verdict:
        return OPEN, _reasons(claim, by_verdict[OPEN])
    if REUSE_DISCLOSED in by_verdict:
        reused = by_verdict[REUSE_DISCLOSED]
        sizes = {
            name: max((_of_candidate(one, "elements") for one in results if one.case.component == name), default=0.0)
            for name in (one.component.name for one in components)
        }
        # The text decoder, whatever the claim calls it: the component with the most weights.
        largest = max(sizes.values())
        text_is_reused = any(
            one.component.name in (None, "text", "model") or 0 < sizes[one.component.name] == largest for one in reused
        )
        if SUPPORTED not in by_verdict or text_is_reused:
            return REUSE_DISCLOSED, _reasons(claim, reused)
        excepted = ", ".join(one.component.label for one in reused)
        return SUPPORTED, f"except {excepted}: {_supported_text(by_verdict[SUPPORTED])}; {_reasons(claim, reused)}"
    return SUPPORTED, _supported_text(by_verdict[SUPPORTED])


def _supported_text(components: list[ComponentVerdict]) -> str:
    references = len({reference.source.name for one in components for reference in one.component.panel})
    if references == 1:
        return "no evidence of inherited weights from the one reference below"
    return f"no evidence of inherited weights from any of the {references} references below"


def _reasons(claim: Claim, components: list[ComponentVerdict]) -> str:
    divided = len(claim.components) > 1
    return "; ".join(
        f"{one.component.label}: {reason}" if divided else reason for one in components for reason in one.reasons
    )


def _exit_status(verdict: str, results: Sequence[CaseResult]) -> int:
    outcomes = {one.outcome for one in results}
    if verdict == REFUTED:
        return EXIT_REFUTED
    if ERROR in outcomes:
        return EXIT_ERRORS
    if verdict == SUPPORTED:
        return EXIT_SUPPORTED
    if verdict == PARTIAL:
        passed = any(_carries_support(one) for one in results)
        clean = outcomes <= {SUPPORTS, NOT_APPLICABLE, None}
        return EXIT_SUPPORTED if passed and clean else EXIT_OPEN
    return EXIT_OPEN


def _listed(names: list[str], shown: int = 5) -> str:
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


OPEN_OUTCOMES = (INCONCLUSIVE, NOT_APPLICABLE, UNAVAILABLE, ERROR)
