"""Could the stated hardware have done the stated training? Feasibility, which is not proof of scratch.

A training that was continued from other weights takes the same arithmetic per token, so that a plausible figure says
nothing about where the weights came from. An impossible one says that the statement is wrong somewhere.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from checks.applicable import require_text_decoder
from checks.catalog.accelerators import Accelerator, accelerator_called, precisions_in, published_utilisations
from checks.evidence.decisions import decide_by_bands
from checks.evidence.record import SUPPORTS
from checks.statistics.compute import (
    SECONDS_PER_HOUR,
    accelerator_hours,
    attention_flops,
    mean_context,
    parameter_flops,
    share_of_compute_optimal,
    tokens_per_parameter,
    utilisation,
)

if TYPE_CHECKING:
    from checks.catalog.architecture import Architecture
    from checks.catalog.entry import Figure
    from checks.evidence.judge import Judge
    from checks.pair.candidate import Candidate

NOT_PROOF = "feasible, which is not proof: a continued training takes the same arithmetic"


@dataclass(frozen=True)
class Stated:
    """One figure with who says so."""

    value: float
    source: str

    def as_record(self) -> dict[str, Any]:
        return {"value": self.value, "source": self.source}


def flops(candidate: Candidate, judge: Judge) -> None:
    """Which share of the hardware's peak would the stated training have taken?

    Null hypothesis: none; this asks whether the statement can be true, and a yes is not proof.
    Statistic: (6·N_active·D, and attention where the sequence length is known) over accelerator hours times the dense
    peak of the fastest stated precision; of several stated token counts or times the largest result. A share of 1.
    Documented: tutorial-qa.md, Q1, "Compute 추정"; bounds of this suite: published utilisations (accelerators.yaml).
    Known false positives: a rounded or partial token count, hours of one phase only. Conflicting figures are all shown.
    Attention is not counted, and the reason says so, where nobody states the sequence length: it adds to the result.
    Blind to: where the weights came from. Days derived from a throughput only test that throughput.
    """
    stated = _Statement(candidate, judge)
    active, tokens, accelerator = stated.active(), stated.tokens(), stated.accelerator()
    hours = {count: stated.hours(count) for count in tokens}
    missing = [
        name
        for name, found in (
            ("active parameters", active),
            ("tokens", tokens),
            ("accelerator count and days, or hours", any(hours.values()) or (not tokens and stated.stated_hours())),
            ("a known accelerator", accelerator),
        )
        if not found
    ]
    if missing or active is None or accelerator is None:
        judge.not_applicable(f"not stated: {', '.join(missing)}", **stated.record())
    precisions = stated.precisions(accelerator)
    fastest = max(precisions, key=accelerator.peaks.__getitem__)
    rows: list[dict[str, Any]] = []
    for count in tokens:
        operations = parameter_flops(active.value, count.value)
        attention = stated.attention(count.value)
        for time in hours[count]:
            shares = {
                one: utilisation(operations + (attention or 0.0), time.value, accelerator.peaks[one])
                for one in precisions
            }
            rows.append(
                {
                    "tokens": count.as_record(),
                    "accelerator_hours": time.as_record(),
                    "parameter_flops": operations,
                    "attention_flops": attention,
                    "utilisation": shares,
                }
            )
    value = max(row["utilisation"][fastest] for row in rows)
    decision = judge.decide(lambda limits: decide_by_bands(limits, value))
    text = _told(
        [
            (row["tokens"]["value"], row["accelerator_hours"]["value"], f"{row['utilisation'][fastest]:.1%}")
            for row in rows
        ]
    )
    without = ", attention not counted (needs the sequence length and the architecture)"
    without = "" if rows[0]["attention_flops"] else without
    reason = NOT_PROOF if decision.outcome == SUPPORTS else decision.reason
    decision = replace(decision, reason=f"{text} of the {fastest} peak{without}: {reason}")
    judge.finish(
        decision,
        value,
        active_parameters=active.as_record(),
        accelerator={
            "name": accelerator.name,
            "peaks": accelerator.peaks,
            "source": accelerator.source,
            "unverified": accelerator.unverified,
        },
        decided_by=fastest,
        readings=rows,
        published=[{"value": one.value, "what": one.what, "source": one.source} for one in published_utilisations()],
        **stated.record(),
    )


def tokens(candidate: Candidate, judge: Judge) -> None:
    """Is the stated training as long as one from scratch has to be, rather than as a fine-tune?

    Null hypothesis: none; a long training does not prove scratch, and a short one says that the statement is odd.
    Statistic: compute-optimal tokens (20 a parameter) over the stated tokens, per active parameter: 1 or less for a
    training from scratch of ordinary length; of several stated counts the largest result.
    Documented: tutorial-qa.md, Q1: from scratch takes 10 to 100 times the compute of a fine-tune; the bounds follow.
    Known false positives: small models trained for a study; counts of one phase.
    Blind to: where the weights came from.
    """
    stated = _Statement(candidate, judge)
    active, counts = stated.active(), stated.tokens()
    if active is None or not counts:
        judge.not_applicable("the claim states no active parameters or no tokens", **stated.record())
    value = max(share_of_compute_optimal(count.value, active.value) for count in counts)
    decision = judge.decide(lambda limits: decide_by_bands(limits, value))
    text = _told([(one.value, 0.0, _few(tokens_per_parameter(one.value, active.value))) for one in counts])
    reason = NOT_PROOF if decision.outcome == SUPPORTS else decision.reason
    decision = replace(decision, reason=f"{text} tokens per active parameter: {reason}")
    total = stated.total()
    judge.finish(
        decision,
        value,
        active_parameters=active.as_record(),
        readings=[
            {
                "tokens": count.as_record(),
                "per_active_parameter": tokens_per_parameter(count.value, active.value),
                "per_parameter": None if total is None else tokens_per_parameter(count.value, total.value),
                "parameter_flops": parameter_flops(active.value, count.value),
            }
            for count in counts
        ],
        fine_tune_flops={
            "documented": "a tenth to a hundredth of a training from scratch (tutorial-qa.md, Q1)",
            "range": [parameter_flops(active.value, counts[0].value) / divisor for divisor in (100, 10)],
        },
        **stated.record(),
    )


class _Statement:
    """The figures of the claim, and of the catalogue where the claim is silent or another source says otherwise."""

    def __init__(self, candidate: Candidate, judge: Judge) -> None:
        require_text_decoder(candidate, judge, "the compute of the whole model")
        self.candidate = candidate
        self.claim = candidate.training
        entry = candidate.catalog_entry
        self.catalogued = dict(entry.training) if entry else {}
        self.parameters = dict(entry.parameters) if entry else {}
        self.sources = dict(entry.sources) if entry else {}

    def active(self) -> Stated | None:
        """Active parameters: the claim's, the catalogue's, or counted from the architecture."""
        return _claimed(self.claim.active) or self._first(self.parameters.get("active")) or self._counted("active")

    def total(self) -> Stated | None:
        """All parameters, from the same places."""
        return _claimed(self.claim.total) or self._first(self.parameters.get("total")) or self._counted("total")

    def tokens(self) -> list[Stated]:
        """Every stated count of training tokens that differs from the others."""
        claimed = _claimed(self.claim.tokens)
        found = [*([claimed] if claimed else []), *self._all(self.catalogued.get("tokens"))]
        return _distinct(found)

    def hours(self, tokens: Stated) -> list[Stated]:
        """Every stated accelerator time: hours as published, accelerators times days, or these tokens' at a rate."""
        rate = self._first(self.catalogued.get("tokens_per_second_per_accelerator"))
        found = self.stated_hours()
        if not found and rate:
            source = f"{tokens.value:g} tokens at {rate.value:g} a second each"
            found = [Stated(tokens.value / rate.value / SECONDS_PER_HOUR, source)]
        return found

    def stated_hours(self) -> list[Stated]:
        """The accelerator times that do not depend on a count of tokens."""
        found = self._all(self.catalogued.get("accelerator_hours"))
        count = _claimed(self.claim.accelerator_count) or self._first(self.catalogued.get("accelerator_count"))
        days = _claimed(self.claim.days) or self._first(self.catalogued.get("days"))
        if count and days:
            source = f"{count.value:g} accelerators ({count.source}) for {days.value:g} days ({days.source})"
            found.append(Stated(accelerator_hours(count.value, days.value), source))
        return _distinct(found)

    def accelerator(self) -> Accelerator | None:
        """The stated accelerator, when its peak is known: by the table, or else by the claim."""
        figure = self.catalogued.get("accelerator")
        name = self.claim.accelerator or (str(figure.value) if figure else None)
        known = accelerator_called(name) if name else None
        if known is not None or self.claim.peak is None or name is None:
            return known
        stated = precisions_in(self.claim.precision or "") or ("fp32",)
        peaks = dict.fromkeys(stated, self.claim.peak)
        return Accelerator(name, frozenset(), peaks, "stated by the claim", unverified=True)

    def precisions(self, accelerator: Accelerator) -> tuple[str, ...]:
        """The stated precisions of training; all that the accelerator has from 8 bits on where none is stated.

        A training in fp32 may have its matrix products in tf32, which frameworks switch on.
        """
        figure = self.catalogued.get("precision")
        stated = precisions_in(" ".join(filter(None, [self.claim.precision, str(figure.value) if figure else None])))
        if "fp32" in stated and "tf32" not in stated:
            stated = (*stated, "tf32")
        return tuple(one for one in stated if one in accelerator.peaks) or tuple(
            one for one in accelerator.peaks if one != "fp4"
        )

    def attention(self, tokens: float) -> float | None:
        """Operations of attention over the stated sequence length; None when length or shapes are not known."""
        length = _claimed(self.claim.sequence_length) or self._first(self.catalogued.get("sequence_length"))
        architecture = self.candidate.architecture
        if length is None or architecture is None:
            return None
        dims, contexts = _head_dims(architecture), _contexts(architecture, length.value)
        if dims is None or not contexts or not architecture.num_attention_heads:
            return None
        return attention_flops(tokens, contexts, architecture.num_attention_heads, *dims)

    def record(self) -> dict[str, Any]:
        """Every figure that was found, for the record."""
        return {
            "claimed": {name: value for name, value in vars(self.claim).items() if value is not None},
            "catalogued": {name: self._described(figure) for name, figure in self.catalogued.items()},
        }

    def _described(self, figure: Figure) -> list[dict[str, Any]]:
        return [
            {
                "value": one.value,
                "source": self.sources.get(one.source, one.source),
                "unverified": one.unverified,
                "note": one.note,
            }
            for one in (figure, *figure.conflicting)
        ]

    def _first(self, figure: Figure | None) -> Stated | None:
        return next(iter(self._all(figure)), None)

    def _all(self, figure: Figure | None) -> list[Stated]:
        """A figure of the catalogue and those that conflict with it."""
        return [
            Stated(float(one.value), f"catalogue, {one.source}{' (unverified)' if one.unverified else ''}")
            for one in ((figure, *figure.conflicting) if figure else ())
            if isinstance(one.value, int | float) and one.value > 0
        ]

    def _counted(self, which: str) -> Stated | None:
        from checks.catalog.parameters import UncountableError, count

        architecture = self.candidate.architecture
        if architecture is None:
            return None
        try:
            return Stated(float(getattr(count(architecture), which)), "counted from the configuration")
        except UncountableError:
            return None


def _few(number: float) -> str:
    """A number in two or more digits: 0.41, 8.1, 1,642."""
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def _told(readings: list[tuple[float, float, str]]) -> str:
    """The results of (tokens, hours, result): one, or each with those of its figures in which they differ."""
    differ = [len({reading[index] for reading in readings}) > 1 for index in (0, 1)]
    told = []
    for tokens, hours, result in readings:
        figures = [f"{tokens:.4g} tokens"] * differ[0] + [f"{hours:,.0f} accelerator hours"] * differ[1]
        told.append(f"{result} ({' in '.join(figures)})" if figures else result)
    return " or ".join(dict.fromkeys(told))


def _claimed(value: float | None) -> Stated | None:
    return None if value is None else Stated(float(value), "the claim")


def _distinct(found: list[Stated]) -> list[Stated]:
    """Figures without repetitions of the same value, each with the first who said it."""
    by_value: dict[float, Stated] = {}
    for one in found:
        by_value.setdefault(one.value, one)
    return list(by_value.values())


def _head_dims(architecture: Architecture) -> tuple[int, int] | None:
    """Dimensions of a head's query and key, and of its value."""
    if architecture.qk_nope_head_dim and architecture.qk_rope_head_dim and architecture.v_head_dim:
        return architecture.qk_nope_head_dim + architecture.qk_rope_head_dim, architecture.v_head_dim
    head = architecture.head_dim
    if head is None and architecture.hidden_size and architecture.num_attention_heads:
        head = architecture.hidden_size // architecture.num_attention_heads
    return (head, head) if head else None


def _contexts(architecture: Architecture, sequence_length: float) -> list[float]:
    """The mean context of every attention layer; sliding layers see their window, other kinds are left out."""
    pattern = architecture.layer_pattern or "G"
    window = float(architecture.sliding_window) if architecture.sliding_window else None
    kinds = [pattern[layer % len(pattern)] for layer in range(architecture.num_hidden_layers or 0)]
    return [mean_context(sequence_length, window if kind == "L" else None) for kind in kinds if kind in "LG"]
