"""Which torch device a worker computes on."""

from __future__ import annotations

from functools import cache


class DeviceError(Exception):
    """The wanted device does not exist here."""


@cache
def choose_device(wanted: str, worker: int) -> str:
    """The torch device of worker number `worker` for the option --device.

    "auto" gives each worker a GPU of its own by logical index, so that a caller's CUDA_VISIBLE_DEVICES is respected, or
    the CPU where there is none. Imports torch: call it when weights are about to be read.
    Raises DeviceError for a GPU that torch does not see, and for a name that is no device.
    """
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted in ("auto", "cuda"):
        if count:
            return f"cuda:{worker % count}"
        if wanted == "auto":
            return "cpu"
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise DeviceError(f"--device {wanted}: torch knows no such device; use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= count:
        raise DeviceError(f"--device {wanted}: torch sees {count} CUDA devices; use --device cpu or auto")
    return str(device)
