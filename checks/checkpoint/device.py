"""Which torch device a worker computes on."""

from __future__ import annotations

import re
from functools import cache


class DeviceError(Exception):
    """The wanted device does not exist here."""


@cache
def choose_device(wanted: str, worker: int) -> str:
    """The torch device of worker number `worker` for the option --torch-device.

    "auto" gives each worker a GPU of its own by logical index, so that a caller's CUDA_VISIBLE_DEVICES is respected, or
    the CPU where there is none. Imports torch: call it when weights are about to be read.
    Raises DeviceError for a GPU that torch does not see, and for a name that is no device.
    """
    found = re.fullmatch(r"auto|cpu|cuda(?::(\d+))?", wanted)
    if found is None:
        raise DeviceError(f"--torch-device {wanted}: no such device; use auto, cpu, cuda or cuda:N")
    if wanted == "cpu":
        return wanted
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found.group(1) is None and count:
        return f"cuda:{worker % count}"
    if wanted == "auto":
        return "cpu"
    if found.group(1) is None or int(found.group(1)) >= count:
        raise DeviceError(f"--torch-device {wanted}: torch sees {count} CUDA devices; use cpu or auto")
    return wanted
