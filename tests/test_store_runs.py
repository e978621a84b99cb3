"""--store: a killed run resumes, a second one reads nothing, workers share, and verdicts are the same to the byte."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checks.streaming import stream
from tests.claim_runs import ExampleClaim
from tests.kept_results import kept_results

# Kills its own process, as nothing can be caught or cleaned up after, once so many layers were put into the store.
KILLS = """
import os, signal
from checks.evidence.store import Store

put, done = Store.put, []

def counted(self, key, payload):
    if len(done) == {layers}:
        os.kill(os.getpid(), signal.SIGKILL)
    put(self, key, payload)
    done.append(key)

Store.put = counted
"""


@pytest.fixture
def models(pytester: pytest.Pytester, example_claim: ExampleClaim, examples: Path) -> Path:
    """Copies of two example models, and example.yaml about them."""
    for name in ("derived", "base"):
        shutil.copytree(examples / name, pytester.path / name)
    ours, theirs = ({"name": name, "path": name} for name in ("derived", "base"))
    checks = ["similarity.mean", "identity.sha256", "independence.units"]
    example_claim.write(ours, [theirs], checks={"only": checks})
    return pytester.path


@pytest.fixture
def verdict(example_claim: ExampleClaim, models: Path) -> Callable[..., bytes]:
    """Runs the claim in this process and returns verdict.json."""

    def run(*options: str) -> bytes:
        assert example_claim.run(*options).ret == 1
        return (models / "out" / "verdict.json").read_bytes()

    return run


@pytest.fixture
def read_tensors(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The candidate's tensors that passes read, or pieces of them."""
    seen: list[str] = []
    real = stream.stream_pair

    def noting(*arguments: Any, **options: Any) -> Any:
        for result in real(*arguments, **options):
            seen.append(str(result.candidate))
            yield result

    monkeypatch.setattr(stream, "stream_pair", noting)
    return seen


def killed_run(models: Path, layers: int, *options: str) -> None:
    """A run of the claim in a process of its own, killed when it wants to keep one layer more than these."""
    (models / "killing.py").write_text(KILLS.format(layers=layers))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(models), *sys.path])}
    command = [sys.executable, "-m", "pytest", "-p", "killing", "example.yaml", "--store", "kept", *options]
    killed = subprocess.run(command, cwd=models, env=environment, capture_output=True, check=False, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stdout.decode()[-2000:]


# In full there are hashes of both sides, sums and neurons of each layer.
@pytest.mark.parametrize(("mode", "layers"), [("full", 10), ("sample", 3)])
def test_a_killed_run_resumes_and_a_second_one_reads_nothing(
    models: Path, verdict: Callable[..., bytes], read_tensors: list[str], mode: str, layers: int
) -> None:
    without = verdict("--read", mode, "--store", "none")
    everything = len(read_tensors)
    killed_run(models, layers, "--read", mode)
    assert kept_results(models / "kept") == layers
    read_tensors.clear()
    assert verdict("--read", mode, "--store", "kept") == without
    assert 0 < len(read_tensors) < everything
    read_tensors.clear()
    assert verdict("--read", mode, "--store", "kept") == without
    assert not read_tensors


def test_a_changed_file_is_measured_again(models: Path, verdict: Callable[..., bytes], read_tensors: list[str]) -> None:
    first = verdict("--store", "kept")
    everything = len(read_tensors)
    weights = models / "base" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    read_tensors.clear()
    second = verdict("--store", "kept")
    assert second != first
    assert len(read_tensors) == everything
    # What was measured of the old file does not get into the new verdict.
    assert verdict("--store", "none") == second


def test_another_way_of_reading_is_measured_on_its_own(verdict: Callable[..., bytes], read_tensors: list[str]) -> None:
    verdict("--store", "kept", "--read", "sample")
    for options in (("--read", "sample", "--seed", "1"), ("--read", "screen"), ("--read", "full")):
        read_tensors.clear()
        kept = verdict("--store", "kept", *options)
        assert read_tensors
        assert kept == verdict("--store", "none", *options)


def test_workers_share_a_store_and_reach_the_same_verdict(
    pytester: pytest.Pytester, models: Path, verdict: Callable[..., bytes]
) -> None:
    alone = verdict("--store", "none")
    options = ("example.yaml", "--report", "out", "--store", "kept", "-n", "2")
    assert pytester.runpytest_subprocess(*options).ret == 1
    assert (models / "out" / "verdict.json").read_bytes() == alone
    assert kept_results(models / "kept") > 0


def test_by_default_the_store_is_in_pytests_cache(models: Path, verdict: Callable[..., bytes]) -> None:
    place = models / ".pytest_cache" / "d" / "from_scratch_store"
    without = verdict("--store", "none")
    verdict("-p", "no:cacheprovider")
    assert not place.exists()
    assert verdict() == without
    assert kept_results(place) > 0


def test_a_store_that_cannot_be_made_is_a_usage_error(pytester: pytest.Pytester, models: Path) -> None:
    (models / "file").write_text("")
    result = pytester.runpytest("example.yaml", "--store", "file/store")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*--store*cannot be made*"])
