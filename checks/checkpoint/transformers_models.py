"""What those need who run a model by transformers' own classes: the library, quiet, and how much memory is free."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MEMINFO = Path("/proc/meminfo")


def transformers_library() -> Any:
    """transformers, whose classes are only partly typed; imported when first asked for."""
    import transformers

    return transformers


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without its progress bar and its report, which would stand in the middle of pytest's output."""
    logging = transformers_library().utils.logging
    was_shown, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if was_shown:
            logging.enable_progress_bar()


def free_memory(device: str) -> float | None:
    """Bytes that may be used on a torch device; None when that cannot be told."""
    if device.startswith("cuda"):
        import torch

        return float(torch.cuda.mem_get_info(device)[0])
    if MEMINFO.is_file():
        for line in MEMINFO.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return 1024.0 * int(line.split()[1])
    return None
