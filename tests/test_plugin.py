"""Outcomes and exit statuses of runs, as a user meets them, also beside tests and plugins of their own."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.claim_runs import INDEPENDENT, ONE_REFERENCE, WITHOUT_BASE, verdicts

Example = Callable[..., Path]


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


@pytest.mark.parametrize("ending", ["raise OSError('late')", "pytest.skip('late')"])
def test_a_teardown_does_not_take_a_refutation_back(pytester: pytest.Pytester, example: Example, ending: str) -> None:
    example(candidate="derived", text=ONE_REFERENCE)
    pytester.makeconftest(f"import pytest\n@pytest.fixture(autouse=True)\ndef late():\n    yield\n    {ending}\n")
    result = pytester.runpytest("claims", "-k", "mean", "--report", "out")
    assert result.ret == 1
    assert verdicts(pytester.path / "out")["small"]["verdict"] == "REFUTED"


def test_a_refutation_outranks_a_mistaken_claim(pytester: pytest.Pytester, example: Example) -> None:
    example(candidate="derived", text=ONE_REFERENCE)
    (pytester.path / "claims" / "wrong.yaml").write_text("claim: wrong\n")
    assert pytester.runpytest("claims", "--continue-on-collection-errors", "-k", "mean").ret == 1


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
    example(text=ONE_REFERENCE)
    clean = pytester.runpytest("claims", "-k", "units or mean", "--report", "out")
    assert clean.ret == 0
    assert verdicts(pytester.path / "out")["small"]["verdict"] == "PARTIAL"
    no_decisive = pytester.runpytest("claims", "-m", "suspicion")
    assert no_decisive.ret == 10


def test_a_claim_named_and_wholly_deselected_is_partial(pytester: pytest.Pytester, example: Example) -> None:
    example(text=ONE_REFERENCE)
    example(name="claims/second.yaml", text=ONE_REFERENCE.replace("claim: small", "claim: second"), candidate="derived")
    result = pytester.runpytest(
        "claims/small.yaml", "claims/second.yaml", "--deselect", "claims/second.yaml", "--report", "out"
    )
    assert verdicts(pytester.path / "out")["second"]["verdict"] == "PARTIAL"
    assert result.ret == 10


def test_failing_ordinary_tests_keep_their_own_exit_status(pytester: pytest.Pytester, example: Example) -> None:
    example()
    pytester.makepyfile("def test_one(): assert False")
    assert pytester.runpytest("-k", "test_one or mean").ret == 1
    pytester.makepyfile("def test_one(): pass")
    assert pytester.runpytest("-k", "test_one or mean").ret == 0
    assert pytester.runpytest("-k", "nothing").ret == pytest.ExitCode.NO_TESTS_COLLECTED


def test_runs_without_claims_are_left_alone(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_one(): assert False")
    result = pytester.runpytest()
    assert result.ret == 1
    assert "= claims =" not in result.stdout.str()


def test_fixtures_of_the_same_name_in_a_users_conftest_do_no_harm(pytester: pytest.Pytester, example: Example) -> None:
    example()
    pytester.makeconftest("import pytest\n@pytest.fixture\ndef device():\n    return 'abacus'\n")
    assert pytester.runpytest("claims", "-k", "panel or units or mean").ret == 0


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
