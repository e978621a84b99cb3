"""A checkpoint as transformers' own model, to be run layer by layer in little memory. None of its code is run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from checks.checkpoint.canonical import CanonicalModel
from checks.checkpoint.checkpoint import FLOAT_DTYPES, Checkpoint, torch_dtype
from checks.checkpoint.errors import CheckpointUnavailable
from checks.checkpoint.index import shown
from checks.checkpoint.transformers_models import free_memory, transformers_library

# More weights than this are not run without a GPU: about a quarter of an hour for some thousand tokens on two cores, by
# an estimate of 100 GFLOP/s.
MOST_ON_CPU = 8_000_000_000
# What a configuration may state of the stored weights: a tied head counts twice, padding and buffers a little.
MOST_TIMES_STORED = 2.5

# What transformers raises over a checkpoint that it cannot run, beside what safetensors raises.
_FAILURES = (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError, IndexError)


class NoForwardPass(CheckpointUnavailable):
    """This checkpoint cannot be run here; the text says why. What needs no forward pass is not concerned."""


def require_runnable(checkpoint: Checkpoint, model: CanonicalModel) -> None:
    """Raises NoForwardPass for what is not on this disk, no text model, quantised, an adapter, at odds with its own
    config.json, or too large for a CPU."""
    reason = None
    if checkpoint.directory is None:
        reason = "its weights are not on this disk: download it"
    elif model.component != "text":
        reason = f"its {model.component} part reads no text"
    elif any("quantization_config" in one for one in _configs(checkpoint)):
        reason = "it is quantised: give an unquantised release"
    elif not isinstance(checkpoint.config.get("model_type"), str):
        reason = "its config.json names no model type"
    elif (checkpoint.directory / "adapter_config.json").exists():
        reason = "it is an adapter: merge it into its base"
    elif _most_common_type(checkpoint) not in FLOAT_DTYPES:
        reason = f"its weights are stored as {_most_common_type(checkpoint)}"
    elif checkpoint.roles.missing_count or checkpoint.roles.problems:
        # transformers would make room for whatever the configuration states.
        reason = "its tensors do not fit its config.json: download it again"
    elif model.device == "cpu" and checkpoint.parameters > MOST_ON_CPU:
        reason = f"{checkpoint.parameters / 1e9:.0f} billion weights take too long without a GPU"
    if reason is not None:
        raise NoForwardPass(f"{checkpoint.where}: no forward pass: {reason}")


def _configs(checkpoint: Checkpoint) -> list[Mapping[str, Any]]:
    """The configuration, and that of its text decoder if it has one of its own."""
    return [one for one in (checkpoint.config, checkpoint.config.get("text_config")) if isinstance(one, Mapping)]


def require_memory(checkpoint: Checkpoint, model: CanonicalModel, states: int, kept: int) -> None:
    """Raises NoForwardPass where memory does not suffice.

    Needed on the model's device: a float32 copy of the largest layer and `states` bytes; on the host `kept` bytes, and
    the routed experts once more where they are stored one by one, since transformers stacks them.
    """
    by_layer: dict[int | None, int] = {}
    experts = 0
    for entry in checkpoint.tensors.values():
        by_layer[entry.role.layer] = by_layer.get(entry.role.layer, 0) + 4 * entry.elements
        if len(entry.shape) == 2 and ".experts." in entry.stored_name:
            experts += entry.stored.stop - entry.stored.start
    on_device, on_host = max(by_layer.values(), default=0) + states, experts + kept
    needs = [("cpu", on_device + on_host)] if model.device == "cpu" else [(model.device, on_device), ("cpu", on_host)]
    for device, needed in needs:
        free = free_memory(device)
        if free is not None and needed > free:
            raise NoForwardPass(
                f"{checkpoint.where}: no forward pass: it needs {needed / 1e9:.1f} GB on {device}, and "
                f"{free / 1e9:.1f} GB are free"
            )


def load_decoder(checkpoint: Checkpoint, model: CanonicalModel) -> tuple[Any, Any]:
    """The text decoder, its weights mapped from their files as stored, and its list of layers.

    Raises what transformers raises, and ValueError for model types that it does not know without code of the
    checkpoint, and for configurations and weights that do not fit each other.
    """
    import torch

    library = transformers_library()
    kind = checkpoint.config["model_type"]
    if kind not in library.CONFIG_MAPPING:
        raise ValueError(f"transformers does not know the model type {shown(kind)} without code of the checkpoint")
    config = library.CONFIG_MAPPING[kind].from_dict(
        {key: value for key, value in checkpoint.config.items() if key != "auto_map"}
    )
    if config.is_encoder_decoder:
        raise ValueError("an encoder and a decoder read no common text")
    stated = getattr(config.get_text_config(), "num_hidden_layers", 0)
    if stated > len(model.layers):
        raise ValueError(f"config.json states {stated} layers, and {len(model.layers)} are stored")
    with_images = type(config) in library.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    auto = library.AutoModelForImageTextToText if with_images else library.AutoModelForCausalLM
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in auto.from_config(config).parameters())
    if size > MOST_TIMES_STORED * checkpoint.parameters:
        raise ValueError(f"config.json states {size} weights, and {checkpoint.parameters} are stored")
    network, loading = auto.from_pretrained(
        checkpoint.directory,
        config=config,
        dtype=torch_dtype(_most_common_type(checkpoint)),
        attn_implementation="eager",
        use_safetensors=True,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # refused below, by name
    )
    # transformers fills gaps with random weights, whose answers would be nobody's.
    if gaps := sorted(map(str, [*loading["missing_keys"], *loading["mismatched_keys"]])):
        raise ValueError(f"{len(gaps)} weights are missing or of another shape, first {gaps[0]}")
    return _decoder(network.eval().get_decoder(), 1 + max(model.layers))


def _decoder(network: Any, least: int) -> tuple[Any, Any]:
    """The module with the list of layers, and this list."""
    from torch.nn import ModuleList

    for module in network.modules():
        for child in module.children():
            if isinstance(child, ModuleList) and len(child) >= least:
                return module, child
    raise ValueError(f"{type(network).__name__} has no list of {least} layers")


def _most_common_type(checkpoint: Checkpoint) -> str:
    """The type of most weights; config.json may state another one."""
    elements: dict[str, int] = {}
    for entry in checkpoint.tensors.values():
        elements[entry.dtype] = elements.get(entry.dtype, 0) + entry.elements
    return max(elements, key=lambda dtype: elements[dtype], default="no tensors")


@contextmanager
def widened(decoder: Any, layers: Any, device: str) -> Iterator[None]:
    """The decoder can be called: a layer's weights are float32 on the device while it runs, and as stored otherwise."""
    with ExitStack() as stack:
        for holder in _holders(decoder, layers):
            stack.enter_context(_widened(holder, device))
        yield


def _holders(decoder: Any, layers: Any) -> list[tuple[Any, list[Any]]]:
    """Modules that are called, each with those whose weights it needs: a layer needs all of its own."""
    inside = {id(module) for module in layers.modules()}
    alone = [module for module in decoder.modules() if id(module) not in inside]
    return [(layer, list(layer.modules())) for layer in layers] + [(module, [module]) for module in alone]


@contextmanager
def _widened(holder: tuple[Any, list[Any]], device: str) -> Iterator[None]:
    """While a module is called, its weights are float32 on the device; before and after they are what they were."""
    import torch
    from torch.nn import Parameter

    called, modules = holder
    kept: list[tuple[Any, str, Any]] = []

    def widen(*_: Any) -> None:
        for module in modules:
            for name, value in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
                dtype = torch.float32 if value.is_floating_point() else value.dtype
                copy = value.detach().to(device, dtype)
                if copy.dtype != value.dtype or copy.device != value.device:
                    kept.append((module, name, value))
                    setattr(module, name, Parameter(copy, False) if isinstance(value, Parameter) else copy)

    def restore(*_: Any) -> None:
        while kept:
            module, name, value = kept.pop()
            setattr(module, name, value)

    hooks = [called.register_forward_pre_hook(widen), called.register_forward_hook(restore, always_call=True)]
    try:
        yield
    finally:
        restore()
        for hook in hooks:
            hook.remove()


@contextmanager
def explained(checkpoint: Checkpoint) -> Iterator[None]:
    """Failures of transformers as NoForwardPass."""
    from safetensors import SafetensorError

    try:
        yield
    except (*_FAILURES, SafetensorError) as error:
        raise NoForwardPass(
            f"{checkpoint.where}: no forward pass: transformers cannot run it ({type(error).__name__}: "
            f"{shown(str(error))})"
        ) from error
