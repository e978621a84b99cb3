from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.model import Model
from checks.claim.initial import InitialWeights
from checks.claim.model import ModelSource
from checks.evidence.store import Store
from checks.pair import kept as kept_module
from checks.pair import measures
from checks.pair.kept import form, kept
from checks.pair.pair import Pair
from checks.pair.reading import Reading
from checks.statistics.block_matching import MatchingTest
from tests.kept_results import kept_results
from tests.small_examples import cut_all

KEPT = sorted(one.__name__ for one in kept_module._KEPT if one.__module__ == measures.__name__)
calls: list[str] = []


def kept_measures(store: Store) -> int:
    """How many results of measures there are, beside what a pass over the weights keeps."""
    return sum(kept_results(store.directory, name) for name in {one.__name__ for one in kept_module._KEPT})


@kept("1")
def number(pair: Pair) -> float | None:
    """Some result."""
    calls.append(pair.candidate.name)
    time.sleep(0.05)
    return 0.1


@kept("1")
def nothing(_: Pair) -> float | None:
    """A result that is None."""
    calls.append("nothing")
    return None


@kept("1", unless=lambda found: found < 0)
def failing(pair: Pair) -> float:
    """A failure that may not come again."""
    calls.append("failing")
    if pair.candidate.name == "unavailable":
        raise CheckpointUnavailable("the hub is down")
    return -1.0


@kept("1")
def unusual(_: Pair) -> Mapping[str, Sequence[float]]:
    """A result of types that the annotation allows and a store does not keep."""
    return MappingProxyType({"b": [np.float64(0.1)], "a": [1.0]})


def same(value: str, _: Pair) -> str:
    """What a result depends on, whatever the pair."""
    return value


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example models, cut down."""
    return cut_all(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def _no_calls() -> None:
    calls.clear()


def pair_of(models: Path, candidate: str = "derived", **how: Any) -> Pair:
    ours, theirs = (Model(ModelSource(name, path=str(models / name)), None, ("",)) for name in (candidate, "base"))
    initial = InitialWeights(
        checkpoint=ModelSource("initial", path=str(models / "base")),
        steps=(ModelSource("step", path=str(models / "independent")),),
    )
    return Pair(ours, theirs, initial=initial, **how)


@pytest.fixture(scope="module")
def measured(models: Path) -> Pair:
    """A pair of which everything was measured, and nothing kept."""
    pair = pair_of(models)
    for name in KEPT:
        pair.once(getattr(measures, name))
    return pair


@pytest.mark.parametrize("name", KEPT)
def test_every_kept_measure_comes_back_as_it_was(measured: Pair, name: str) -> None:
    measure: Callable[[Pair], Any] = getattr(measures, name)
    value, hint = measured.once(measure), form().result_hint(measure)
    written = form().write(value, hint)
    read = form().read(json.loads(json.dumps(written)), hint)
    assert type(read) is type(value)
    assert json.dumps(form().write(read, hint)) == json.dumps(written)
    if name != "clouds":  # which hold tensors
        assert read == value
    if isinstance(value, MatchingTest) and value.blocks:
        assert (read.joint_z, read.log_p, read.null.rate) == (value.joint_z, value.log_p, value.null.rate)
        assert read.finding(5.0) == value.finding(5.0)


def test_these_measures_are_kept() -> None:
    assert {"channels", "mapped_units", "matching_by_anchors", "matching_by_tokens", "origin", "tables"} <= {*KEPT}


def test_all_is_measured_once(models: Path, measured: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    cheap = (measures.tables, measures.channels, measures.spectra)
    first = pair_of(models, store=store)
    for measure in cheap:
        assert first.once(measure) == measured.once(measure)
    assert kept_measures(store) == len(cheap)
    second = pair_of(models, store=Store(tmp_path))

    def not_again(*_: Any) -> None:
        raise AssertionError("a weight was read")

    for side in (second.candidate, second.reference):
        monkeypatch.setattr(side.checkpoint, "read", not_again)
    for measure in cheap:
        assert second.once(measure) == measured.once(measure)


def test_a_result_that_is_none_is_kept(models: Path, tmp_path: Path) -> None:
    for _ in range(2):
        assert pair_of(models, store=Store(tmp_path)).once(nothing) is None
    assert calls == ["nothing"]


def test_failures_are_not_kept(models: Path, tmp_path: Path) -> None:
    store = Store(tmp_path)
    for _ in range(2):
        assert pair_of(models, store=store).once(failing) == -1
    pair = pair_of(models, store=store)
    pair.candidate.source = ModelSource("unavailable", path=str(models / "derived"))
    with pytest.raises(CheckpointUnavailable):
        pair.once(failing)
    assert calls == ["failing"] * 3
    assert kept_measures(store) == 0


def test_what_the_result_depends_on(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "store")

    def is_measured(**how: Any) -> bool:
        calls.clear()
        pair_of(models, **{"store": store, **how}).once(number)
        return bool(calls)

    assert is_measured()
    assert not is_measured()
    assert is_measured(candidate="independent")
    for reading in (Reading("screen"), Reading("sample", seed=1), Reading("sample", seed=2)):
        assert is_measured(reading=reading)
        assert not is_measured(reading=reading)
    assert is_measured(store=None)
    changed = kept_module.Kept("2", lambda _: None, lambda _: False)
    monkeypatch.setitem(kept_module._KEPT, number, changed)
    assert is_measured()
    for version in ("one", "other"):
        how = kept_module.Kept("2", partial(same, version), lambda _: False)
        monkeypatch.setitem(kept_module._KEPT, number, how)
        assert is_measured()
        assert not is_measured()
    # A model that was written anew is another one.
    shutil.copytree(models, tmp_path / "copy")
    calls.clear()
    pair_of(tmp_path / "copy", store=store).once(number)
    assert calls


def test_what_tokens_and_initial_weights_depend_on(models: Path, tmp_path: Path) -> None:
    pair = pair_of(models)
    tokens, initial = kept_module.token_ids(pair), kept_module.initial_weights(pair)
    assert tokens == kept_module.token_ids(pair_of(models))
    assert json.loads(json.dumps(initial)) == kept_module.initial_weights(pair_of(models))
    other = pair_of(models)
    other.initial = InitialWeights(generator="torch", seed=1, checkpoint=ModelSource("i", path=str(models / "base")))
    assert kept_module.initial_weights(other) != initial
    other.initial = None
    assert kept_module.initial_weights(other) is None
    for name in ("derived", "base"):
        shutil.copytree(models / name, tmp_path / name)
    (tmp_path / "base" / "tokenizer.json").unlink()
    assert kept_module.token_ids(pair_of(tmp_path)) != tokens


@pytest.mark.parametrize("payload", [{}, [], {"measured": "much"}, {"measured": [0.1]}, {"other": 1}, 3])
def test_a_foreign_entry_is_measured_again(models: Path, tmp_path: Path, payload: Any) -> None:
    store = Store(tmp_path)
    pair_of(models, store=store).once(number)
    key = kept_module._key(pair_of(models), "number", kept_module._KEPT[number])
    assert store.get(key) == {"measured": 0.1}
    store.put(key, payload)
    calls.clear()
    for _ in range(2):
        assert pair_of(models, store=store).once(number) == 0.1
    assert calls == ["derived"]


def test_a_damaged_file_is_measured_again(models: Path, tmp_path: Path) -> None:
    pair_of(models, store=Store(tmp_path)).once(number)
    (file,) = (file for file in tmp_path.glob("*/*.json") if json.loads(file.read_text())["key"][2] == "number")
    text = file.read_text()
    for damaged in (text[:-9], text.replace("0.1", "0.2"), ""):
        file.write_text(damaged)
        calls.clear()
        assert pair_of(models, store=Store(tmp_path)).once(number) == 0.1
        assert calls


def test_workers_wait_for_each_other(models: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: pair_of(models, store=Store(tmp_path)).once(number), range(4)))
    assert found == [0.1] * 4
    assert calls == ["derived"]


def test_the_first_run_has_what_a_resumed_run_has(models: Path, tmp_path: Path) -> None:
    stores = None, Store(tmp_path), Store(tmp_path)
    found = [pair_of(models, store=store).once(unusual) for store in stores]
    for one in found:
        assert repr(one) == "{'b': (0.1,), 'a': (1.0,)}"


# Files that change while a run reads them


def replaced(file: Path, by: Path) -> None:
    shutil.copy(by, file.with_name("new"))
    file.with_name("new").replace(file)


def test_a_file_that_is_replaced_meanwhile_is_not_taken_for_what_was_read(models: Path, tmp_path: Path) -> None:
    """A copy of the base is measured, and an unrelated model put in its place: that one must not be found guilty."""
    for name in ("base", "independent"):
        shutil.copytree(models / name, tmp_path / name)
    shutil.copytree(models / "base", tmp_path / "copy")
    store = Store(tmp_path / "store")
    first = pair_of(tmp_path, "copy", store=store)
    assert first.elementwise().mean().cosine == 1
    replaced(tmp_path / "copy" / "model.safetensors", tmp_path / "independent" / "model.safetensors")
    before = kept_measures(store)
    for _ in range(2):
        with pytest.raises(CheckpointUnavailable, match=r"model\.safetensors: changed while it was read; run again"):
            first.once(measures.channels)
    assert kept_measures(store) == before
    second = pair_of(tmp_path, "copy", store=store).once(measures.channels)
    assert second == pair_of(tmp_path, "independent").once(measures.channels)


def test_a_file_that_is_changed_in_place_meanwhile(models: Path, tmp_path: Path) -> None:
    for name in ("base", "derived"):
        shutil.copytree(models / name, tmp_path / name)
    store = Store(tmp_path / "store")
    pair = pair_of(tmp_path, store=store)
    pair.candidate.checkpoint.read("model.norm.weight")
    file = tmp_path / "derived" / "model.safetensors"
    state = file.stat()
    time.sleep(0.02)  # the clock of a file system may tick a hundred times a second only
    with file.open("r+b") as opened:
        opened.seek(-4, 2)
        opened.write(bytes(4))
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))
    with pytest.raises(CheckpointUnavailable, match="changed while it was read; run again"):
        pair.once(number)
    assert kept_measures(store) == 0


def test_what_it_depends_on_may_not_change_either(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    initial = iter("ab")
    how = kept_module.Kept("1", lambda _: next(initial), lambda _: False)
    monkeypatch.setitem(kept_module._KEPT, number, how)
    with pytest.raises(CheckpointUnavailable, match=r"'number' depends on beside them.* changed"):
        pair_of(models, store=store).once(number)
    assert kept_measures(store) == 0
