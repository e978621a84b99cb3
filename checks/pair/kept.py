"""What `pair.once` measures, kept in a store: a killed run does not measure it again, and workers share it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, TypeVar, cast

from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.identity import identity_of
from checks.evidence.typed_json import Form
from checks.pair.ledger import FULL, LayerStore, on_device

if TYPE_CHECKING:
    from checks.pair.pair import Pair

Measure = TypeVar("Measure", bound=Callable[..., Any])
Measured = TypeVar("Measured")

# Where the dataclasses that kept results are made of are defined.
MODULES = (
    "checks.checkpoint.canonical",
    "checks.pair.aligned",
    "checks.pair.channel_views",
    "checks.pair.embedding_rows",
    "checks.pair.mapped_units",
    "checks.pair.mlp_pairs",
    "checks.pair.neurons",
    "checks.pair.origin",
    "checks.statistics.alignment",
    "checks.statistics.block_matching",
    "checks.statistics.channels",
    "checks.statistics.clusters",
    "checks.statistics.double_matching",
    "checks.statistics.moments",
    "checks.statistics.pca",
    "checks.statistics.rows",
    "checks.statistics.spectrum",
    "checks.statistics.units",
    "checks.statistics.wasserstein",
)


@dataclass(frozen=True)
class Kept:
    """How a measure is kept.

    `version`: to be raised with every change of what is measured, here or in the statistics under it. `depends_on`:
    what the result depends on beside both checkpoints and what is read of them, as JSON holds it. `unless`: results
    that are not kept, such as a failure that may not come again.
    """

    version: str
    depends_on: Callable[[Pair], Any]
    unless: Callable[[Any], bool]


_KEPT: dict[Callable[..., Any], Kept] = {}


def kept(
    version: str,
    depends_on: Callable[[Pair], Any] = lambda _: None,
    unless: Callable[[Any], bool] = lambda _: False,
) -> Callable[[Measure], Measure]:
    """Marks a measure whose result is kept, see Kept. Its return annotation says of what the result is made."""

    def mark(measure: Measure) -> Measure:
        _KEPT[measure] = Kept(version, depends_on, unless)
        return measure

    return mark


def measured(pair: Pair, measure: Callable[[Pair], Measured], store: LayerStore | None) -> Measured:
    """The result of a measure: from the store, else measured and, if it is marked as `kept`, put there.

    One worker at a time measures it; who waited reads it. What the store holds and is no such result counts as absent.
    What may be kept is returned as it would be read back, with and without a store, so that all runs have the same.
    Raises what the measure raises, and CheckpointUnavailable if a checkpoint is another one by now than when it was
    opened; and keeps nothing then.
    """
    how = _KEPT.get(measure)
    if how is None:
        return measure(pair)
    written_as = form()
    hint = written_as.result_hint(measure)
    if store is None:
        result = measure(pair)
        return result if how.unless(result) else cast(Measured, written_as.read(written_as.write(result, hint), hint))
    key = _key(pair, measure.__name__, how)

    def stored() -> tuple[Any] | None:
        """The kept result, in a tuple since it may be None; or None."""
        payload = store.get(key)
        try:
            return None if payload is None else (written_as.read(payload["measured"], hint),)
        except (KeyError, TypeError, ValueError):
            return None

    found = stored()
    if found is None:
        with store.exclusive((*key, "measured")):
            found = stored()
            if found is None:
                found = (measure(pair),)
                if not how.unless(found[0]):
                    written = written_as.write(found[0], hint)
                    _require_unchanged(pair, key, how)
                    store.put(key, {"measured": written})
                    found = (written_as.read(written, hint),)
    value: Measured = found[0]
    return value


def is_kept(pair: Pair, measure: Callable[[Pair], Any], store: LayerStore | None) -> bool:
    """Does the store hold the result of a measure? Raises CheckpointUnavailable."""
    how = _KEPT.get(measure)
    return store is not None and how is not None and store.get(_key(pair, measure.__name__, how)) is not None


def form() -> Form:
    """How results are written, by the classes as they are loaded now."""
    return Form(MODULES)


def token_ids(pair: Pair) -> str:
    """The shared tokens of a pair, for `depends_on`: they are of the tokenizers' making."""
    return hashlib.sha256(json.dumps([[*side] for side in pair.tokens.ids]).encode()).hexdigest()


def initial_weights(pair: Pair) -> Any:
    """What the claim says of initial weights, for `depends_on`, and what makes them again."""
    stated = pair.initial
    if stated is None:
        return None
    sources = [*([stated.checkpoint] if stated.checkpoint is not None else []), *stated.steps]
    checkpoints = [pair.candidate.open_other(source) for source in sources]
    return [
        stated.generator,
        stated.seed,
        stated.checkpoint is not None,
        [source.where for source in sources],
        [identity_of(one.index, one.prefix, one.config) for one in checkpoints],
        [_installed(package) for package in ("torch", "transformers")],
    ]


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _key(pair: Pair, name: str, how: Kept) -> tuple[str, ...]:
    identities = [
        identity_of(one.index, one.prefix, one.config) for one in (pair.candidate.checkpoint, pair.reference.checkpoint)
    ]
    others = hashlib.sha256(json.dumps(how.depends_on(pair), sort_keys=True).encode()).hexdigest()
    reading = FULL if pair.plan is None else f"{pair.plan.request.mode} {pair.plan.digest}"
    return (*identities, name, how.version, others, on_device(reading, pair.device))


def _require_unchanged(pair: Pair, key: tuple[str, ...], how: Kept) -> None:
    """Is what was measured what the key says? Raises CheckpointUnavailable."""
    for model in (pair.candidate, pair.reference):
        model.checkpoint.require_unchanged()
    if _key(pair, key[2], how) != key:
        raise CheckpointUnavailable(
            f"{pair.candidate.name} and {pair.reference.name}: what '{key[2]}' depends on beside them, such as a "
            "checkpoint of initial weights, changed while it was read; run again"
        )
