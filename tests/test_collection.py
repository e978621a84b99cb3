"""Which claims and cases are collected and selected, and what they share, as a user meets it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.claim_runs import INDEPENDENT, ONE_REFERENCE, verdicts

Example = Callable[..., Path]
QUICK = "identity or similarity or embedding or distribution"  # several families, and one with a case for each layer


def test_a_claim_named_on_the_command_line_is_collected_wherever_it_lies(
    pytester: pytest.Pytester, example: Example
) -> None:
    example(name="elsewhere.yaml")
    result = pytester.runpytest("--collect-only", "-q", "elsewhere.yaml")
    result.stdout.fnmatch_lines(["elsewhere.yaml::similarity.layer[[]base-3[]]", "elsewhere.yaml::architecture.panel"])


def test_a_claim_outside_the_root_directory_gets_a_verdict(pytester: pytest.Pytester, example: Example) -> None:
    example(name="outside.yaml", candidate="derived", text=ONE_REFERENCE + "checks: {{only: [similarity.mean]}}\n")
    inside = pytester.mkdir("inside")
    (inside / "pytest.ini").write_text("[pytest]\n")
    (inside / "test_ordinary.py").write_text("def test_one(): pass\n")
    pytester.chdir()
    for arguments in (["-c", "inside/pytest.ini", "outside.yaml"], ["--rootdir=inside", "outside.yaml", "inside"]):
        result = pytester.runpytest(*arguments, "--report", "out")
        assert result.ret == 1
        assert verdicts(pytester.path / "out")["small"]["verdict"] == "REFUTED"


def test_a_symlinked_claim_reads_the_paths_of_its_file(pytester: pytest.Pytester, example: Example) -> None:
    real = example(name="claims/real.yaml")
    (pytester.path / "link.yaml").symlink_to(real)
    assert pytester.runpytest("link.yaml", "-k", "mean").ret == 0


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


def test_other_yaml_in_a_directory_called_claims_is_left_alone(pytester: pytest.Pytester) -> None:
    path = pytester.path / "claims" / "data.yaml"
    path.parent.mkdir()
    path.write_text("insurance: 5\n")
    pytester.makepyfile("def test_one(): pass")
    assert pytester.runpytest().ret == 0


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
    assert pytester.runpytest("claims", "-k", "mean or declared").ret == 1
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
    example(text=ONE_REFERENCE)
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
    result = pytester.runpytest("claims/small.yaml", "-s", "-q", "-k", QUICK)
    opened = [line for line in result.outlines if "opened" in line]
    assert len(opened) == 2, opened


def test_shuffled_cases_still_open_each_pair_once(pytester: pytest.Pytester, example: Example) -> None:
    example()
    pytester.makeconftest(
        "import random\nimport pytest\n"
        "@pytest.hookimpl(trylast=True)\n"
        "def pytest_collection_modifyitems(items):\n    random.Random(1).shuffle(items)\n"
        "def pytest_fixture_setup(fixturedef, request):\n"
        "    if fixturedef.argname == 'pair':\n        print('opened', request.param.reference.name)\n"
    )
    result = pytester.runpytest("claims", "-s", "-q", "-k", QUICK)
    assert len([line for line in result.outlines if "opened" in line]) == 2


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


def test_one_claims_configuration_is_not_used_for_another(
    pytester: pytest.Pytester, example: Example, examples: Path
) -> None:
    example(text=ONE_REFERENCE)
    other = json.loads((examples / "independent" / "config.json").read_text())
    other["vocab_size"] = 4096
    (pytester.path / "claims" / "other.json").write_text(json.dumps(other))
    text = ONE_REFERENCE.replace("claim: small", "claim: second").replace(
        "{examples}/{candidate}}}", "{examples}/{candidate}, config: other.json}}"
    )
    example(name="claims/second.yaml", text=text)
    results = {}
    for order in (("small", "second"), ("second", "small")):
        claims = (f"claims/{name}.yaml" for name in order)
        pytester.runpytest(*claims, "--report", "out", "-k", f"declared or panel or channels or {QUICK}")
        results[order] = verdicts(pytester.path / "out")
    assert results["small", "second"] == results["second", "small"]
    declared = {
        name: one["cases"]["architecture.declared"]["outcome"] for name, one in results["small", "second"].items()
    }
    assert declared == {"small": "supports", "second": "contradicts"}
