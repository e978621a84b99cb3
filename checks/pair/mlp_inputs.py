"""What enters the MLPs of a model while it reads texts: a forward pass by transformers' own classes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from checks.checkpoint.canonical import CanonicalModel
from checks.checkpoint.checkpoint import Checkpoint
from checks.checkpoint.roles import TensorRole
from checks.checkpoint.transformers_models import quiet
from checks.pair.forward_model import (
    NoForwardPass,
    explained,
    load_decoder,
    require_memory,
    require_runnable,
    widened,
)

if TYPE_CHECKING:
    from torch import Tensor

# What transformers calls the MLP of a decoder layer, dense or a mixture, or the first matrix of one that has no name.
MLP_NAMES = ("mlp", "feed_forward", "block_sparse_moe", "ffn", "moe", "fc1")
# Parts that read what enters an MLP.
READERS = ("gate", "up", "gate_up")
# Tokens that run at once, padding included.
TOKENS_AT_ONCE = 8192
# What runs beside the weights: states of the tokens at once, in bytes for each of them and each hidden channel.
STATES = 64


def mlp_inputs(
    checkpoint: Checkpoint, model: CanonicalModel, texts: Sequence[Sequence[int]], positions: Sequence[tuple[int, int]]
) -> dict[int, Tensor]:
    """What enters the MLPs of each layer at some positions of some texts: layer → [p, d], float32 on the CPU.

    texts: token ids of each. positions: (text, token) of every row. The input of an MLP is divided by the gains of the
    norm before it, so that readers with the gains folded in (`CanonicalModel`) answer to it as the model's own neurons
    do, up to one constant for each neuron that biases and LayerNorm make. All MLPs of a layer share their input,
    experts that the router does not choose included.

    transformers' class for the model type runs in float32 with eager attention, on the model's device, one layer at a
    time: weights stay mapped from their files and a layer is widened when its turn comes. Needed are a float32 copy of
    the largest layer, 64 bytes for each channel and token that run at once, 4 for each that is kept, and in the host's
    memory the routed experts once more where a checkpoint stores them one by one.
    Raises NoForwardPass for model types that transformers does not know without code of the checkpoint, quantised
    checkpoints, what is not on this disk, more than eight billion weights without a GPU and too little memory;
    ValueError for positions outside the texts.
    """
    if any(not 0 <= text < len(texts) or not 0 <= token < len(texts[text]) for text, token in positions):
        raise ValueError("a position lies outside the texts")
    width = model.hidden_size
    at_once = min(TOKENS_AT_ONCE, max(map(len, texts), default=0) * len(texts))
    require_runnable(checkpoint, model)
    require_memory(checkpoint, model, STATES * width * at_once, 4 * width * len(positions) * len(model.layers))
    with explained(checkpoint), quiet():
        decoder, layers = load_decoder(checkpoint, model)
        found = _run(decoder, layers, model, texts, positions)
    return {layer: _without_gains(checkpoint, model, layer, states) for layer, states in found.items()}


def _run(
    decoder: Any,
    layers: Any,
    model: CanonicalModel,
    texts: Sequence[Sequence[int]],
    positions: Sequence[tuple[int, int]],
) -> dict[int, Tensor]:
    import torch

    _require_known_ids(decoder, texts)
    found = {layer: torch.zeros(len(positions), model.hidden_size) for layer in model.layers}
    current = _Batch(found)
    with ExitStack() as hooks, widened(decoder, layers, model.device), torch.inference_mode():
        for layer in found:
            hooks.callback(
                _mlp_of(layers[layer]).register_forward_pre_hook(current.keep(layer), with_kwargs=True).remove
            )
        for batch in _batches(texts):
            longest = max(len(texts[text]) for text in batch)
            # What follows a text is not seen by it: any token will do.
            padded = [[*texts[text], *[texts[text][0]] * (longest - len(texts[text]))] for text in batch]
            place = {text: row * longest for row, text in enumerate(batch)}
            chosen = [(row, place[text] + token) for row, (text, token) in enumerate(positions) if text in place]
            current.set(chosen, longest * len(batch))
            decoder(input_ids=torch.tensor(padded, device=model.device), use_cache=False)
            current.require_all()
    for layer, states in found.items():
        if not bool(states.isfinite().all()):
            raise ValueError(f"what enters the MLP of layer {layer} is not finite")
    return found


def _without_gains(checkpoint: Checkpoint, model: CanonicalModel, layer: int, states: Tensor) -> Tensor:
    """What enters an MLP over the gains of the norm that `CanonicalModel` folds into its readers, if it folds any."""
    import torch

    roles = [entry.role for entry in checkpoint.tensors.values() if isinstance(entry.role, TensorRole)]
    norms = {
        role.layout.norm
        for role in roles
        if role.layer == layer and role.component == model.component and role.part in READERS
    }
    if model.unfolded_because is not None or norms <= {None}:
        return states
    if len(norms) > 1:
        raise NoForwardPass(f"{checkpoint.where}: no forward pass: MLPs of layer {layer} stand behind different norms")
    gain = model.gain(str(norms.pop()), layer).cpu()
    # What a gain of zero hides, its readers do not see.
    return torch.where(gain != 0, states / gain, 0.0)


class _Batch:
    """Which rows of the batch that runs are kept, and where."""

    def __init__(self, found: Mapping[int, Tensor]) -> None:
        self._found = found
        self._seen: set[int] = set()

    def set(self, chosen: Sequence[tuple[int, int]], tokens: int) -> None:
        """The batch to come: (row of the result, token of the batch), and how many tokens it has."""
        self._chosen, self._tokens = chosen, tokens
        self._seen.clear()

    def keep(self, layer: int) -> Any:
        """A hook that keeps what enters the MLP of a layer."""
        import torch

        def hook(_: Any, given: tuple[Any, ...], named: Mapping[str, Any]) -> None:
            states = next(one for one in (*given, *named.values()) if isinstance(one, torch.Tensor))
            if states.numel() != self._tokens * self._found[layer].shape[1]:
                raise ValueError(f"the MLP of layer {layer} is given {tuple(states.shape)}")
            rows = torch.tensor([token for _, token in self._chosen], device=states.device, dtype=torch.long)
            at = torch.tensor([row for row, _ in self._chosen], dtype=torch.long)
            self._found[layer][at] = states.reshape(self._tokens, -1)[rows].float().cpu()
            self._seen.add(layer)

        return hook

    def require_all(self) -> None:
        """Raises ValueError for layers whose MLP was not called."""
        if missing := sorted(self._found.keys() - self._seen):
            raise ValueError(f"the MLP of layer {missing[0]} is not called")


def _mlp_of(layer: Any) -> Any:
    for name in MLP_NAMES:
        if hasattr(layer, name):
            return getattr(layer, name)
    raise ValueError(f"{type(layer).__name__} has no MLP under a known name")


def _require_known_ids(decoder: Any, texts: Sequence[Sequence[int]]) -> None:
    rows, largest = decoder.get_input_embeddings().weight.shape[0], max(max(text) for text in texts)
    if largest >= rows:
        raise ValueError(f"the tokenizer gives token {largest}, and the embedding has {rows} rows")


def _batches(texts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Texts of about equal length together, at most TOKENS_AT_ONCE tokens with padding."""
    batch: list[int] = []
    for text in sorted(range(len(texts)), key=lambda one: -len(texts[one])):
        if batch and (len(batch) + 1) * len(texts[batch[0]]) > TOKENS_AT_ONCE:
            yield batch
            batch = []
        batch.append(text)
    if batch:
        yield batch
