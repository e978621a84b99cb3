"""Several workers: the same verdict, one worker per pair, and a dead worker accuses nobody."""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from checks.plugin import pair_group
from tests.claim_runs import verdicts

CLAIM = """\
claim: small
statement: A small model was trained from scratch.
model: {{name: candidate, path: {examples}/{candidate}}}
references:
  - {{name: base, path: {examples}/base}}
  - {{name: independent, path: {examples}/independent}}
nearest: 0
"""


@pytest.fixture
def derived_claim(pytester: pytest.Pytester, examples: Path) -> Path:
    """A claim about the derived example, in pytester's directory."""
    path = pytester.path / "claims" / "small.yaml"
    path.parent.mkdir()
    path.write_text(CLAIM.format(examples=examples, candidate="derived"))
    return path


def test_verdict_and_exit_status_are_the_same_with_and_without_workers(
    pytester: pytest.Pytester, derived_claim: Path
) -> None:
    alone = pytester.runpytest("claims", "--report", "alone")
    shared = pytester.runpytest("claims", "--report", "shared", "-n", "2")
    assert alone.ret == shared.ret == 1
    for file in ("verdict.json", "evidence.jsonl"):
        assert (pytester.path / "alone" / file).read_bytes() == (pytester.path / "shared" / file).read_bytes()
    shared.stdout.fnmatch_lines(["*REFUTED: shares weights with base*"])


def test_deselected_cases_are_seen_by_the_controller(pytester: pytest.Pytester, derived_claim: Path) -> None:
    result = pytester.runpytest("claims", "-n", "2", "-k", "independent and mean", "--report", "out")
    assert verdicts(pytester.path / "out")["small"]["verdict"] == "PARTIAL"
    assert result.ret == 0


def test_all_cases_of_a_pair_run_on_one_worker(pytester: pytest.Pytester, derived_claim: Path) -> None:
    result = pytester.runpytest("claims", "-n", "2", "-v", "-k", "identity or similarity")
    workers: dict[str, set[str]] = defaultdict(set)
    for worker, reference in re.findall(
        r"\[(gw\d)\].*?claims/small\.yaml::\S+\[(base|independent)", result.stdout.str()
    ):
        workers[reference].add(worker)
    assert set(workers) == {"base", "independent"}
    assert all(len(used) == 1 for used in workers.values()), workers


def test_a_crashed_worker_is_an_error_and_never_a_failure(pytester: pytest.Pytester, derived_claim: Path) -> None:
    pytester.makeconftest(
        "import os\nimport pytest\n"
        "class Deadly:\n    @property\n    def architecture(self):\n        os._exit(3)\n"
        "@pytest.fixture\ndef candidate(request):\n    return Deadly()\n"
    )
    result = pytester.runpytest("claims", "-n", "2", "-k", "panel", "--report", "out", "--junitxml", "junit.xml")
    assert result.ret == 11
    assert "failed" not in result.parseoutcomes()
    case = verdicts(pytester.path / "out")["small"]["cases"]["architecture.panel"]
    assert case["outcome"] == "error"
    assert "crashed" in case["evidence"]["reason"]
    junit = (pytester.path / "junit.xml").read_text()
    assert 'failures="0"' in junit
    assert 'errors="1"' in junit


def test_the_rest_of_a_pair_is_run_after_its_worker_died(pytester: pytest.Pytester, derived_claim: Path) -> None:
    pytester.makeconftest(
        "import os\nimport pytest\n@pytest.hookimpl(tryfirst=True)\n"
        "def pytest_pyfunc_call(pyfuncitem):\n"
        "    if pyfuncitem.name == 'similarity.mean[independent]':\n        os._exit(3)\n"
    )
    result = pytester.runpytest("claims", "-n", "2", "-m", "decisive", "-k", "mean or units", "--report", "out")
    cases = verdicts(pytester.path / "out")["small"]["cases"]
    assert cases["similarity.mean[independent]"]["outcome"] == "error"
    assert cases["independence.units[independent]"]["outcome"] == "supports"
    assert cases["independence.units[base]"]["outcome"] == "contradicts"
    assert result.ret == 1


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_run_goes_on_after_a_worker_died_on_one_of_few_cases(
    pytester: pytest.Pytester, examples: Path, workers: str
) -> None:
    """Units of a single case: a worker that replaces a dead one must not wait for a second case that never comes."""
    references = "".join(f"  - {{name: r{n}, path: {examples}/base}}\n" for n in range(4))
    (pytester.path / "few.yaml").write_text(
        f"claim: few\nstatement: x\nmodel: {{path: {examples}/independent}}\nnearest: 0\n"
        f"checks: {{only: [similarity.mean]}}\nreferences:\n{references}"
    )
    pytester.makeconftest(
        "import os\nimport pytest\n@pytest.hookimpl(tryfirst=True)\n"
        "def pytest_pyfunc_call(pyfuncitem):\n    if '[r1]' in pyfuncitem.name:\n        os._exit(3)\n"
    )
    result = pytester.runpytest_subprocess("few.yaml", "-n", workers, "--report", "out", timeout=120)
    outcomes = {case: one["outcome"] for case, one in verdicts(pytester.path / "out")["few"]["cases"].items()}
    assert outcomes.pop("similarity.mean[r1]") == "error"
    assert set(outcomes.values()) == {"supports"}
    assert result.ret == 11


def test_ordinary_tests_are_spread_beside_claims(pytester: pytest.Pytester, derived_claim: Path) -> None:
    pytester.makepyfile("import pytest\n@pytest.mark.parametrize('n', range(20))\ndef test_one(n): pass\n")
    result = pytester.runpytest("-n", "2", "-k", "test_one or (independent and mean)")
    assert result.ret == 0
    assert result.parseoutcomes()["passed"] > 20


def test_the_plugin_works_without_xdist(pytester: pytest.Pytester, derived_claim: Path) -> None:
    result = pytester.runpytest_subprocess("claims", "-p", "no:xdist", "-k", "mean")
    assert result.ret == 1


@pytest.mark.parametrize(
    ("nodeid", "group"),
    [
        ("claims/a.yaml::similarity.layer[base-12]", "claims/a.yaml::base"),
        ("claims/a.yaml::similarity.mean[base]", "claims/a.yaml::base"),
        ("claims/a.yaml::similarity.layer[vision-qwen2_5_vl_32b-0]", "claims/a.yaml::vision-qwen2_5_vl_32b"),
        ("claims/a.yaml::identity.sha256[vision-qwen2_5_vl_32b]", "claims/a.yaml::vision-qwen2_5_vl_32b"),
        ("claims/a.yaml::architecture.panel", "claims/a.yaml::"),
        ("tests/test_a.py::test_one[x-1]", "tests/test_a.py::test_one[x-1]"),
    ],
)
def test_the_unit_of_work_is_the_pair(nodeid: str, group: str) -> None:
    assert pair_group(nodeid) == group


@given(
    component=st.none() | st.from_regex(r"[a-z0-9_.]+", fullmatch=True),
    reference=st.from_regex(r"[a-z_.][a-z0-9_.]*", fullmatch=True),
    layers=st.tuples(st.integers(0, 999), st.integers(0, 999)),
)
def test_layers_of_one_pair_never_part(component: str | None, reference: str, layers: tuple[int, int]) -> None:
    pair = f"{component}-{reference}" if component else reference
    groups = {pair_group(f"claims/x.yaml::similarity.layer[{pair}-{layer}]") for layer in layers}
    groups.add(pair_group(f"claims/x.yaml::similarity.mean[{pair}]"))
    assert len(groups) == 1
