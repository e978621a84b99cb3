"""Behaviour: does the model answer as one of the claimed age, and unlike its references?

Answers are cheap to change and easily alike for other reasons, so that these checks support and never decide alone.
Nothing is run or asked unless the claim says where the candidate answers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from checks.applicable import require_text_decoder
from checks.evidence.decisions import Decision, decide_by_bands
from checks.evidence.record import CONTRADICTS, INCONCLUSIVE, SUPPORTS
from checks.generation.agreement import decide_agreement

if TYPE_CHECKING:
    from checks.evidence.judge import Judge
    from checks.generation.asked_claim import AskedClaim
    from checks.generation.asking import Respondents
    from checks.generation.prompts import Prompt, Question
    from checks.generation.text_model import TextModel
    from checks.pair.candidate import Candidate
    from checks.statistics.agreement import ControlledAgreement
    from checks.statistics.cutoff import CutoffEstimate, DatedAnswer

# Below this many unrelated models nobody knows by how much unrelated models differ.
FEWEST_CONTROLS = 3
# Answers of fewer words are alike by accident.
FEWEST_WORDS = 5
MOST_WORDS = 60
FEWEST_REPLIES = 12
FEWEST_DISTINCT_WORDS = 10

# Knowledge: guessing must be excluded at this level, and old outcomes known this often, before anything is concluded.
SURE = 0.001
KNOWS_OLD_FROM = 0.3
FEWEST_OLD, MOST_OLD = 12, 24
FEWEST_NEW = 8
RECENT_MONTHS = 12
GRACE_MONTHS = 1  # "May 2025" may mean its end, or a crawl of some weeks later


def knowledge_cutoff(candidate: Candidate, judge: Judge) -> None:
    """Does the model know of nothing that happened after its claimed knowledge cutoff?

    Null hypothesis: it does not, and guesses right at most as often as the question file allows (Poisson binomial).
    Statistic: share of outcomes after the cutoff (one month of grace) that it knows beyond guessing, over the same
    share of outcomes more than a year before the cutoff; 0 for nothing, 1 for as much as of older ones.
    Documented: tutorial-qa.md, Q1 (behaviour: knowledge cutoff); bounds of this suite.
    Known false positives: an endpoint that searches the web. A model that knows nothing of the last year before its
    claimed cutoff is left open, with the cutoff that its answers and those of the references suggest.
    Blind to: where the weights came from: continued pre-training moves a cutoff, and unrelated models share one.
    """
    from checks.generation.asking import facts
    from checks.generation.prompts import knowledge_questions
    from checks.statistics.cutoff import estimate_cutoff, knowledge, month_number

    claim = _asked(candidate, judge)
    claimed = claim.behavior.knowledge_cutoff
    if claimed is None:
        judge.not_applicable("the claim states no knowledge cutoff")
    asked = knowledge_questions()
    cutoff = month_number(claimed)
    months = {question.id: month_number(question.date) for question in asked.questions}
    old = _spread([one for one in asked.questions if months[one.id] <= cutoff - RECENT_MONTHS])
    recent = [one for one in asked.questions if cutoff - RECENT_MONTHS < months[one.id] <= cutoff]
    new = [one for one in asked.questions if months[one.id] > cutoff + GRACE_MONTHS]
    common: dict[str, Any] = {"claimed": claimed, "questions": asked.as_record()}
    if len(old) < FEWEST_OLD or len(new) < FEWEST_NEW:
        judge.inconclusive(
            f"no power: {len(old)} questions lie a year before the claimed cutoff and {len(new)} after it; "
            f"{FEWEST_OLD} and {FEWEST_NEW} are needed",
            **common,
        )
    with claim.open_candidate() as model:
        common["asked"] = model.description
        texts = facts(model, old, asked)
        dated = _dated(old, texts)
        before = knowledge(dated)
        if before.above_chance < KNOWS_OLD_FROM or before.p > SURE:
            judge.inconclusive(
                f"no power: it knows {before.right} of {before.questions} outcomes from more than a year before the "
                "claimed cutoff",
                answers=_marked(old, texts, dated),
                before=vars(before),
                **common,
            )
        later = [*recent, *new]
        later_texts = facts(model, later, asked)
    dated_later = _dated(later, later_texts)
    near, after = knowledge(dated_later[: len(recent)]), knowledge(dated_later[len(recent) :])
    estimate = estimate_cutoff([*dated, *dated_later])
    value = after.above_chance / before.above_chance
    known = f"{after.right} of {after.questions} outcomes after its cutoff, {before.right} of {before.questions} old"
    decision = judge.decide(lambda limits: decide_by_bands(limits, value))
    supports_below = judge.threshold.supports_below or 0.0
    if decision.outcome == CONTRADICTS and after.p > SURE:
        decision = Decision(INCONCLUSIVE, f"it names {known}; that may be guessing (p = {after.p:.2g})")
    elif decision.outcome == SUPPORTS and _ends_early(
        near.above_chance / before.above_chance, len(recent), supports_below
    ):
        decision = Decision(INCONCLUSIVE, f"its knowledge seems to end before the claimed cutoff{_by(estimate)}")
    else:
        decision = Decision(decision.outcome, f"it names {known}: {decision.reason}", decision.powered)
    judge.finish(
        decision,
        value,
        before=vars(before),
        last_year=vars(near),
        after=vars(after),
        estimate=_estimated(estimate),
        **_reference_cutoffs(claim, asked.questions),
        answers=_marked([*old, *later], [*texts, *later_texts], [*dated, *dated_later]),
        **common,
    )


def refusals(candidate: Candidate, judge: Judge) -> None:
    """Does the model decline in the words of one reference, more than in those of the others?

    Null hypothesis: on each prompt the wording is as likely to be nearer to a control's as to the reference's.
    Statistic: -log10 of the corrected p of the sign-flip permutation test on differences of wording similarity (share
    of words that need no edit), the reference against the best of the other references, Bonferroni over references. A
    contradiction also needs an excess above the entry's effect and above what the controls differ by among themselves.
    Documented: tutorial-qa.md, Q1 (behaviour: refusal pattern equal to the base model's); bounds of this suite.
    Known false positives: training on a reference's replies (distillation), which copies no weight.
    Blind to: an ancestor outside the panel; a base model, since replies are made by later training.
    """
    from checks.generation.asking import replies, said
    from checks.generation.prompts import refusals as requests
    from checks.generation.text_model import NotOffered
    from checks.statistics.agreement import alike_wording, words

    claim = _asked(candidate, judge)
    panel = claim.respondents()
    asked = requests()
    common: dict[str, Any] = {"prompts": asked.as_record(), "not_asked": dict(panel.not_asked)}
    with claim.open_candidate() as model:
        common["asked"] = {"candidate": model.description}
        try:
            ours = replies(model, asked.prompts)
        except NotOffered as error:
            judge.not_applicable(f"the candidate does not answer in chat: {error}", **common)
    _require_controls(judge, panel.models, **common, answers={"candidate": _kept(asked.prompts, ours)})
    theirs = _asked_references(judge, panel, lambda model: replies(model, asked.prompts), asked.prompts, ours, common)
    spoken = {name: [words(said(text))[:MOST_WORDS] for text in texts] for name, texts in theirs.items()}
    own = [words(said(text))[:MOST_WORDS] for text in ours]
    counted = [index for index, one in enumerate(own) if len(one) >= FEWEST_WORDS]
    if len(counted) < FEWEST_REPLIES:
        judge.inconclusive(f"no power: only {len(counted)} replies have {FEWEST_WORDS} words", **common)
    found = alike_wording(
        [own[index] for index in counted],
        {name: [texts[index] for index in counted] for name, texts in spoken.items()},
        _level(judge, len(theirs)),
        claim.related(),
    )
    _judge_agreements(judge, found, claim, "wording", counted=len(counted), **common)


def next_token(candidate: Candidate, judge: Judge) -> None:
    """Does the model go on like one reference, more than unrelated models do?

    Null hypothesis: it agrees with the reference no more often than with the control that it agrees with most.
    Statistic: -log10 of the corrected p of the one-sided two-proportion z-test on equal next words under greedy
    decoding, the reference against the best of the other references, Bonferroni over references. A contradiction also
    needs an excess above the entry's effect and above what the controls differ by among themselves.
    Documented: Nikolic, Baluta and Saxena, Model Provenance Testing for Large Language Models, arXiv 2502.00706 (at 5 %
    and thousands of prompts); stricter bounds of this suite.
    Known false positives: training on the same text, which the control group holds only in part.
    Blind to: an ancestor outside the panel; two references of one family, which are each other's control unless the
    catalogue says that one is derived from the other.
    """
    from checks.generation.asking import beginnings
    from checks.generation.prompts import continuations
    from checks.generation.text_model import NotOffered
    from checks.statistics.agreement import equal_answers, first_word

    claim = _asked(candidate, judge)
    panel = claim.respondents()
    asked = continuations()
    common: dict[str, Any] = {"prompts": asked.as_record(), "not_asked": dict(panel.not_asked)}
    _require_controls(judge, panel.models, **common)
    with claim.open_candidate() as model:
        common["asked"] = {"candidate": model.description}
        try:
            texts = beginnings(model, asked.prompts)
        except NotOffered as error:
            judge.not_applicable(f"the candidate does not continue text: {error}", **common)
    ours = [first_word(text) for text in texts]
    distinct = len(set(ours) - {""})
    if distinct < FEWEST_DISTINCT_WORDS:
        judge.inconclusive(
            f"no power: the candidate goes on with only {distinct} different words",
            answers={"candidate": _kept(asked.prompts, texts)},
            **common,
        )
    theirs = _asked_references(
        judge, panel, lambda model: beginnings(model, asked.prompts), asked.prompts, texts, common
    )
    chosen = {name: [first_word(text) for text in answers] for name, answers in theirs.items()}
    found = equal_answers(ours, chosen, _level(judge, len(chosen)), claim.related())
    _judge_agreements(judge, found, claim, "next words", distinct_words=distinct, **common)


def _asked(candidate: Candidate, judge: Judge) -> AskedClaim:
    """What asking needs. Not applicable where the claim does not say where the candidate answers."""
    from checks.generation.asked_claim import asked_claim

    require_text_decoder(candidate, judge, "behaviour")
    found = asked_claim(candidate)
    if found is None:
        judge.not_applicable(
            "the claim names neither an endpoint nor a model to run (behavior.endpoint, behavior.model)"
        )
    return found


# Agreement


def _require_controls(judge: Judge, answering: Mapping[str, object], **details: Any) -> None:
    if len(answering) <= FEWEST_CONTROLS:
        judge.inconclusive(
            f"no control group: {len(answering)} references can be asked, and {FEWEST_CONTROLS + 1} are needed, so "
            f"that each has {FEWEST_CONTROLS} controls",
            **details,
        )


def _asked_references(
    judge: Judge,
    panel: Respondents,
    ask: Callable[[TextModel], list[str]],
    prompts: Sequence[Prompt],
    ours: Sequence[str],
    common: dict[str, Any],
) -> dict[str, list[str]]:
    """The answers of the references, all that was asked and answered noted in `common`.

    Raises ModelUnavailable when too few are left because one could not be asked.
    """
    from checks.generation.asking import ask_each

    asked = ask_each(panel.models, ask)
    common["asked"].update(asked.described)
    common["not_asked"].update(asked.not_asked)
    common["answers"] = {name: _kept(prompts, texts) for name, texts in {"candidate": ours, **asked.answers}.items()}
    if len(asked.answers) <= FEWEST_CONTROLS and asked.failure is not None:
        raise asked.failure
    _require_controls(judge, asked.answers, **common)
    return asked.answers


def _level(judge: Judge, tests: int) -> float:
    """The p that one reference must reach."""
    return 10 ** -(judge.threshold.contradicts_from or 0.0) / max(1, tests)


def _judge_agreements(
    judge: Judge, found: Sequence[ControlledAgreement], claim: AskedClaim, what: str, **details: Any
) -> None:
    tested = [one for one in found if one.reference not in claim.disclosed and one.controls >= FEWEST_CONTROLS]
    if not tested:
        judge.inconclusive("no reference that was not disclosed has a control group", **details)
    nearest = min(tested, key=lambda one: (one.p, -one.excess))
    value = -math.log10(max(nearest.corrected_p(len(tested)), 1e-300))
    judge.finish(
        judge.decide(lambda limits: decide_agreement(limits, tested, what)),
        value,
        nearest=nearest.reference,
        p=nearest.p,
        corrected_p=nearest.corrected_p(len(tested)),
        agreements=[vars(one) for one in found],
        disclosed=sorted(claim.disclosed),
        note=f"nearest: {nearest.reference}",
        **details,
    )


def _kept(prompts: Sequence[Prompt], texts: Sequence[str]) -> dict[str, str]:
    return {prompt.id: text for prompt, text in zip(prompts, texts, strict=True)}


# Knowledge


def _spread(questions: Sequence[Question]) -> list[Question]:
    """At most `MOST_OLD` of the questions, evenly over their time: a cutoff may lie long before the claimed one."""
    count = min(MOST_OLD, len(questions))
    return [questions[index * len(questions) // count] for index in range(count)]


def _dated(questions: Sequence[Question], texts: Sequence[str]) -> list[DatedAnswer]:
    from checks.generation.asking import said_first
    from checks.statistics.agreement import says
    from checks.statistics.cutoff import DatedAnswer, month_number

    return [
        DatedAnswer(month_number(question.date), says(said_first(text), question.accept), question.chance)
        for question, text in zip(questions, texts, strict=True)
    ]


def _marked(
    questions: Sequence[Question], texts: Sequence[str], answers: Sequence[DatedAnswer]
) -> dict[str, dict[str, Any]]:
    return {
        question.id: {"date": question.date, "answer": text, "right": answer.right}
        for question, text, answer in zip(questions, texts, answers, strict=True)
    }


def _ends_early(known: float, questions: int, supports_below: float) -> bool:
    """Does it know as little of the year before its claimed cutoff as it should know of what came after?"""
    return questions >= FEWEST_NEW and known < supports_below


def _by(estimate: CutoffEstimate | None) -> str:
    from checks.statistics.cutoff import month_name

    return "" if estimate is None else f", by its answers in {month_name(estimate.month)}"


def _estimated(estimate: CutoffEstimate | None) -> dict[str, str] | None:
    from checks.statistics.cutoff import month_name

    if estimate is None:
        return None
    return {name: month_name(value) for name, value in vars(estimate).items()}


def _reference_cutoffs(claim: AskedClaim, questions: Sequence[Question]) -> dict[str, Any]:
    """The cutoff that each reference's answers suggest; for the record, since unrelated models share one too."""
    from checks.generation.asking import ask_each, facts
    from checks.generation.prompts import knowledge_questions
    from checks.statistics.cutoff import estimate_cutoff

    panel = claim.respondents()
    asked = ask_each(panel.models, lambda model: facts(model, questions, knowledge_questions()))
    dated = {name: _dated(questions, texts) for name, texts in asked.answers.items()}
    return {
        "references": {name: _estimated(estimate_cutoff(answers)) for name, answers in dated.items()},
        "references_answers": {name: _marked(questions, asked.answers[name], dated[name]) for name in dated},
        "references_asked": asked.described,
        "not_asked": {**panel.not_asked, **asked.not_asked},
    }
