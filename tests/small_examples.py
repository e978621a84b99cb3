"""The example models cut down: two of their layers, a quarter of their neurons; for tests that run every measure."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

EXAMPLES = Path(__file__).resolve().parents[1] / "examples" / "checkpoints"
LAYERS, NEURONS = 2, 96


def cut(name: str, directory: Path) -> Path:
    """Writes an example model, cut down, to a new directory of its name."""
    target = directory / name
    target.mkdir()
    tensors = {}
    for key, tensor in load_file(EXAMPLES / name / "model.safetensors").items():
        if ".layers." in key and int(key.split(".")[2]) >= LAYERS:
            continue
        if "down_proj" in key:
            tensor = tensor[:, :NEURONS]
        elif "gate_proj" in key or "up_proj" in key:
            tensor = tensor[:NEURONS]
        tensors[key] = tensor.contiguous()
    save_file(tensors, target / "model.safetensors")
    config = json.loads((EXAMPLES / name / "config.json").read_text())
    config |= {"num_hidden_layers": LAYERS, "intermediate_size": NEURONS}
    (target / "config.json").write_text(json.dumps(config))
    shutil.copy(EXAMPLES / name / "tokenizer.json", target)
    return target


def cut_all(directory: Path) -> Path:
    """Writes all example models, cut down, and returns the directory."""
    for name in ("derived", "base", "independent"):
        cut(name, directory)
    return directory
