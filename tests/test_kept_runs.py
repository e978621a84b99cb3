"""--store keeps what whole-model checks measure: a second run reads no weight, a killed one does none of it again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from checks.checkpoint.checkpoint import Checkpoint
from checks.evidence.store import Store
from checks.streaming import stream
from tests.kept_results import kept_results
from tests.small_examples import cut

CHECKS = [
    "similarity.mean",
    "embedding",
    "distribution",
    "independence.units",
    "independence.channels",
]
# Kills its own process when it wants to keep the result of this measure.
KILLS = """
import os, signal
from checks.evidence.store import Store

put = Store.put

def counted(self, key, payload):
    if key[2] == {measure!r}:
        os.kill(os.getpid(), signal.SIGKILL)
    put(self, key, payload)

Store.put = counted
"""
Run = Callable[..., tuple[bytes, bytes]]


@pytest.fixture
def models(pytester: pytest.Pytester) -> Path:
    """Two example models, cut down, and example.yaml about them."""
    for name in ("derived", "base"):
        cut(name, pytester.path)
    claim = {
        "claim": "example",
        "statement": "The example model was trained from scratch.",
        "model": {"name": "derived", "path": "derived"},
        "references": [{"name": "base", "path": "base"}],
        "nearest": 0,
        "checks": {"only": CHECKS},
    }
    (pytester.path / "example.yaml").write_text(yaml.safe_dump(claim, sort_keys=False))
    return pytester.path


@pytest.fixture
def run(pytester: pytest.Pytester, models: Path) -> Run:
    """Runs the claim in this process and returns verdict.json and evidence.jsonl."""

    def make(*options: str) -> tuple[bytes, bytes]:
        assert pytester.runpytest("example.yaml", "--report", "out", *options).ret == 1
        return (models / "out" / "verdict.json").read_bytes(), (models / "out" / "evidence.jsonl").read_bytes()

    return make


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tensors that are read, by whatever way."""
    seen: list[str] = []
    one_tensor, passes = Checkpoint.read, stream.stream_pair

    def noting(self: Checkpoint, name: str, *arguments: Any) -> Any:
        found = one_tensor(self, name, *arguments)
        seen.append(name)
        return found

    def noting_passes(*arguments: Any, **options: Any) -> Any:
        for result in passes(*arguments, **options):
            seen.append(str(result.candidate))
            yield result

    monkeypatch.setattr(Checkpoint, "read", noting)
    monkeypatch.setattr(stream, "stream_pair", noting_passes)
    return seen


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of what results are put into a store."""
    names: list[str] = []
    put = Store.put

    def noting(self: Store, key: tuple[str, ...], payload: Any) -> None:
        names.append(key[2])
        put(self, key, payload)

    monkeypatch.setattr(Store, "put", noting)
    return names


@pytest.mark.parametrize("options", [("--read", "full"), ("--read", "sample", "--budget", "2MB")], ids=["full", "part"])
def test_a_second_run_reads_no_weight(run: Run, read: list[str], options: tuple[str, ...]) -> None:
    without = run("--store", "none", *options)
    assert run("--store", "kept", *options) == without
    assert read
    read.clear()
    assert run("--store", "kept", *options) == without
    assert not read


def test_another_tokenizer_is_measured_again(run: Run, models: Path, kept: list[str]) -> None:
    first = run("--store", "kept")
    kept.clear()
    (models / "base" / "tokenizer.json").unlink()
    assert run("--store", "kept") != first
    assert {"channels"} <= {*kept}
    assert not {"clouds", "elements", "spectra", "pairing"} & {*kept}


def test_what_was_measured_before_a_kill_is_not_measured_again(run: Run, models: Path, kept: list[str]) -> None:
    without = run("--store", "none")
    (models / "killing.py").write_text(KILLS.format(measure="channels"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(models), *sys.path])}
    command = [sys.executable, "-m", "pytest", "-p", "killing", "example.yaml", "--store", "kept"]
    killed = subprocess.run(command, cwd=models, env=environment, capture_output=True, check=False, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stdout.decode()[-2000:]
    before = kept_results(models / "kept")
    assert before > 0
    kept.clear()
    assert run("--store", "kept") == without
    assert "channels" in kept
    assert not {"clouds", "elements", "spectra", "tables"} & {*kept}
    assert kept_results(models / "kept") == before + len(kept)
