"""`Judge` knows a case's threshold: it records the evidence and tells pytest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

from checks.evidence.decisions import (
    Decision,
    Score,
    corrected_critical_z,
    decide_by_bands,
    decide_calibrated,
    decide_matching,
    decide_scores,
)
from checks.evidence.record import CONTRADICTS, DISCLOSED, INCONCLUSIVE, NOT_APPLICABLE, SUPPORTS, Evidence
from checks.evidence.sampled import decide_summary
from checks.evidence.text import format_value, printable
from checks.evidence.thresholds import Threshold, threshold

if TYPE_CHECKING:
    from checks.pair.comparison import CosineSummary
    from checks.statistics.block_matching import MatchingTest
    from checks.statistics.units import UnitTests

# Blocks that the record of a matching names one by one.
SHOWN_BLOCKS = 200


class ContradictingEvidence(AssertionError):
    """A case's recorded evidence contradicts the claim: the only exception that is a failure and not an error."""


@dataclass(frozen=True)
class JudgeContext:
    """What a judge knows of its case beside the threshold."""

    case_id: str
    claim: str
    place: str  # claims/solar.yaml:7
    reference: str | None
    disclosed: bool
    calibrated_cases: int
    overrides: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


class Judge:
    """Judges one case, once: records its evidence, then passes, fails or skips."""

    def __init__(self, check: str, context: JudgeContext) -> None:
        self.context = context
        self.check = check
        self.threshold = self.threshold_of(check)
        self.evidence: Evidence | None = None

    def threshold_of(self, check: str) -> Threshold:
        """The threshold of a check, with the claim's override."""
        return threshold(check).overridden(self.context.overrides.get(check, {}))

    def decide(self, decide_by: Callable[[Threshold], Decision], check: str | None = None) -> Decision:
        """The decision under this claim's threshold, which may not refute where the suite's own would not."""
        check = check or self.check
        decision = decide_by(self.threshold_of(check))
        if decision.outcome == CONTRADICTS and self.context.overrides.get(check):
            default = decide_by(threshold(check))
            if default.outcome != CONTRADICTS:
                reason = (
                    f"contradicts by the claim's own threshold alone ({decision.reason}; by default {default.reason})"
                )
                return Decision(INCONCLUSIVE, reason, decision.powered, keeps_open=True)
        return decision

    def __call__(
        self,
        value: float | None,
        *,
        null_elements: int | None = None,
        coverage: float | None = None,
        read: Mapping[str, Any] | None = None,
        **details: Any,
    ) -> None:
        """Judge a value by the bands of this check; see `decide_by_bands`. Details go into the record."""
        decision = self.decide(lambda limits: decide_by_bands(limits, value, null_elements, coverage))
        if coverage is not None:
            details["coverage"] = coverage
        self.finish(decision, value, read=read, **details)

    def summary(
        self,
        summary: CosineSummary,
        *,
        strongest_block_counts: bool = True,
        read: Mapping[str, Any] | None = None,
        **details: Any,
    ) -> None:
        """Judge the cosine of a group of tensors; see `decide_summary`."""
        strongest, estimate = summary.strongest, summary.estimate
        if estimate is not None:
            details["estimate"] = estimate.as_evidence()
        self.finish(
            self.decide(lambda limits: decide_summary(limits, summary, strongest_block_counts)),
            summary.cosine,
            read=read,
            raw_cosine=summary.raw_cosine,
            coverage=summary.coverage,
            elements=summary.elements,
            compared_tensors=summary.tensors,
            strongest_tensor=None if strongest is None else {"name": strongest[0], "cosine": strongest[1]},
            **details,
        )

    def calibrated(self, tests: UnitTests, *, read: Mapping[str, Any] | None = None, **details: Any) -> None:
        """Judge calibrated tests at the level of the whole claim; see `decide_calibrated`."""
        cases = self.context.calibrated_cases
        critical = corrected_critical_z(self.threshold, tests.tests, cases)
        joint, single = tests.strongest_joint, tests.strongest_single
        self.finish(
            self.decide(lambda limits: decide_calibrated(limits, tests, cases)),
            joint.z,
            read=read,
            critical_z=critical,
            log_p=joint.log_p,
            effect=joint.effect,
            detectable_effect=max(test.detectable_effect(critical) for test in tests.joint),
            coverage=tests.coverage,
            calibrated_cases=cases,
            tests=tests.tests,
            in_other_places=any(abs(test.z) >= critical for test in tests.mapped),
            strongest_single=None
            if single is None
            else {"name": single[0], "z": single[1].z, "effect": single[1].effect},
            **details,
        )

    def scores(
        self,
        scores: Sequence[Score],
        *,
        tests: int | None = None,
        scale: float | None = None,
        read: Mapping[str, Any] | None = None,
        **details: Any,
    ) -> None:
        """Judge exact tests at the level of the whole claim; see `decide_scores`. The value is the first one's z."""
        cases = self.context.calibrated_cases
        self.finish(
            self.decide(lambda limits: decide_scores(limits, scores, cases, tests, scale)),
            scores[0].z,
            read=read,
            tests={score.name: {"z": score.z, "effect": score.effect} for score in scores},
            calibrated_cases=cases,
            **details,
        )

    def matching(self, test: MatchingTest, *, read: Mapping[str, Any] | None = None, **details: Any) -> None:
        """Judge a double matching at the claim's level; see `decide_matching`. The value is the agreement."""
        cases = self.context.calibrated_cases
        self.finish(
            self.decide(lambda limits: decide_matching(limits, test, cases)),
            test.agreement if test.blocks else None,
            read=read,
            joint_z=test.joint_z,
            mean_z=test.z,
            agreement_score=test.agreement_score,
            neurons=test.units,
            probes=test.probes,
            blocks=[
                {
                    "candidate": block.candidate,
                    "reference": block.reference,
                    "agreement": block.matching.agreement,
                    "z": block.matching.z,
                }
                for block in test.blocks[:SHOWN_BLOCKS]
            ],
            null={
                "blocks": test.null.count,
                "borrowed": test.null.borrowed,
                "largest_agreement": test.null.largest_agreement,
                "mean_z": test.null.mean,
                "sd_z": test.null.sd,
                "maximum_z": test.null.maximum,
            },
            layer_map=test.layer_map,
            searched=test.searched,
            seed=test.seed,
            calibrated_cases=cases,
            **test.detail,
            **details,
        )

    def critical_z(self, check: str, tests: int) -> float:
        """The critical |z| of each of so many tests at the level of another check, corrected for the whole claim."""
        return corrected_critical_z(self.threshold_of(check), tests, self.context.calibrated_cases)

    def not_applicable(self, reason: str, **details: Any) -> NoReturn:
        """The question does not arise for this pair. Never evidence of scratch."""
        self.finish(Decision(NOT_APPLICABLE, reason), None, **details)
        raise AssertionError("unreachable: an outcome that is not applicable skips")

    def inconclusive(self, reason: str, value: float | None = None, **details: Any) -> NoReturn:
        """The question arises and could not be decided."""
        self.finish(Decision(INCONCLUSIVE, reason), value, **details)
        raise AssertionError("unreachable: an inconclusive outcome skips")

    def finish(
        self, decision: Decision, value: float | None, *, read: Mapping[str, Any] | None = None, **details: Any
    ) -> None:
        """Record a decision and tell pytest. A case is judged once; a second time is an error of the check."""
        if self.evidence is not None:
            raise RuntimeError(f"{self.check} judged its case twice; a case has one outcome")
        if decision.outcome == SUPPORTS and (read or {}).get("may_support") is False:
            decision = Decision(INCONCLUSIVE, f"a screening may refute, not support ({decision.reason})")
        outcome = decision.outcome
        if outcome == CONTRADICTS and self.context.disclosed:
            outcome = DISCLOSED
        self.evidence = Evidence(
            check=self.check,
            outcome=outcome,
            reason=decision.reason,
            value=value,
            band=self.threshold.band(value),
            threshold=self.threshold.as_evidence(),
            documented=self.threshold.documented,
            powered=decision.powered,
            keeps_open=decision.keeps_open,
            details=details,
            read=read or {},
        )
        if outcome in (CONTRADICTS, DISCLOSED):
            raise ContradictingEvidence(failure_message(self.evidence, self.context))
        if outcome != SUPPORTS:
            pytest.skip(f"{outcome}: {decision.reason}")


def failure_message(evidence: Evidence, context: JudgeContext) -> str:
    """What a reader of a failed case must know: value, threshold and its source, the reference, the YAML line."""
    lines = [
        f"{context.place}: {context.case_id} contradicts the claim {context.claim!r}",
        f"  {evidence.reason}",
    ]
    if context.reference:
        lines.append(f"  reference:  {context.reference}")
    lines.append(f"  value:      {format_value(evidence.value)} ({threshold(evidence.check).unit})")
    if evidence.band:
        lines.append(f"  reading:    {evidence.band}")
    limits = ", ".join(f"{name} {format_value(limit)}" for name, limit in evidence.threshold.items())
    lines.append(f"  threshold:  {limits}")
    lines.append(f"  documented: {evidence.documented}")
    for name in ("tensors", "note"):
        if evidence.details.get(name):
            lines.append(f"  {name + ':':<11} {_shown(evidence.details[name])}")
    return "\n".join(printable(line) for line in lines)


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(str(one) for one in value[:5]) + (f" and {len(value) - 5} more" if len(value) > 5 else "")
    return str(value)
