"""Initial weights made again from a public generator and a seed, as files that are read like any checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checks.checkpoint.checkpoint import Checkpoint
from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.index import SINGLE_NAME, shown

if TYPE_CHECKING:
    from torch import Tensor

# A seed of more bits could be chosen so that the weights come out as somebody wants them.
LARGEST_SEED = 2**32 - 1
# All weights are made in memory before they are compared.
LARGEST_BYTES = 16 << 30


def regenerate(candidate: Checkpoint, generator: str, seed: int, directory: Path) -> Checkpoint:
    """The initial weights that a generator gives for the candidate's architecture, written to `directory`.

    `generator`: a key of GENERATORS. Nothing of the candidate is used but its configuration, names and shapes.
    Raises CheckpointUnavailable for an unknown generator, a seed that is no integer of 32 bits, a model whose
    configuration transformers cannot build or builds otherwise than it is stored, and one too large for the memory.
    """
    if generator not in GENERATORS:
        raise CheckpointUnavailable(
            f"{candidate.where}: unknown generator {generator!r} of initial weights; known are {', '.join(GENERATORS)}"
        )
    if not 0 <= seed <= LARGEST_SEED:
        raise CheckpointUnavailable(f"{candidate.where}: the seed of initial weights must lie between 0 and 2**32 - 1")
    size = 4 * candidate.parameters
    if size > LARGEST_BYTES:
        raise CheckpointUnavailable(
            f"{candidate.where}: its initial weights take {size / 1e9:.0f} GB in float32, more than the "
            f"{LARGEST_BYTES / 1e9:.0f} GB that are made again here; publish them and name the checkpoint"
        )
    from safetensors.torch import save_file

    tensors = GENERATORS[generator](candidate, seed)
    _require_equal_shapes(candidate, tensors)
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / SINGLE_NAME, metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(dict(candidate.config)), encoding="utf-8")
    return Checkpoint(directory)


def equal_bits(one: Checkpoint, other: Checkpoint) -> tuple[int, int]:
    """How many tensors of both are equal bit for bit, and how many names both have together.

    The first is cast to the dtype of the second, which may have been stored in fewer bits than it was drawn in.
    Raises CheckpointUnavailable when a tensor cannot be read.
    """
    names = one.tensors.keys() & other.tensors.keys()
    equal = 0
    for name in names:
        drawn, stored = one.read(name), other.read(name)
        equal += drawn.shape == stored.shape and bool((drawn.to(stored.dtype) == stored).all())
    return equal, len(one.tensors.keys() | other.tensors.keys())


def _by_transformers(candidate: Checkpoint, seed: int) -> dict[str, Tensor]:
    """As `torch.manual_seed(seed); AutoModelForCausalLM.from_config(config)` draws them, in float32."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config: dict[str, Any] = dict(candidate.config)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = AutoConfig.for_model(str(config.pop("model_type", None)), **config)
            model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call,unused-ignore]
                made, dtype=torch.float32, trust_remote_code=False
            )
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointUnavailable(
            f"{candidate.where}: transformers cannot build its configuration ({shown(str(error))}); "
            "publish the initial weights and name the checkpoint"
        ) from error
    return {name: tensor.detach().contiguous().clone() for name, tensor in model.state_dict().items()}


def _by_sorted_name(candidate: Checkpoint, seed: int) -> dict[str, Tensor]:
    """One `torch.Generator` for all tensors, by sorted name: norms one, biases zero, the rest normal.

    The deviation is the configuration's `initializer_range`, 0.02 if it states none.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    deviation = _deviation(candidate.config)
    tensors = {}
    for name, entry in sorted((entry.stored_name, entry) for entry in candidate.tensors.values()):
        if entry.role.category == "bias":
            tensors[name] = torch.zeros(entry.shape)
        elif entry.role.category == "norm":
            tensors[name] = torch.ones(entry.shape)
        else:
            tensors[name] = deviation * torch.randn(entry.shape, generator=generator)
    return tensors


GENERATORS: Mapping[str, Callable[[Checkpoint, int], dict[str, Tensor]]] = {
    "transformers": _by_transformers,
    "torch": _by_sorted_name,
}


def _deviation(config: Mapping[str, object]) -> float:
    stated = config.get("initializer_range", 0.02)
    return float(stated) if isinstance(stated, int | float) and 0 < stated < 10 else 0.02


def _require_equal_shapes(candidate: Checkpoint, tensors: Mapping[str, Tensor]) -> None:
    stored = {entry.stored_name: entry.shape for entry in candidate.tensors.values()}
    for name, shape in stored.items():
        if name not in tensors:
            raise CheckpointUnavailable(
                f"{candidate.where}: the initial weights made again have no tensor {shown(name)}; store the checkpoint "
                "as transformers does, or publish the initial weights"
            )
        if tuple(tensors[name].shape) != shape:
            raise CheckpointUnavailable(
                f"{candidate.where}: {shown(name)} has shape {shape}, the initial weights made again "
                f"{tuple(tensors[name].shape)}; the configuration does not fit the weights"
            )
