"""Behaviour checks on small local models and on a server whose models are known to be related or not."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.model import Model
from checks.claim.behavior import Behavior
from checks.claim.model import ModelSource
from checks.claim.training import Training
from checks.evidence.record import CONTRADICTS, INCONCLUSIVE, NOT_APPLICABLE, SUPPORTS, Evidence
from checks.generation.prompts import knowledge_questions
from checks.pair.candidate import Candidate
from tests.generation.endpoint_server import serving

Judged = Callable[..., Evidence]
CHECKS = ("behavior.knowledge_cutoff", "behavior.refusals", "behavior.next_token")
PANEL = ("r1", "r2", "r3", "r4")


def candidate(
    behavior: Behavior | None,
    panel: Mapping[str, ModelSource] | None = None,
    disclosed: frozenset[str] = frozenset(),
    component: str | None = None,
) -> Candidate:
    made = Candidate(ModelSource(name="candidate"), component, ("",), Training(), frozenset())
    references = tuple(Model(source, None, ("",)) for source in (panel or {}).values())
    vars(made).update(behavior=behavior, references=references, disclosed=disclosed, device=lambda: "cpu")
    return made


def at(address: str, cutoff: str | None = None, disclosed: frozenset[str] = frozenset()) -> Candidate:
    """A candidate that answers at an endpoint beside its panel."""
    behavior = Behavior(address, "ours", None, cutoff, tuple((name, name) for name in PANEL))
    return candidate(behavior, {name: ModelSource(name=name) for name in PANEL}, disclosed)


def chance(*of: str) -> random.Random:
    return random.Random(hashlib.sha256("|".join(of).encode()).digest())


# Without anybody to ask


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("behavior", [None, Behavior(knowledge_cutoff="2025-05")])
def test_nothing_is_run_unless_the_claim_says_so(check: str, behavior: Behavior | None, judged: Judged) -> None:
    assert judged(check, candidate(behavior)).outcome == NOT_APPLICABLE


@pytest.mark.parametrize("check", CHECKS)
def test_other_components_are_not_asked(check: str, judged: Judged) -> None:
    assert judged(check, candidate(Behavior("http://127.0.0.1:9/v1"), component="vision")).outcome == NOT_APPLICABLE


@pytest.mark.parametrize("check", CHECKS)
def test_a_dead_endpoint_is_unavailable(check: str, judged: Judged) -> None:
    with serving({"ours": lambda text: "no"}) as endpoint:
        endpoint.fail(times=-1, status=401)
        with pytest.raises(CheckpointUnavailable, match="refuses the key"):
            judged(check, at(endpoint.address, "2024-01"))
        assert len(endpoint.requests) == 1


# Knowledge


def knows_until(date: str, share: float = 0.8, name: str = "ours") -> Callable[[str], str]:
    """A model that knows this share of all outcomes until a date, and says so where it does not."""

    def answer(text: str) -> str:
        for question in knowledge_questions().questions:
            if question.text in text:
                known = question.date <= date and chance(name, question.id).random() < share
                return f"<think>hm</think>It was {question.accept[0]}." if known else "I do not know."
        return "I do not know."

    return answer


@pytest.mark.parametrize(
    ("claimed", "knows"), [("2024-06", "2024-06-30"), ("2023", "2023-12-31"), ("2024-06", "2024-07-31")]
)
def test_a_model_of_its_claimed_age(claimed: str, knows: str, judged: Judged) -> None:
    with serving(
        {"ours": knows_until(knows), **{name: knows_until("2023-10-01", name=name) for name in PANEL}}
    ) as endpoint:
        evidence = judged("behavior.knowledge_cutoff", at(endpoint.address, claimed))
    assert evidence.outcome == SUPPORTS
    assert evidence.value is not None
    assert evidence.value < 0.1
    assert evidence.details["estimate"]["earliest"] <= knows[:7]
    assert evidence.details["references"]["r1"]["month"] < "2024-01"
    assert evidence.details["questions"] == knowledge_questions().as_record()
    answer = evidence.details["answers"]["nobel_literature_2024"]
    assert answer["date"] == "2024-10-10"
    assert isinstance(answer["right"], bool)


def test_a_model_that_knows_more_than_it_should(judged: Judged) -> None:
    with serving({"ours": knows_until("2025-06-01"), **dict.fromkeys(PANEL, str.upper)}) as endpoint:
        evidence = judged("behavior.knowledge_cutoff", at(endpoint.address, "2023-12"))
    assert evidence.outcome == CONTRADICTS
    assert "after its claimed cutoff" in (evidence.band or "")
    assert evidence.details["after"]["p"] < 1e-6


def test_a_model_that_is_older_than_claimed_is_left_open(judged: Judged) -> None:
    with serving({"ours": knows_until("2023-04-01"), **dict.fromkeys(PANEL, str.upper)}) as endpoint:
        evidence = judged("behavior.knowledge_cutoff", at(endpoint.address, "2025-01"))
    assert evidence.outcome == INCONCLUSIVE
    assert "end before the claimed cutoff, by its answers in 2023-0" in evidence.reason


@pytest.mark.parametrize("share", [0.0, 0.15])
def test_a_model_that_knows_nothing_has_no_power(share: float, judged: Judged) -> None:
    with serving({"ours": knows_until("2025-12-31", share)}) as endpoint:
        evidence = judged("behavior.knowledge_cutoff", at(endpoint.address, "2024-06"))
        assert len(endpoint.requests) == len(evidence.details["answers"]) < 30, "the rest was asked in vain"
    assert evidence.outcome == INCONCLUSIVE
    assert "no power" in evidence.reason


@pytest.mark.parametrize("claimed", ["2025-10", "2016-12"])
def test_a_cutoff_outside_of_the_questions(claimed: str, judged: Judged) -> None:
    evidence = judged("behavior.knowledge_cutoff", at("http://127.0.0.1:9/v1", claimed))
    assert evidence.outcome == INCONCLUSIVE
    assert "no power" in evidence.reason


def test_no_claimed_cutoff(judged: Judged) -> None:
    assert judged("behavior.knowledge_cutoff", at("http://127.0.0.1:9/v1")).outcome == NOT_APPLICABLE


def test_a_base_model_is_asked_by_examples(judged: Judged) -> None:
    with serving({"ours": knows_until("2024-06-30"), **dict.fromkeys(PANEL, str.upper)}, chat=False) as endpoint:
        evidence = judged("behavior.knowledge_cutoff", at(endpoint.address, "2024-06"))
        assert endpoint.requests[-1][2]["prompt"].count("Answer:") == 4
    assert evidence.outcome == SUPPORTS


@pytest.mark.parametrize(("knows", "outcome"), [("2024-06-30", SUPPORTS), ("2025-06-01", CONTRADICTS)])
def test_a_dead_reference_takes_nothing_from_the_finding(knows: str, outcome: str, judged: Judged) -> None:
    """r2 is refused, r3 is no model of the server; the others are for the record as ever."""
    models = {"ours": knows_until(knows), **{name: knows_until("2023-10-01", name=name) for name in ("r1", "r4")}}
    with serving(models) as endpoint:
        evidence = judged("behavior.knowledge_cutoff", at(endpoint.address, "2024-06"))
    assert evidence.outcome == outcome
    assert set(evidence.details["references"]) == {"r1", "r4"}
    assert set(evidence.details["not_asked"]) == {"r2", "r3"}
    assert "does not exist" in evidence.details["not_asked"]["r2"]


def test_answers_of_candidate_and_references_are_kept_whole(judged: Judged) -> None:
    def wordy(text: str) -> str:
        return f"{knows_until('2024-06-30')(text)}\n{'and so on ' * 100}the end"

    with serving({"ours": wordy, **dict.fromkeys(PANEL, wordy)}) as endpoint:
        evidence = judged("behavior.knowledge_cutoff", at(endpoint.address, "2024-06"))
    assert evidence.outcome == SUPPORTS
    kept = [evidence.details["answers"], *evidence.details["references_answers"].values()]
    assert len(kept) == 5
    for answers in kept:
        assert all(one["answer"].endswith("the end") and len(one["answer"]) > 1000 for one in answers.values())
    assert set(kept[1]) == {question.id for question in knowledge_questions().questions}
    json.dumps(evidence.details)


# Continuations


def goes_on(name: str, of: str | None = None, common: float = 0.35, kept: float = 0.6) -> Callable[[str], str]:
    """A model that says what all say, or a word of its own; `of`: it keeps a share of another model's words."""

    def answer(text: str) -> str:
        if chance("everybody", text).random() < common:
            return " the same"
        source = of if of is not None and chance(name, "kept", text).random() < kept else name
        return f" w{chance(source, text).randrange(80)} and"

    return answer


UNRELATED = {name: goes_on(name) for name in PANEL}


def test_a_model_that_goes_on_like_a_reference(judged: Judged) -> None:
    with serving({"ours": goes_on("ours", of="r2"), **UNRELATED}) as endpoint:
        evidence = judged("behavior.next_token", at(endpoint.address))
    assert evidence.outcome == CONTRADICTS
    assert evidence.details["nearest"] == "r2"
    assert evidence.details["corrected_p"] < 1e-6
    assert evidence.value is not None
    assert evidence.value > 6
    assert set(evidence.details["answers"]) == {"candidate", *PANEL}
    assert evidence.details["prompts"]["version"] == 1
    json.dumps(evidence.details)


def test_a_disclosed_reference_is_a_control_and_no_finding(judged: Judged) -> None:
    with serving({"ours": goes_on("ours", of="r2"), **UNRELATED}) as endpoint:
        evidence = judged("behavior.next_token", at(endpoint.address, disclosed=frozenset({"r2"})))
    assert evidence.outcome != CONTRADICTS


def test_a_model_that_always_says_the_same(judged: Judged) -> None:
    with serving({"ours": lambda text: " the", **UNRELATED}) as endpoint:
        evidence = judged("behavior.next_token", at(endpoint.address))
    assert evidence.outcome == INCONCLUSIVE
    assert "1 different words" in evidence.reason
    assert set(evidence.details["answers"]) == {"candidate"}


def test_chat_alone_does_not_continue_text(judged: Judged) -> None:
    with serving({"ours": goes_on("ours"), **UNRELATED}, completions=False) as endpoint:
        assert judged("behavior.next_token", at(endpoint.address)).outcome == NOT_APPLICABLE


def test_too_few_references_are_not_asked(judged: Judged) -> None:
    with serving({"ours": goes_on("ours")}) as endpoint:
        subject = candidate(Behavior(endpoint.address, "ours"), {name: ModelSource(name=name) for name in PANEL})
        evidence = judged("behavior.next_token", subject)
        assert endpoint.requests == []
    assert evidence.outcome == INCONCLUSIVE
    assert set(evidence.details["not_asked"]) == set(PANEL)


@pytest.mark.parametrize("check", ["behavior.next_token", "behavior.refusals"])
def test_a_dead_reference_is_left_out_while_controls_remain(check: str, judged: Judged) -> None:
    made = goes_on if check == "behavior.next_token" else declines
    models = {"ours": made("ours", of="r2"), **{name: made(name) for name in (*PANEL, "r5")}}
    with serving({name: model for name, model in models.items() if name != "r1"}) as endpoint:
        names = (*PANEL, "r5")
        behavior = Behavior(endpoint.address, "ours", None, None, tuple((name, name) for name in names))
        evidence = judged(check, candidate(behavior, {name: ModelSource(name=name) for name in names}))
    assert evidence.outcome == CONTRADICTS
    assert evidence.details["nearest"] == "r2"
    assert set(evidence.details["not_asked"]) == {"r1"}
    assert set(evidence.details["answers"]) == set(evidence.details["asked"]) == {"candidate", "r2", "r3", "r4", "r5"}


@pytest.mark.parametrize("check", ["behavior.next_token", "behavior.refusals"])
def test_too_few_controls_left_by_a_dead_reference_is_unavailable(check: str, judged: Judged) -> None:
    made = goes_on if check == "behavior.next_token" else declines
    with (
        serving({name: made(name) for name in ("ours", *PANEL[1:])}) as endpoint,
        pytest.raises(CheckpointUnavailable, match="does not exist"),
    ):
        judged(check, at(endpoint.address))


# Refusals


def declines(name: str, of: str | None = None) -> Callable[[str], str]:
    """An assistant with a wording of its own, or with most of another's."""

    def answer(text: str) -> str:
        own, source = chance(name, text), chance(of or name, text)
        wanted = [f"w{source.randrange(40)}" for _ in range(20)]
        return " ".join(word if own.random() < 0.8 else f"v{own.randrange(40)}" for word in wanted)

    return answer


ASSISTANTS = {name: declines(name) for name in PANEL}


def test_a_model_that_declines_like_a_reference(judged: Judged) -> None:
    with serving({"ours": declines("ours", of="r3"), **ASSISTANTS}) as endpoint:
        evidence = judged("behavior.refusals", at(endpoint.address))
    assert evidence.outcome == CONTRADICTS
    assert evidence.details["nearest"] == "r3"
    assert evidence.details["answers"]["candidate"]["identity"]


def test_a_model_with_a_wording_of_its_own(judged: Judged) -> None:
    with serving({"ours": declines("ours"), **ASSISTANTS}) as endpoint:
        assert judged("behavior.refusals", at(endpoint.address)).outcome == SUPPORTS


def test_short_replies_are_alike_by_accident(judged: Judged) -> None:
    with serving({name: lambda text: "I cannot." for name in ("ours", *PANEL)}) as endpoint:
        evidence = judged("behavior.refusals", at(endpoint.address))
    assert evidence.outcome == INCONCLUSIVE


def test_a_base_model_does_not_decline(judged: Judged) -> None:
    with serving({"ours": str.upper}, chat=False) as endpoint:
        assert judged("behavior.refusals", at(endpoint.address)).outcome == NOT_APPLICABLE
        assert len(endpoint.requests) == 1


def test_whole_replies_are_kept(judged: Judged) -> None:
    def long(name: str) -> Callable[[str], str]:
        return lambda text: f"{declines(name)(text)} {'w ' * 400}the end"

    with serving({name: long(name) for name in ("ours", *PANEL)}) as endpoint:
        evidence = judged("behavior.refusals", at(endpoint.address))
    for replies in evidence.details["answers"].values():
        assert all(reply.endswith("the end") for reply in replies.values())


# Local models


@pytest.mark.parametrize(
    ("subject", "panel"),
    [
        ("continued", ("base", "derived", "independent", "control")),
        ("independent", ("base", "derived", "continued", "control")),
    ],
)
def test_trained_models_are_asked_how_they_go_on(
    subject: str, panel: tuple[str, ...], examples: Path, judged: Judged
) -> None:
    """Base trained on for a while is found among three other models; one trained from scratch accuses nobody."""
    references = {name: ModelSource(name=name, path=str(examples / name)) for name in panel}
    evidence = judged("behavior.next_token", candidate(Behavior(directory=str(examples / subject)), references))
    assert all(one["controls"] == 3 for one in evidence.details["agreements"])
    assert evidence.value is not None
    if subject == "continued":
        assert evidence.outcome == CONTRADICTS
        assert evidence.details["nearest"] == "base"
        assert evidence.details["corrected_p"] < 1e-4
    else:
        assert evidence.outcome == INCONCLUSIVE
        assert "no power" in evidence.reason
        assert evidence.details["corrected_p"] > 0.05


def test_local_models_without_knowledge_or_chat(examples: Path, judged: Judged) -> None:
    panel = {name: ModelSource(name=name, path=str(examples / name)) for name in ("base", "derived")}
    subject = candidate(Behavior(directory=str(examples / "independent"), knowledge_cutoff="2023-12"), panel)
    knowledge = judged("behavior.knowledge_cutoff", subject)
    assert knowledge.outcome == INCONCLUSIVE
    assert "it knows 0 of 24 outcomes" in knowledge.reason
    assert len(knowledge.details["answers"]) == 24
    assert judged("behavior.refusals", subject).outcome == NOT_APPLICABLE
    few = judged("behavior.next_token", subject)
    assert few.outcome == INCONCLUSIVE
    assert "2 references can be asked" in few.reason
