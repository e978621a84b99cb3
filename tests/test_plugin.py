"""The plugin as a user meets it: collection, selection, outcomes, exit statuses, reports."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Example = Callable[..., Path]

INDEPENDENT = """\
claim: small
statement: A small model was trained from scratch.
model: {{name: candidate, path: {examples}/{candidate}}}
references:
  - {{name: base, path: {examples}/base}}
  - {{name: derived, path: {examples}/derived}}
nearest: 0
"""

ONE_REFERENCE = INDEPENDENT.replace("  - {{name: derived, path: {examples}/derived}}\n", "")

WITHOUT_BASE = """\
claim: small
statement: A small model was trained from scratch.
model: {{path: {examples}/derived}}
references: [{{name: gone, path: gone, config: {examples}/base/config.json}}]
nearest: 0
"""


@pytest.fixture
def example(pytester: pytest.Pytester, examples: Path) -> Example:
    """Writes a claim about the trained checkpoints."""

    def write(text: str = INDEPENDENT, name: str = "claims/small.yaml", **values: str) -> Path:
        path = pytester.path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text.format(**{"examples": str(examples), "candidate": "independent", **values}))
        return path

    return write


def verdicts(directory: Path) -> dict[str, Any]:
    """The claims of a written report."""
    loaded: dict[str, Any] = json.loads((directory / "verdict.json").read_text())["claims"]
    return loaded


# Collection and selection


def test_a_claim_named_on_the_command_line_is_collected_wherever_it_lies(
    pytester: pytest.Pytester, example: Example
) -> None:
    example(name="elsewhere.yaml")
    result = pytester.runpytest("--collect-only", "-q", "elsewhere.yaml")
    result.stdout.fnmatch_lines(["elsewhere.yaml::similarity.layer[[]base-3[]]", "elsewhere.yaml::architecture.panel"])


def test_a_claims_directory_is_collected_and_other_yaml_is_not(pytester: pytest.Pytester, example: Example) -> None:
    example()
    example(name="other.yaml")
    (pytester.path / "claims" / "deeper").mkdir()
    example(name="claims/deeper/nested.yaml")
    pytester.makepyfile(test_ordinary="def test_one(): pass")
    result = pytester.runpytest("--collect-only", "-q")
    text = result.stdout.str()
    assert "claims/small.yaml::identity.sha256[base]" in text
    assert "test_ordinary.py::test_one" in text
    assert "other.yaml" not in text
    assert "nested.yaml" not in text


def test_collection_imports_no_torch(pytester: pytest.Pytester, example: Example) -> None:
    example()
    pytester.makeconftest(
        "import sys\ndef pytest_collection_finish():\n    print('torch imported:', 'torch' in sys.modules)"
    )
    result = pytester.runpytest_subprocess("--collect-only", "-q", "-s", "claims")
    result.stdout.fnmatch_lines(["*torch imported: False*"])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["claims/small.yaml::similarity.mean[base]"], ["similarity.mean[base]"]),
        (["claims/small.yaml::identity.sha256"], ["identity.sha256[base]", "identity.sha256[derived]"]),
        (["claims", "-k", "mean and derived"], ["similarity.mean[derived]"]),
        (["claims", "-m", "independence", "-k", "units"], ["independence.units[base]", "independence.units[derived]"]),
        (["claims", "-m", "supporting", "-k", "profile"], ["similarity.profile[base]", "similarity.profile[derived]"]),
    ],
)
def test_cases_are_selected_as_pytest_users_expect(
    pytester: pytest.Pytester, example: Example, arguments: list[str], expected: list[str]
) -> None:
    example()
    result = pytester.runpytest("--collect-only", "-q", *arguments)
    collected = [line.partition("::")[2] for line in result.outlines if "::" in line]
    assert collected == expected


def test_last_failed_runs_what_failed(pytester: pytest.Pytester, example: Example) -> None:
    example(candidate="derived", text=ONE_REFERENCE)
    assert pytester.runpytest("claims").ret == 1
    result = pytester.runpytest("--lf", "claims", "--collect-only", "-q")
    collected = [line.partition("::")[2] for line in result.outlines if "::" in line]
    assert "similarity.mean[base]" in collected
    assert "architecture.declared" not in collected


def test_the_three_mistakes_of_a_claim_are_three_located_lines(pytester: pytest.Pytester, example: Example) -> None:
    example()
    (pytester.path / "claims" / "wrong.yaml").write_text(
        "claim: wrong\nstatement: x\nmodel: solar_open_100b\nreferences: [mixtral]\nnearest: -1\nthreshold: {}\n"
    )
    result = pytester.runpytest("claims/wrong.yaml")
    assert result.ret == pytest.ExitCode.INTERRUPTED
    text = result.stdout.str()
    assert "claims/wrong.yaml:4:14: unknown model 'mixtral'; did you mean 'mixtral_8x7b'?" in text
    assert "claims/wrong.yaml:5:10: nearest: -1 is less than 0" in text
    assert "claims/wrong.yaml:6:1: unknown key 'threshold'; did you mean 'thresholds'?" in text
    assert "Traceback" not in text
    assert "INTERNALERROR" not in text


@pytest.mark.parametrize("workers", [[], ["-n", "2"]])
def test_an_invalid_claim_does_not_stop_the_others_when_asked_to_continue(
    pytester: pytest.Pytester, example: Example, workers: list[str]
) -> None:
    example()
    (pytester.path / "claims" / "wrong.yaml").write_text("claim: wrong\n")
    result = pytester.runpytest("claims", "--continue-on-collection-errors", "--report", "out", *workers)
    assert verdicts(pytester.path / "out")["small"]["verdict"] == "SUPPORTED"
    assert result.ret == pytest.ExitCode.INTERRUPTED


def test_two_claims_of_one_name_are_a_usage_error(pytester: pytest.Pytester, example: Example) -> None:
    example()
    example(name="claims/twin.yaml")
    result = pytester.runpytest("claims")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*claims/twin.yaml:1: the claim 'small' stands in claims/small.yaml too*"])


def test_each_pair_is_opened_once(pytester: pytest.Pytester, example: Example) -> None:
    example()
    example(name="claims/second.yaml", text=INDEPENDENT.replace("claim: small", "claim: second"))
    pytester.makeconftest(
        "def pytest_fixture_setup(fixturedef, request):\n"
        "    if fixturedef.argname == 'pair':\n"
        "        print('opened', request.param.reference.name)\n"
    )
    result = pytester.runpytest("claims/small.yaml", "-s", "-q")
    opened = [line for line in result.outlines if "opened" in line]
    assert len(opened) == 2, opened


def test_equal_names_of_different_models_never_share_a_stream(
    pytester: pytest.Pytester, example: Example, examples: Path
) -> None:
    example(text=ONE_REFERENCE, candidate="derived")
    text = INDEPENDENT.replace("claim: small", "claim: second").replace("/base}}", "/independent}}")
    example(
        name="claims/second.yaml",
        text=text.replace("  - {{name: derived, path: {examples}/derived}}\n", ""),
        candidate="derived",
    )
    pytester.runpytest("claims", "-k", "units", "--report", "out")
    found = verdicts(pytester.path / "out")
    assert found["small"]["cases"]["independence.units[base]"]["outcome"] == "contradicts"
    assert found["second"]["cases"]["independence.units[base]"]["outcome"] == "supports"


# Outcomes and exit statuses


def test_an_independent_model_is_supported(pytester: pytest.Pytester, example: Example) -> None:
    example()
    result = pytester.runpytest("claims", "--report", "out")
    assert result.ret == 0
    found = verdicts(pytester.path / "out")["small"]
    assert found["verdict"] == "SUPPORTED"
    assert found["panel"] == ["base", "derived"]
    assert not any("not proof against permuted weights" in limit for limit in found["limits"])
    result.stdout.fnmatch_lines(["*SUPPORTED: no evidence of inherited weights from any of the 2 references below*"])


def test_a_derived_model_is_refuted_and_the_failures_say_why(pytester: pytest.Pytester, example: Example) -> None:
    panel = INDEPENDENT.replace("derived, path: {examples}/derived", "x, path: {examples}/independent")
    example(candidate="derived", text=panel)
    result = pytester.runpytest("claims", "--report", "out")
    assert result.ret == 1
    found = verdicts(pytester.path / "out")["small"]
    assert found["verdict"] == "REFUTED"
    assert "shares weights with base" in found["text"]
    assert found["cases"]["similarity.mean[x]"]["outcome"] == "supports"
    result.stdout.fnmatch_lines(
        [
            "claims/small.yaml:5: similarity.mean[[]base[]] contradicts the claim 'small'",
            "*reaches the contradicting bound 0.8*",
            "*documented: weight-analysis.md*",
        ]
    )
    assert "def mean(" not in result.stdout.str()


def test_disclosed_reuse_is_an_expected_failure_and_the_rest_decides(
    pytester: pytest.Pytester, example: Example
) -> None:
    example(
        text="""\
claim: parts
statement: One part was reused.
model: {{path: {examples}/derived}}
nearest: 0
components:
  text: {{prefix: '', references: [{{name: independent, path: {examples}/independent}}]}}
  embedding:
    prefix: model.embed_tokens.
    references: [{{name: base, path: {examples}/base}}]
    disclosed: [base]
"""
    )
    result = pytester.runpytest("claims", "--report", "out", "-rx")
    found = verdicts(pytester.path / "out")["parts"]
    assert found["components"]["embedding"]["verdict"] == "DISCLOSED"
    assert found["components"]["text"]["verdict"] == "SUPPORTED"
    assert found["verdict"] == "SUPPORTED"
    assert found["text"].startswith("except embedding: no evidence of inherited weights from the one reference below")
    result.stdout.fnmatch_lines(["  SUPPORTED except embedding: *"])
    assert result.ret == 0
    outcomes = result.parseoutcomes()
    assert outcomes["xfailed"] >= 1
    assert "failed" not in outcomes


def test_runxfail_does_not_turn_a_disclosed_finding_into_a_refutation(
    pytester: pytest.Pytester, example: Example
) -> None:
    example(
        text="claim: x\nstatement: y\nmodel: {{path: {examples}/derived}}\nnearest: 0\n"
        "components: {{all: {{prefix: '', references: [{{name: base, path: {examples}/base}}], disclosed: [base]}}}}\n"
    )
    result = pytester.runpytest("claims", "--runxfail", "--report", "out")
    assert verdicts(pytester.path / "out")["x"]["verdict"] == "DISCLOSED"
    assert result.ret == 10


def test_missing_weights_are_errors_and_skips_when_allowed(pytester: pytest.Pytester, example: Example) -> None:
    example(text=WITHOUT_BASE)
    result = pytester.runpytest("claims", "--report", "out")
    assert result.ret == 11
    assert "failed" not in result.parseoutcomes()
    assert result.parseoutcomes()["errors"] > 5
    result.stdout.fnmatch_lines(["*no such directory; correct the path in the claim*"])
    allowed = pytester.runpytest("claims", "--allow-missing", "--report", "out", "-rs")
    assert allowed.ret == 10
    assert "errors" not in allowed.parseoutcomes()
    allowed.stdout.fnmatch_lines(["*unavailable: *no such directory*"])
    assert verdicts(pytester.path / "out")["small"]["verdict"] == "INCONCLUSIVE"
    offline = pytester.runpytest("claims", "--offline")
    assert offline.ret == 10


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("raise ValueError('broken')", "ValueError: broken"),
        ("assert False, 'an assertion of nobody'", "an assertion of nobody"),
        ("raise KeyboardInterruptLike()", "NameError"),
    ],
)
@pytest.mark.parametrize("phase", ["setup", "call", "teardown"])
def test_any_other_exception_is_an_error_in_every_phase(
    pytester: pytest.Pytester, example: Example, body: str, reason: str, phase: str
) -> None:
    example()
    pieces = {
        "setup": f"@pytest.fixture\ndef candidate():\n    {body}\n",
        "call": f"class Broken:\n    @property\n    def architecture(self):\n        {body}\n"
        "@pytest.fixture\ndef candidate():\n    return Broken()\n",
        "teardown": "class Fine:\n    architecture = None\n"
        f"@pytest.fixture\ndef candidate():\n    yield Fine()\n    {body}\n",
    }
    # `candidate` is parametrized indirectly; the override takes no part in that.
    pytester.makeconftest("import pytest\n" + pieces[phase].replace("def candidate()", "def candidate(request)"))
    result = pytester.runpytest("claims", "-k", "panel", "--report", "out", "--junitxml", "junit.xml")
    outcomes = result.parseoutcomes()
    assert "failed" not in outcomes
    assert outcomes["errors"] == 1
    assert result.ret == 11
    case = verdicts(pytester.path / "out")["small"]["cases"]["architecture.panel"]
    assert case["outcome"] == "error"
    assert reason in case["evidence"]["reason"]
    suite = ElementTree.parse(pytester.path / "junit.xml").getroot()[0]
    assert (suite.get("failures"), suite.get("errors")) == ("0", "1")


def test_a_check_that_does_not_judge_is_an_error(pytester: pytest.Pytester, example: Example) -> None:
    example()
    pytester.makeconftest(
        "import pytest\n@pytest.hookimpl(tryfirst=True)\n"
        "def pytest_pyfunc_call(pyfuncitem):\n    return True if 'panel' in pyfuncitem.name else None\n"
    )
    result = pytester.runpytest("claims", "-k", "panel")
    assert result.parseoutcomes() == {"errors": 1, "deselected": result.parseoutcomes()["deselected"]}
    result.stdout.fnmatch_lines(["*architecture.panel returned without judging its case*"])


def test_a_fail_fast_run_keeps_its_refutation_and_reports_the_rest_as_missing(
    pytester: pytest.Pytester, example: Example
) -> None:
    example(candidate="derived", text=ONE_REFERENCE)
    result = pytester.runpytest("claims", "-x", "-m", "decisive", "--report", "out")
    assert result.ret == 1
    found = verdicts(pytester.path / "out")["small"]
    assert found["verdict"] == "REFUTED"
    assert found["counts"]["no report"] > 0


def test_deselection_is_partial(pytester: pytest.Pytester, example: Example) -> None:
    example()
    clean = pytester.runpytest("claims", "-k", "units or mean", "--report", "out")
    assert clean.ret == 0
    assert verdicts(pytester.path / "out")["small"]["verdict"] == "PARTIAL"
    no_decisive = pytester.runpytest("claims", "-m", "suspicion")
    assert no_decisive.ret == 10


def test_failing_ordinary_tests_keep_their_own_exit_status(pytester: pytest.Pytester, example: Example) -> None:
    example()
    pytester.makepyfile("def test_one(): assert False")
    assert pytester.runpytest().ret == 1
    pytester.makepyfile("def test_one(): pass")
    assert pytester.runpytest().ret == 0
    assert pytester.runpytest("-k", "nothing").ret == pytest.ExitCode.NO_TESTS_COLLECTED


def test_runs_without_claims_are_left_alone(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_one(): assert False")
    result = pytester.runpytest()
    assert result.ret == 1
    assert "= claims =" not in result.stdout.str()


# Reports


def test_junit_has_the_evidence_as_properties_and_the_yaml_line(pytester: pytest.Pytester, example: Example) -> None:
    example()
    pytester.runpytest("claims", "--junitxml", "junit.xml", "-o", "junit_family=xunit1")
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
    example()
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
    example(text=INDEPENDENT + "thresholds: {{similarity.mean: {{supports_below: 0.2, reason: to try it}}}}\n")
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


# What two reviews showed


def test_a_claim_outside_the_root_directory_gets_a_verdict(pytester: pytest.Pytester, example: Example) -> None:
    example(name="outside.yaml", candidate="derived", text=ONE_REFERENCE)
    inside = pytester.mkdir("inside")
    (inside / "pytest.ini").write_text("[pytest]\n")
    (inside / "test_ordinary.py").write_text("def test_one(): pass\n")
    pytester.chdir()
    for arguments in (["-c", "inside/pytest.ini", "outside.yaml"], ["--rootdir=inside", "outside.yaml", "inside"]):
        result = pytester.runpytest(*arguments, "--report", "out")
        assert result.ret == 1
        assert verdicts(pytester.path / "out")["small"]["verdict"] == "REFUTED"


def test_a_claim_named_and_wholly_deselected_is_partial(pytester: pytest.Pytester, example: Example) -> None:
    example()
    example(name="claims/second.yaml", text=ONE_REFERENCE.replace("claim: small", "claim: second"), candidate="derived")
    result = pytester.runpytest(
        "claims/small.yaml", "claims/second.yaml", "--deselect", "claims/second.yaml", "--report", "out"
    )
    assert verdicts(pytester.path / "out")["second"]["verdict"] == "PARTIAL"
    assert result.ret == 10


@pytest.mark.parametrize("ending", ["raise OSError('late')", "pytest.skip('late')"])
def test_a_teardown_does_not_take_a_refutation_back(pytester: pytest.Pytester, example: Example, ending: str) -> None:
    example(candidate="derived", text=ONE_REFERENCE)
    pytester.makeconftest(f"import pytest\n@pytest.fixture(autouse=True)\ndef late():\n    yield\n    {ending}\n")
    result = pytester.runpytest("claims", "-k", "mean", "--report", "out")
    assert result.ret == 1
    assert verdicts(pytester.path / "out")["small"]["verdict"] == "REFUTED"


def test_one_claims_configuration_is_not_used_for_another(
    pytester: pytest.Pytester, example: Example, examples: Path
) -> None:
    example()
    other = json.loads((examples / "independent" / "config.json").read_text())
    other["vocab_size"] = 4096
    (pytester.path / "claims" / "other.json").write_text(json.dumps(other))
    text = INDEPENDENT.replace("claim: small", "claim: second").replace(
        "{examples}/{candidate}}}", "{examples}/{candidate}, config: other.json}}"
    )
    example(name="claims/second.yaml", text=text)
    results = {}
    for order in (("small", "second"), ("second", "small")):
        pytester.runpytest(*(f"claims/{name}.yaml" for name in order), "--report", "out")
        results[order] = verdicts(pytester.path / "out")
    assert results["small", "second"] == results["second", "small"]
    declared = {
        name: one["cases"]["architecture.declared"]["outcome"] for name, one in results["small", "second"].items()
    }
    assert declared == {"small": "supports", "second": "contradicts"}


def test_a_report_directory_that_cannot_be_made_is_a_usage_error(pytester: pytest.Pytester, example: Example) -> None:
    example()
    pytester.makefile(".txt", occupied="")
    result = pytester.runpytest("claims", "--report", "occupied.txt")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--report *occupied.txt: cannot be made a directory*"])


def test_a_refutation_outranks_a_mistaken_claim(pytester: pytest.Pytester, example: Example) -> None:
    example(candidate="derived", text=ONE_REFERENCE)
    (pytester.path / "claims" / "wrong.yaml").write_text("claim: wrong\n")
    assert pytester.runpytest("claims", "--continue-on-collection-errors").ret == 1


def test_a_part_that_no_component_names_keeps_a_claim_open(pytester: pytest.Pytester, example: Example) -> None:
    example(
        text="claim: x\nstatement: y\nmodel: {{path: {examples}/independent}}\nnearest: 0\n"
        "references: [{{name: base, path: {examples}/base}}]\ncomponents: {{part: {{prefix: model.layers.}}}}\n"
    )
    result = pytester.runpytest("claims", "--report", "out")
    assert result.ret == 10
    assert (
        "of the candidate's weights belong to no component of the claim" in verdicts(pytester.path / "out")["x"]["text"]
    )


@pytest.mark.parametrize("name", ["decoder", "text"])
def test_the_component_with_the_most_weights_is_the_text_decoder(
    pytester: pytest.Pytester, example: Example, name: str
) -> None:
    example(
        text="claim: x\nstatement: y\nmodel: {{path: {examples}/derived}}\nnearest: 0\ncomponents:\n"
        f"  {name}:\n    prefix: model.\n    disclosed: [base]\n"
        "    references: [{{name: base, path: {examples}/base}}]\n"
        "  head: {{prefix: lm_head., references: [{{name: independent, path: {examples}/independent}}]}}\n"
    )
    result = pytester.runpytest("claims", "--report", "out")
    assert result.ret == 10
    assert verdicts(pytester.path / "out")["x"]["verdict"] in ("DISCLOSED", "INCONCLUSIVE")


def test_other_yaml_in_a_directory_called_claims_is_left_alone(pytester: pytest.Pytester) -> None:
    path = pytester.path / "claims" / "data.yaml"
    path.parent.mkdir()
    path.write_text("insurance: 5\n")
    pytester.makepyfile("def test_one(): pass")
    assert pytester.runpytest().ret == 0


def test_fixtures_of_the_same_name_in_a_users_conftest_do_no_harm(pytester: pytest.Pytester, example: Example) -> None:
    example()
    pytester.makeconftest("import pytest\n@pytest.fixture\ndef device():\n    return 'abacus'\n")
    assert pytester.runpytest("claims").ret == 0


def test_the_suites_fixtures_explain_themselves_in_ordinary_tests(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_one(pair): pass\ndef test_two(judge): pass")
    result = pytester.runpytest()
    result.stdout.fnmatch_lines(["*the fixture 'pair' of from-scratch belongs to the cases of claims*"])
    result.stdout.fnmatch_lines(["*the fixture 'judge' of from-scratch belongs to the cases of claims*"])


def test_values_of_other_plugins_keep_their_names(pytester: pytest.Pytester, example: Example) -> None:
    example(text=WITHOUT_BASE)
    pytester.makepyfile(
        other="def pytest_addoption(parser):\n"
        "    parser.addoption('--no-network', dest='offline', action='store_true')\n"
    )
    assert pytester.runpytest_subprocess("-p", "other", "claims", "--offline").ret == 10


def test_shuffled_cases_still_open_each_pair_once(pytester: pytest.Pytester, example: Example) -> None:
    example()
    pytester.makeconftest(
        "import random\nimport pytest\n"
        "@pytest.hookimpl(trylast=True)\n"
        "def pytest_collection_modifyitems(items):\n    random.Random(1).shuffle(items)\n"
        "def pytest_fixture_setup(fixturedef, request):\n"
        "    if fixturedef.argname == 'pair':\n        print('opened', request.param.reference.name)\n"
    )
    result = pytester.runpytest("claims", "-s", "-q")
    assert len([line for line in result.outlines if "opened" in line]) == 2


def test_a_symlinked_claim_reads_the_paths_of_its_file(pytester: pytest.Pytester, example: Example) -> None:
    real = example(name="claims/real.yaml")
    (pytester.path / "link.yaml").symlink_to(real)
    assert pytester.runpytest("link.yaml", "-k", "mean").ret == 0
