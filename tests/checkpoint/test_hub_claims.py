"""Claims about models on a hub, as a user meets them: the same verdict as from disk, and what happens when it fails."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import constants, snapshot_download

from tests.claim_runs import ExampleClaim, verdicts

MODELS = ("independent", "base", "derived")
# One check on each pair: the run is PARTIAL, with exit status 0 if it was clean.
ONE_CHECK = ("example.yaml", "-k", "mean")
Write = Callable[..., None]


@pytest.fixture(autouse=True)
def _everything_is_read(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models on the hub are screened by default, see test_hub_reading.py."""
    monkeypatch.setenv("PYTEST_ADDOPTS", "--read full --store none")


@pytest.fixture
def commits(hub: Any, examples: Path) -> dict[str, str]:
    """The example models as org/independent, org/base and org/derived on a hub."""
    return {name: hub.add_directory(f"org/{name}", examples / name) for name in MODELS}


@pytest.fixture
def write(example_claim: ExampleClaim, examples: Path) -> Write:
    """Writes example.yaml about the example models at a revision of the hub; None reads them from disk."""

    def write(revision: str | None, references: tuple[str, ...] = ("base", "derived"), **content: Any) -> None:
        def model(name: str) -> dict[str, str]:
            if revision is None:
                return {"name": name, "path": str(examples / name)}
            config = str(examples / name / "config.json")
            return {"name": name, "repo": f"org/{name}", "revision": revision, "config": config}

        example_claim.write(model("independent"), [model(name) for name in references], **content)

    return write


def report(pytester: pytest.Pytester, directory: str = "out") -> dict[str, Any]:
    """The claim in a written report."""
    claim: dict[str, Any] = verdicts(pytester.path / directory)["example"]
    return claim


def without_places(claim: dict[str, Any]) -> dict[str, Any]:
    """A report without the places from which weights were read."""

    def stripped(value: Any) -> Any:
        if isinstance(value, list):
            return [stripped(one) for one in value]
        if isinstance(value, dict):
            kept = {key: stripped(one) for key, one in value.items() if key not in ("where", "repository", "revision")}
            return {key: one for key, one in kept.items() if one != {}}
        return value

    found: dict[str, Any] = stripped(claim)
    return found


def without_forward_pass(claim: dict[str, Any]) -> dict[str, Any]:
    """A report without what matching by a common text adds: it runs models whose weights are on this disk."""
    for case in claim["cases"].values():
        if case["check"] == "independence.neurons":
            del case["evidence"]["reason"], case["evidence"]["details"]["common_text"]
            del case["evidence"]["details"]["searched"]
    return claim


def asked_bytes(hub: Any, repository: str = r"org/\w+", file: str = ".+") -> int:
    """Bytes of all ranges of files that were asked for, as far as the files have them."""
    total = 0
    for verb, path, headers in hub.requests:
        found = re.search(f"/({repository})/resolve/[^/]+/({file})", path)
        if found and verb == "GET":
            first, last = map(int, headers["range"].removeprefix("bytes=").split("-"))
            total += min(last + 1, hub.repositories[found[1]].files[found[2]].stat().st_size) - first
    return total


def reasons(claim: dict[str, Any]) -> str:
    """What the cases say that ran, one after the other."""
    reported = [case for case in claim["cases"].values() if case["evidence"]]
    return "\n".join(f"{case['outcome']}: {case['evidence']['reason']}" for case in reported)


def test_the_verdict_and_every_value_are_those_from_disk(
    pytester: pytest.Pytester, hub: Any, commits: dict[str, str], write: Write, examples: Path
) -> None:
    write(None)
    assert pytester.runpytest("example.yaml", "--report", "disk").ret == 0
    assert not hub.requests
    write("main")
    result = pytester.runpytest("example.yaml", "--report", "hub")
    assert result.ret == 0
    disk, served = report(pytester, "disk"), report(pytester, "hub")
    assert without_forward_pass(without_places(served)) == without_forward_pass(without_places(disk))
    assert served["verdict"] == "SUPPORTED"
    # All checks together ask for a reference once, and for the candidate once with each; its own structure reads its
    # MLPs.
    header = 100_000
    for name, most in (("base", 1.0), ("derived", 1.0), ("independent", 2.6)):
        size = (examples / name / "model.safetensors").stat().st_size
        assert asked_bytes(hub, f"org/{name}", "model.safetensors") <= most * size + header
    # What was read is recorded with its commit.
    assert served["model"]["where"] == f"org/independent@{commits['independent']}"
    panel = served["components"]["model"]["panel"]
    assert [one["where"] for one in panel] == [f"org/{name}@{commits[name]}" for name in ("base", "derived")]
    # By range requests, each branch, listing and header once, and nothing on this disk.
    assert all("range" in headers for headers in hub.seen("/resolve/"))
    for name in MODELS:
        assert len(hub.seen(f"/api/models/org/{name}/revision/main")) == 1
        assert len(hub.seen(f"/api/models/org/{name}/revision/{commits[name]}")) == 1
    assert hub.wire_bytes <= 1.05 * asked_bytes(hub)
    assert not list(Path(constants.HF_HUB_CACHE).glob("**/*"))
    result.stdout.fnmatch_lines(["*UnpinnedRevision: these models name no commit sha*"])
    for name, commit in commits.items():
        assert f"{{name: {name}, repo: org/{name}, revision: {commit}}}" in result.stdout.str()


def test_workers_read_what_the_controller_resolved(
    pytester: pytest.Pytester, hub: Any, commits: dict[str, str], write: Write
) -> None:
    write("main")
    assert pytester.runpytest(*ONE_CHECK, "--report", "alone").ret == 0
    hub.requests.clear()
    result = pytester.runpytest(*ONE_CHECK, "--report", "shared", "-n", "2")
    assert result.ret == 0
    for file in ("verdict.json", "evidence.jsonl"):
        assert (pytester.path / "alone" / file).read_bytes() == (pytester.path / "shared" / file).read_bytes()
    for name in MODELS:
        assert len(hub.seen(f"/api/models/org/{name}/revision/main")) == 1
    assert result.stdout.str().count("UnpinnedRevision: ") == 1


def test_a_commit_sha_needs_no_resolving_and_no_warning(
    pytester: pytest.Pytester, hub: Any, commits: dict[str, str], write: Write
) -> None:
    write(commits["base"], references=("base",))
    hub.repositories["org/independent"].commit = commits["base"]
    result = pytester.runpytest(*ONE_CHECK, "-W", "error")
    assert result.ret == 0
    assert "UnpinnedRevision" not in result.stdout.str()
    assert {len(hub.seen(f"/api/models/org/{name}/")) for name in ("independent", "base")} == {1}


def test_an_unpinned_revision_can_be_made_an_error(
    pytester: pytest.Pytester, commits: dict[str, str], write: Write
) -> None:
    write("main")
    result = pytester.runpytest(*ONE_CHECK, "-W", "error::pytest.PytestWarning")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*repo: org/base, revision: {commits['base']}*"])


@pytest.mark.parametrize("workers", [[], ["-n", "2"]])
def test_collection_opens_no_network(
    pytester: pytest.Pytester, hub: Any, commits: dict[str, str], write: Write, workers: list[str]
) -> None:
    write("main")
    assert pytester.runpytest("example.yaml", "--collect-only", "-q", *workers).ret == 0
    assert not hub.requests


def test_configurations_and_shapes_are_compared_without_weights(
    pytester: pytest.Pytester, hub: Any, commits: dict[str, str], write: Write
) -> None:
    write("main", checks={"only": ["architecture.declared"]}, training={"parameters": {"total": 1e9}})
    pytester.runpytest("example.yaml", "--report", "out")
    evidence = report(pytester)["cases"]["architecture.declared"]["evidence"]
    assert evidence["details"]["differences"]["configuration and shapes"] == 0
    assert evidence["details"]["differences"]["claim and shapes"] > 0.9
    read = {"repository": "org/independent", "revision": commits["independent"]}
    assert evidence["read"] == {"candidate": read}
    asked = {headers["range"] for headers in hub.seen("/org/independent/resolve/")}
    assert asked == {"bytes=0-99999", "bytes=0-719"}  # the header's first read, and config.json


def test_a_gated_model_says_what_to_do_and_is_read_with_a_token(
    pytester: pytest.Pytester, hub: Any, commits: dict[str, str], write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("main")
    hub.repositories["org/base"].gated = True
    result = pytester.runpytest(*ONE_CHECK, "--report", "out")
    assert result.ret == 11
    cases = report(pytester)["cases"]
    assert cases["similarity.mean[derived]"]["outcome"] == "supports"
    gated = cases["similarity.mean[base]"]
    assert gated["outcome"] == "error"
    assert f"accept the terms at {hub.endpoint}/org/base with your account and set HF_TOKEN" in str(gated["evidence"])
    assert "failed" not in result.parseoutcomes()

    monkeypatch.setenv("HF_TOKEN", "hf_of_somebody_else")
    result = pytester.runpytest(*ONE_CHECK, "--allow-missing", "--report", "out", "-rs")
    assert result.ret == 10
    assert report(pytester)["cases"]["similarity.mean[base]"]["outcome"] == "unavailable"
    result.stdout.fnmatch_lines(["*unavailable: org/base@*access is restricted; *with the account of your HF_TOKEN*"])

    monkeypatch.setenv("HF_TOKEN", hub.good_token)
    assert pytester.runpytest(*ONE_CHECK).ret == 0


def test_what_cannot_be_resolved_concerns_one_model(
    pytester: pytest.Pytester, hub: Any, commits: dict[str, str], write: Write
) -> None:
    write("main")
    del hub.repositories["org/base"]
    hub.repositories["org/derived"].branches = ("trunk",)
    result = pytester.runpytest(*ONE_CHECK, "--report", "out")
    assert result.ret == 11
    assert result.parseoutcomes()["errors"] == 2
    text = reasons(report(pytester))
    assert "error: unavailable: org/base@main: there is no such repository, or it is private" in text
    assert "error: unavailable: org/derived@main: there is no such revision; correct it in the claim" in text


def test_a_busy_hub_and_a_connection_that_breaks_change_nothing(
    pytester: pytest.Pytester, hub: Any, commits: dict[str, str], write: Write
) -> None:
    write(None)
    pytester.runpytest(*ONE_CHECK, "--report", "disk")
    write("main")
    busy: dict[str, Any] = {"status": 429, "headers": {"Retry-After": "1"}}
    hub.fail("/org/base/revision/main", **busy)
    hub.fail("/org/independent/resolve/", **busy)
    hub.fail("/org/derived/resolve/", cut_after=1000)
    assert pytester.runpytest(*ONE_CHECK, "--report", "hub").ret == 0
    assert without_places(report(pytester, "hub")) == without_places(report(pytester, "disk"))
    assert not any(fault.times for fault in hub.faults)


def test_a_hub_that_asks_for_too_much_patience_is_an_error(
    pytester: pytest.Pytester, hub: Any, commits: dict[str, str], write: Write
) -> None:
    write("main", references=("base",))
    hub.fail("/org/base/resolve/", status=429, headers={"Retry-After": "3600"}, times=-1)
    result = pytester.runpytest(*ONE_CHECK, "--report", "out")
    assert result.ret == 11
    assert "allows no more requests now; run again in 3600 s" in reasons(report(pytester))


@pytest.mark.parametrize("how", ["option", "environment"])
def test_offline_with_a_filled_cache(
    how: str,
    pytester: pytest.Pytester,
    hub: Any,
    commits: dict[str, str],
    write: Write,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write("main", checks={"only": ["similarity.mean", "architecture.declared"]})
    pytester.runpytest("example.yaml", "--report", "online")
    for name in ("independent", "base"):
        snapshot_download(f"org/{name}", endpoint=hub.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", how == "environment")
    hub.requests.clear()
    arguments = ["--offline"] if how == "option" else ["--allow-missing"]
    result = pytester.runpytest("example.yaml", "--report", "offline", *arguments)
    assert result.ret == 10
    assert not hub.requests
    online, offline = report(pytester, "online")["cases"], report(pytester, "offline")["cases"]
    assert {id: case for id, case in offline.items() if "derived" not in id} == {
        id: case for id, case in online.items() if "derived" not in id
    }
    missing = offline["similarity.mean[derived]"]
    assert missing["outcome"] == "unavailable"
    assert "the local hub cache does not have it" in missing["evidence"]["reason"]
    assert "hf download org/derived --revision main" in missing["evidence"]["reason"]
    assert report(pytester, "offline")["model"]["where"] == f"org/independent@{commits['independent']}"


def test_a_cached_commit_is_read_from_the_cache(
    pytester: pytest.Pytester, hub: Any, commits: dict[str, str], write: Write
) -> None:
    write("main", references=("base",))
    for name in ("independent", "base"):
        snapshot_download(f"org/{name}", endpoint=hub.endpoint)
    hub.requests.clear()
    assert pytester.runpytest(*ONE_CHECK).ret == 0
    # The branch may have moved since: it is asked for, and nothing else.
    assert len(hub.requests) == 2
    assert {path for _, path, _ in hub.requests} == {
        f"/api/models/org/{name}/revision/main" for name in ("independent", "base")
    }


def test_a_gated_model_of_the_catalogue_is_read_from_its_mirror(
    pytester: pytest.Pytester, hub: Any, commits: dict[str, str], write: Write, examples: Path
) -> None:
    original, mirror = "meta-llama/Meta-Llama-3-70B", "NousResearch/Meta-Llama-3-70B"
    hub.add_directory(original, examples / "base", gated=True)
    commit = hub.add_directory(mirror, examples / "base")
    write(commits["independent"], references=())
    path = pytester.path / "example.yaml"
    claim = {**yaml.safe_load(path.read_text()), "references": ["llama_3_70b"]}
    path.write_text(yaml.safe_dump(claim))
    result = pytester.runpytest(*ONE_CHECK, "--report", "out")
    assert result.ret == 0
    assert report(pytester)["cases"]["similarity.mean[llama_3_70b]"]["outcome"] == "supports"
    assert hub.seen(f"/{mirror}/resolve/{commit}/model.safetensors")

    hub.add_directory(mirror, examples / "derived")
    result = pytester.runpytest(*ONE_CHECK, "--report", "out")
    assert result.ret == 11
    text = reasons(report(pytester))
    assert f"accept the terms at {hub.endpoint}/{original}" in text
    assert f"not read from a mirror: {mirror}@{commit[:12]} does not publish the same shards" in text
