"""Who is asked for a claim's models, in which form, and what counts of an answer."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from checks.checkpoint.model import Model
from checks.claim.behavior import Behavior
from checks.claim.model import ModelSource
from checks.claim.training import Training
from checks.generation.asked_claim import asked_claim
from checks.generation.asking import as_continuation, beginnings, candidate_model, facts, respondents, said, said_first
from checks.generation.endpoint import EndpointTextModel
from checks.generation.local import LocalTextModel
from checks.generation.prompts import continuations, knowledge_questions
from checks.generation.text_model import LocalModelUnavailable, NotOffered
from checks.pair.candidate import Candidate
from checks.statistics.agreement import equal_answers, first_word


@dataclass
class OnlyText:
    """A model without chat, which notes what it was asked."""

    asked: list[str]

    def complete(self, text: str, tokens: int) -> str:
        self.asked.append(text)
        return f" {len(self.asked)}"

    def reply(self, message: str, tokens: int) -> str:
        self.asked.append(message)
        raise NotOffered("no chat")


def cpu() -> str:
    return "cpu"


def test_a_base_model_is_tried_in_chat_once() -> None:
    asked = knowledge_questions()
    model: Any = OnlyText([])
    answers = facts(model, asked.questions[:3], asked)
    assert answers == [" 2", " 3", " 4"]
    assert model.asked[1] == as_continuation(asked.questions[0], asked)
    assert model.asked[1].endswith(f"Question: {asked.questions[0].text}\nAnswer:")


@pytest.mark.parametrize(
    ("answer", "whole", "first"),
    [
        (" Paris\nQuestion: next?", "Paris\nQuestion: next?", "Paris"),
        ("<think>Rome?\nno</think>\n\nParis", "Paris", "Paris"),
        ("<think>was cut off", "", ""),
        ("\n\n", "", ""),
    ],
)
def test_what_counts_of_an_answer(answer: str, whole: str, first: str) -> None:
    assert said(answer) == whole
    assert said_first(answer) == first


def test_who_answers(tmp_path: Path) -> None:
    panel = [
        Model(ModelSource(name="disk", path=str(tmp_path)), None, ("",)),
        Model(ModelSource(name="served", path=str(tmp_path)), None, ("",)),
        Model(ModelSource(name="hub", repo="org/hub"), None, ("",)),
        Model(ModelSource(name="gone", path=str(tmp_path / "gone")), None, ("",)),
    ]
    behavior = Behavior("http://127.0.0.1:9/v1", "ours", references=(("served", "theirs"),))
    found = respondents(behavior, panel, cpu)
    assert list(found.models) == ["disk", "served"]
    assert set(found.not_asked) == {"hub", "gone"}
    disk, served = (opened() for opened in found.models.values())
    assert isinstance(disk, LocalTextModel)
    assert isinstance(served, EndpointTextModel)
    assert (served.model, served.name) == ("theirs", "served")


def test_the_candidate(tmp_path: Path) -> None:
    assert isinstance(candidate_model(Behavior("http://127.0.0.1:9/v1"), "candidate", cpu), EndpointTextModel)
    assert isinstance(candidate_model(Behavior(directory=str(tmp_path)), "candidate", cpu), LocalTextModel)
    with pytest.raises(LocalModelUnavailable, match="neither an endpoint nor a model"):
        candidate_model(Behavior(knowledge_cutoff="2025"), "candidate", cpu)


def test_what_the_catalogue_calls_derived_is_no_control() -> None:
    made = Candidate(ModelSource(name="candidate"), None, ("",), Training(), frozenset())
    keys = ("deepseek_r1", "deepseek_v3", "qwen2_5_72b")
    references = tuple(Model(ModelSource(name=key, catalog_key=key), None, ("",)) for key in keys)
    vars(made).update(behavior=Behavior("http://127.0.0.1:9/v1"), references=references)
    found = asked_claim(made)
    assert found is not None
    assert found.related() == {frozenset(("deepseek_r1", "deepseek_v3"))}


def test_a_local_copy_agrees_with_its_source(
    examples: Path, tmp_path: Path, save_checkpoint: Any, llama_tensors: Any, llama_config: Any
) -> None:
    """A copy of one of four random models, run as they stand."""
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8, "vocab_size": 1024}
    prompts = continuations().prompts[:40]
    answers: dict[str, list[str]] = {}
    for seed, name in enumerate(("r1", "r2", "r3", "r4")):
        directory = save_checkpoint(name, llama_tensors(seed, **small), llama_config(**small))
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(examples / "base" / file, directory)
    for name, directory in {
        "copy": Path(shutil.copytree(tmp_path / "r2", tmp_path / "copy")),
        **{name: tmp_path / name for name in ("r1", "r2", "r3", "r4")},
    }.items():
        with LocalTextModel(directory, name) as model:
            answers[name] = [first_word(text) for text in beginnings(model, prompts)]
    found = {one.reference: one for one in equal_answers(answers.pop("copy"), answers, 1e-3)}
    assert found["r2"].agreement == 1.0
    assert found["r2"].p < 1e-9
    assert all(one.p > 0.5 for name, one in found.items() if name != "r2")
