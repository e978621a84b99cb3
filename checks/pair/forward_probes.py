"""What two models make of the same texts, place by place: probes that need no token in common."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from checks.checkpoint.canonical import CanonicalModel
from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.index import shown
from checks.checkpoint.model import Model
from checks.pair.forward_model import NoForwardPass
from checks.pair.mlp_inputs import mlp_inputs
from checks.tokens import vocabulary_of
from checks.tokens.segment import can_segment, fixed_text, segment_text

if TYPE_CHECKING:
    from torch import Tensor

    from checks.pair.pair import Pair

TEXT_FILE = Path(__file__).with_name("probe_text.yaml")
LARGEST_TOKENIZER = 64_000_000  # bytes
# Tokens of a passage that are read, unless the model has fewer positions.
LONGEST = 512
# Places that serve as probes, and how many at least are needed.
PLACES = 1024
LEAST_PLACES = 512
# Directions of the inputs that are taken out: what frequent letters, line ends and the first tokens do in any model.
COMMON_DIRECTIONS = 4


@dataclass(frozen=True)
class TextTokens:
    """A text in one tokenizer: `ids`, and the `last` token that ends after so many characters of the text."""

    ids: tuple[int, ...]
    last: Mapping[int, int]


@dataclass(frozen=True)
class ForwardProbes:
    """What enters the MLPs of both models at the same places of the same texts.

    `candidate`, `reference`: layer → [places, d], each in its model's own basis, without its mean and its four leading
    directions. `text_sha256`: of all passages.
    """

    candidate: Mapping[int, Tensor]
    reference: Mapping[int, Tensor]
    places: int
    text_sha256: str


def text_readers(pair: Pair) -> Any:
    """What `forward_probes` depends on beside both checkpoints, as JSON holds it."""
    vocabularies = [vocabulary_of(model) for model in (pair.candidate, pair.reference)]
    files = [None if one is None else dict(one.sha256) for one in vocabularies]
    return [text_sha256(), files, version("transformers"), version("tokenizers")]


def text_sha256() -> str:
    """SHA-256 of all passages."""
    return hashlib.sha256("\0".join(passages()).encode()).hexdigest()


@cache
def passages() -> tuple[str, ...]:
    """The passages that both models read: of many kinds, languages and scripts."""
    document = yaml.safe_load(TEXT_FILE.read_text(encoding="utf-8"))
    return (*fixed_text().values(), *(str(text) for text in document["passages"]))


def forward_probes(
    candidate: Model, reference: Model, canonical: tuple[CanonicalModel, CanonicalModel]
) -> ForwardProbes:
    """Runs both models over the passages, each with its own tokenizer, and keeps what enters their MLPs.

    A place is one at which both tokenizations end a token: there both models have read the same characters. First
    tokens are none, since models use them as a sink whatever they are. Of all places 1024 are taken, evenly spread.
    Deterministic; float32.

    Over running text any two networks answer alike to some degree: both know what a line end or a digit is. The mean
    and the leading directions of each layer's inputs carry most of that and are taken out; what is left is for the null
    of mismatched layers to show. Measured on the setting half of the lineage zoo (`benchmarks/results`).
    Raises NoForwardPass without a tokenizer that is run, with fewer than 512 places and as `mlp_inputs`.
    """
    texts = passages()
    models = candidate, reference
    tokens = [[_shortened(one, _positions_of(model)) for one in tokenise(model, texts)] for model in models]
    places = common_places(*tokens)
    if len(places) < LEAST_PLACES:
        raise NoForwardPass(
            f"no forward pass: the tokenizations of {candidate.name} and {reference.name} meet at {len(places)} places "
            f"of the text, {LEAST_PLACES} are needed"
        )
    count = min(PLACES, len(places))
    chosen = [places[round(number * (len(places) - 1) / (count - 1))] for number in range(count)]
    found = [
        mlp_inputs(
            model.checkpoint,
            canonical[side],
            [one.ids for one in tokens[side]],
            [(text, tokens[side][text].last[end]) for text, end in chosen],
        )
        for side, model in enumerate(models)
    ]
    distinct = [{layer: without_common_directions(states) for layer, states in one.items()} for one in found]
    return ForwardProbes(distinct[0], distinct[1], count, text_sha256())


def tokenise(model: Model, texts: Sequence[str]) -> list[TextTokens]:
    """The texts in a model's own tokenizer: tokenizer.json, run by `tokenizers`; else BPE by vocabulary and ranks.

    Raises NoForwardPass without either, and for texts that come out empty; CheckpointUnavailable if the files cannot be
    read.
    """
    data = model.small_file("tokenizer.json", LARGEST_TOKENIZER)
    found = _by_ranks(model, texts) if data is None else _by_tokenizer(model.name, data, texts)
    if not all(one.ids for one in found):
        raise NoForwardPass(f"{model.name}: no forward pass: the tokenizer makes no token of a text")
    return found


def _by_tokenizer(name: str, data: bytes, texts: Sequence[str]) -> list[TextTokens]:
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_str(data.decode("utf-8"))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        encoded = [tokenizer.encode(text) for text in texts]
    except Exception as error:  # the library raises nothing narrower
        raise NoForwardPass(
            f"{name}: no forward pass: tokenizer.json cannot be run ({type(error).__name__}: {shown(str(error))})"
        ) from error
    return [
        TextTokens(tuple(one.ids), {end: token for token, (_, end) in enumerate(one.offsets) if end > 0})
        for one in encoded
    ]


def _by_ranks(model: Model, texts: Sequence[str]) -> list[TextTokens]:
    vocabulary = vocabulary_of(model)
    if vocabulary is None or not can_segment(vocabulary):
        raise NoForwardPass(
            f"{model.name}: no forward pass: it has neither a vocabulary of merges nor tokenizer.json; add the latter"
        )
    known = vocabulary.ids()
    found = []
    for text in texts:
        ids: list[int] = []
        last: dict[int, int] = {}
        pending = b""
        read = 0
        for piece in (piece for word in segment_text(text, vocabulary) for piece in word):
            if piece in known:
                ids.append(known[piece])
            pending += piece
            try:
                read += len(pending.decode("utf-8"))
            except UnicodeDecodeError:
                continue  # in the middle of a character
            pending = b""
            if piece in known:
                last[read] = len(ids) - 1
        found.append(TextTokens(tuple(ids), last))
    return found


def _positions_of(model: Model) -> int:
    """How many tokens of a text the model reads at most."""
    config: Mapping[str, Any] = model.checkpoint.config
    text = config.get("text_config")
    stated = [
        one.get(key)
        for one in (config, text if isinstance(text, Mapping) else {})
        for key in ("max_position_embeddings", "n_positions", "max_seq_len")
    ]
    return min([LONGEST, *(one for one in stated if type(one) is int and one > 0)])


def _shortened(tokens: TextTokens, longest: int) -> TextTokens:
    last = {end: token for end, token in tokens.last.items() if token < longest}
    return TextTokens(tokens.ids[:longest], last)


def common_places(ours: Sequence[TextTokens], theirs: Sequence[TextTokens]) -> list[tuple[int, int]]:
    """Where both tokenizations of the same texts end a token that is not the first: (text, characters), in order."""
    return [
        (text, end)
        for text, (one, other) in enumerate(zip(ours, theirs, strict=True))
        for end in sorted(one.last.keys() & other.last.keys())
        if one.last[end] > 0 and other.last[end] > 0
    ]


def without_common_directions(states: Tensor, directions: int = COMMON_DIRECTIONS) -> Tensor:
    """Rows [p, d] less their mean and their leading principal components; equal rows become zero.

    Turns with the basis: of states·R it is that of states, times R. Raises CheckpointUnavailable for non-finite values.
    """
    import torch

    if not bool(states.isfinite().all()):
        raise CheckpointUnavailable("the states of a forward pass are not finite; fetch the checkpoint again")
    centred = states.double() - states.double().mean(0)
    if not len(centred):
        return states
    # Of the smaller of the two Gram matrices, whose eigenvectors say the same.
    if centred.shape[0] <= centred.shape[1]:
        leading = torch.linalg.eigh(centred @ centred.T).eigenvectors[:, -directions:]
        found: Tensor = centred - leading @ (leading.T @ centred)
    else:
        leading = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -directions:]
        found = centred - (centred @ leading) @ leading.T
    return found.float()
