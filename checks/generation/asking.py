"""Who answers for each model of a claim, and their answers to the fixed prompts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from checks.claim.behavior import Behavior
from checks.claim.model import ModelSource
from checks.generation.endpoint import EndpointTextModel
from checks.generation.local import LocalTextModel
from checks.generation.prompts import Prompt, Question, QuestionSet
from checks.generation.text_model import LocalModelUnavailable, ModelUnavailable, NotOffered, TextModel

CONTINUATION_TOKENS = 6  # enough for the first word in nearly any tokenizer
REPLY_TOKENS = 96
FACT_TOKENS = 32
FACT_REQUEST = "Answer with the name only. If you do not know, say that you do not know."

_THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)


class HasSource(Protocol):
    """A model of a claim: `checks.checkpoint.model.Model`."""

    @property
    def source(self) -> ModelSource:
        """Where its weights are."""


@dataclass(frozen=True)
class Respondents:
    """The models of a panel that can be asked, in the panel's order, and why the others cannot."""

    models: Mapping[str, Callable[[], TextModel]]
    not_asked: Mapping[str, str]


def candidate_model(behavior: Behavior, name: str, device: Callable[[], str], offline: bool = False) -> TextModel:
    """What answers for the candidate. Raises ModelUnavailable when the claim says nothing of it."""
    if behavior.endpoint is not None:
        return EndpointTextModel(behavior.endpoint, behavior.model, name, offline)
    if behavior.directory is None:
        raise LocalModelUnavailable(f"{name}: the claim's behavior names neither an endpoint nor a model to run")
    return LocalTextModel(Path(behavior.directory), name, device)


def respondents(
    behavior: Behavior, panel: Iterable[HasSource], device: Callable[[], str], offline: bool = False
) -> Respondents:
    """What answers for each reference: the model that the claim names at the endpoint, else a directory on disk.

    References on the hub are not downloaded to be run. Nothing is opened here.
    """
    at_endpoint = dict(behavior.references)
    models: dict[str, Callable[[], TextModel]] = {}
    not_asked: dict[str, str] = {}
    for reference in panel:
        name, path = reference.source.name, reference.source.path
        if name in at_endpoint and behavior.endpoint is not None:
            models[name] = _opener(EndpointTextModel, behavior.endpoint, at_endpoint[name], name, offline)
        elif path is not None and Path(path).is_dir():
            models[name] = _opener(LocalTextModel, Path(path), name, device)
        else:
            not_asked[name] = "no checkpoint directory, and behavior.references names no model at the endpoint for it"
    return Respondents(models, not_asked)


@dataclass
class Asked:
    """What models answered, in their order, and why the others did not.

    failure: the first that a model could not be asked for, other than that it has no such form of answer.
    """

    answers: dict[str, list[str]] = field(default_factory=dict)
    described: dict[str, dict[str, Any]] = field(default_factory=dict)
    not_asked: dict[str, str] = field(default_factory=dict)
    failure: ModelUnavailable | None = None


def ask_each(models: Mapping[str, Callable[[], TextModel]], ask: Callable[[TextModel], list[str]]) -> Asked:
    """Asks one model after the other. One that cannot be asked takes nothing from the others."""
    asked = Asked()
    for name, open_model in models.items():
        try:
            with open_model() as model:
                asked.answers[name] = ask(model)
                asked.described[name] = model.description
        except ModelUnavailable as error:
            asked.not_asked[name] = str(error)
            if not isinstance(error, NotOffered):
                asked.failure = asked.failure or error
    return asked


def beginnings(model: TextModel, prompts: Sequence[Prompt]) -> list[str]:
    """How the model goes on after each prompt, as it came. Raises NotOffered, ModelUnavailable."""
    return model.complete_all([prompt.text for prompt in prompts], CONTINUATION_TOKENS)


def replies(model: TextModel, prompts: Sequence[Prompt]) -> list[str]:
    """The reply to each prompt, as it came. Raises NotOffered, ModelUnavailable."""
    return [model.reply(prompt.text, REPLY_TOKENS) for prompt in prompts]


def facts(model: TextModel, questions: Sequence[Question], asked: QuestionSet) -> list[str]:
    """The answer to each question: in chat, or as a continuation of examples where there is no chat.

    Raises ModelUnavailable.
    """
    answers = []
    in_chat = True
    for question in questions:
        if in_chat:
            try:
                answers.append(model.reply(f"{FACT_REQUEST}\n\n{question.text}", FACT_TOKENS))
                continue
            except NotOffered:
                in_chat = False
        answers.append(model.complete(as_continuation(question, asked), FACT_TOKENS))
    return answers


def as_continuation(question: Question, asked: QuestionSet) -> str:
    """Examples of question and answer, then the question."""
    shown = "".join(f"Question: {example}\nAnswer: {answer}\n\n" for example, answer in asked.examples)
    return f"{shown}Question: {question.text}\nAnswer:"


def said(answer: str) -> str:
    """What a reply says, without what a reasoning model wrote to itself before it."""
    return _THOUGHT.sub("", answer).strip()


def said_first(answer: str) -> str:
    """The first line that a reply to a question says; a base model goes on with questions of its own."""
    lines = said(answer).splitlines()
    return lines[0] if lines else ""


def _opener(kind: Callable[..., TextModel], *arguments: object) -> Callable[[], TextModel]:
    return lambda: kind(*arguments)
