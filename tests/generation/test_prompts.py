"""The prompt files: complete, unambiguous, and dated facts that do not answer themselves."""

from __future__ import annotations

from collections import Counter

import pytest

from checks.generation.prompts import PromptSet, Question, continuations, knowledge_questions, refusals
from checks.statistics.agreement import says, words
from checks.statistics.cutoff import month_number

QUESTIONS = knowledge_questions().questions


@pytest.mark.parametrize("prompts", [continuations(), refusals()], ids=lambda prompts: prompts.name)
def test_prompts_are_distinct(prompts: PromptSet) -> None:
    assert prompts.version >= 1
    assert len({prompt.id for prompt in prompts.prompts}) == len(prompts.prompts)
    assert len({" ".join(words(prompt.text)) for prompt in prompts.prompts}) == len(prompts.prompts)
    assert all(prompt.text == prompt.text.strip() for prompt in prompts.prompts), "a trailing space splits tokens"
    assert prompts.as_record()["prompts"] == len(prompts.prompts)


def test_there_are_questions_for_every_month() -> None:
    months = Counter(month_number(question.date) for question in QUESTIONS)
    assert all(months[month] for month in range(month_number("2022-01"), month_number("2025-12") + 1))
    assert sum(count for month, count in months.items() if month < month_number("2022-01")) >= 12


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.id)
def test_questions(question: Question) -> None:
    assert len(question.date) == 10
    assert question.source.startswith("https://")
    assert 0 < question.chance <= 0.5
    assert question.accept
    assert all(words(name) for name in question.accept)
    assert not says(question.text, question.accept), "the question names its answer"


def test_questions_are_in_order_of_their_dates_and_distinct() -> None:
    assert [one.date for one in QUESTIONS] == sorted(one.date for one in QUESTIONS)
    assert len({one.id for one in QUESTIONS}) == len(QUESTIONS)
    assert len({one.text for one in QUESTIONS}) == len(QUESTIONS)


def test_the_examples_of_form_are_older_than_every_question() -> None:
    for text, answer in knowledge_questions().examples:
        assert answer
        assert not any(str(year) in text for year in range(2016, 2026))
