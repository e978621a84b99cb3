"""What a run shows and writes: the terminal, JUnit XML, verdict.json and evidence.jsonl."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.claim_runs import ONE_REFERENCE, WITHOUT_BASE, verdicts

Example = Callable[..., Path]


def test_junit_has_the_evidence_as_properties_and_the_yaml_line(pytester: pytest.Pytester, example: Example) -> None:
    example()
    pytester.runpytest("claims", "-k", "similarity", "--junitxml", "junit.xml", "-o", "junit_family=xunit1")
    suite = ElementTree.parse(pytester.path / "junit.xml").getroot()[0]
    case = next(one for one in suite if "similarity.mean[derived]" in str(one.get("name")))
    assert case.get("file") == "claims/small.yaml"
    assert case.get("line") == "5"  # xunit1 counts from 0
    properties = {one.get("name"): one.get("value") for one in case.iter("property")}
    assert properties["outcome"] == "supports"
    assert abs(float(str(properties["value"]))) < 0.1
    assert properties["threshold.supports_below"] == "0.1"
    evidence = json.loads(str(properties["evidence"]))
    assert len(evidence["read"]["candidate"]["sha256"]) == 64
    names = [one.get("name") for one in case.iter("property")]
    assert len(names) == len(set(names))


def test_the_report_is_the_same_bytes_every_time(pytester: pytest.Pytester, example: Example) -> None:
    example(text=ONE_REFERENCE)
    for name in ("first", "second"):
        pytester.runpytest("claims", "--report", name)
    for file in ("verdict.json", "evidence.jsonl"):
        assert (pytester.path / "first" / file).read_bytes() == (pytester.path / "second" / file).read_bytes()
    lines = (pytester.path / "first" / "evidence.jsonl").read_text().splitlines()
    assert all(json.loads(line)["claim"] == "small" for line in lines)
    assert len(lines) == len(verdicts(pytester.path / "first")["small"]["cases"])


def test_the_summary_names_what_was_not_measured(pytester: pytest.Pytester, example: Example) -> None:
    example(text=WITHOUT_BASE)
    result = pytester.runpytest("claims", "--offline")
    result.stdout.fnmatch_lines(
        [
            "claims/small.yaml: A small model was trained from scratch.",
            "  INCONCLUSIVE: *weights could not be had for the comparison with gone*",
            "  panel: gone (claims/gone)",
            "  worst evidence per family:",
            "    architecture*architecture.*[[]gone[]]*",
            "  not measured:",
            "    unavailable: *and * more: *no such directory*",
        ]
    )


def test_an_override_is_shown_with_its_reason(pytester: pytest.Pytester, example: Example) -> None:
    example(text=ONE_REFERENCE + "thresholds: {{similarity.mean: {{supports_below: 0.2, reason: to try it}}}}\n")
    result = pytester.runpytest("claims")
    assert result.ret == 10
    result.stdout.fnmatch_lines(["*similarity.mean: supports_below 0.2 (to try it)*", "*"])
    assert "the claim loosens similarity.mean.supports_below" in result.stdout.str()


def test_options_and_marks_are_documented_by_pytest_itself(pytester: pytest.Pytester) -> None:
    help_text = pytester.runpytest("--help").stdout.str()
    for option in ("--report=DIR", "--allow-missing", "--offline", "--torch-device"):
        assert option in help_text
    markers = pytester.runpytest("--markers").stdout.str()
    assert "@pytest.mark.independence:" in markers
    assert "@pytest.mark.decisive:" in markers


def test_an_unknown_device_is_an_error_of_the_run_and_not_of_the_model(
    pytester: pytest.Pytester, example: Example
) -> None:
    example()
    result = pytester.runpytest("claims", "-k", "mean", "--torch-device", "abacus")
    assert result.ret == 11
    assert "failed" not in result.parseoutcomes()
    result.stdout.fnmatch_lines(["*--torch-device abacus: no such device*"])


def test_a_report_directory_that_cannot_be_made_is_a_usage_error(pytester: pytest.Pytester, example: Example) -> None:
    example()
    pytester.makefile(".txt", occupied="")
    result = pytester.runpytest("claims", "--report", "occupied.txt")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--report *occupied.txt: cannot be made a directory*"])
