"""How long does `pytest --collect-only` take on a claim of 20,000 cases, and does it import torch?

    python benchmarks/collect.py [--cases 20000] [--repeat 5]

Prints one JSON line: the number of cases, wall seconds of each run of the whole command (interpreter start included),
pytest's own "collected in" seconds, and whether torch was imported.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONFIG = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14336,
    "hidden_act": "silu",
    "vocab_size": 32000,
}
LOOK_FOR_TORCH = (
    "import sys\n\n\ndef pytest_collection_finish():\n    print('torch imported:', 'torch' in sys.modules)\n"
)


def write_claim(directory: Path, cases: int) -> Path:
    """A claim with enough references (48 layers each) for at least `cases` cases."""
    (directory / "config.json").write_text(json.dumps(CONFIG))
    (directory / "weights").mkdir()
    references = cases // 56 + 1
    lines = [
        "claim: many",
        "statement: A claim with many references.",
        "model: {path: weights, config: config.json}",
        "nearest: 0",
        "references:",
        *(f"  - {{name: r{number}, path: weights/{number}, config: config.json}}" for number in range(references)),
    ]
    claim = directory / "many.yaml"
    claim.write_text("\n".join(lines) + "\n")
    (directory / "conftest.py").write_text(LOOK_FOR_TORCH)
    return claim


def collect_once(claim: Path) -> tuple[float, float, int, bool]:
    """Wall seconds, pytest's own seconds, cases, and whether torch was imported, of one run in a fresh process."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "--rootdir", str(claim.parent), "-s", claim.name],
        cwd=claim.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    wall = time.perf_counter() - started
    found = re.search(r"(\d+) tests collected in ([\d.]+)s", done.stdout)
    if found is None:
        raise SystemExit(done.stdout[-2000:])
    return wall, float(found.group(2)), int(found.group(1)), "torch imported: True" in done.stdout


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--repeat", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        claim = write_claim(Path(directory), arguments.cases)
        collect_once(claim)  # pytest caches rewritten modules on its first run
        runs = [collect_once(claim) for _ in range(arguments.repeat)]
    print(
        json.dumps(
            {
                "benchmark": "collect",
                "cases": runs[0][2],
                "wall_s": [round(run[0], 2) for run in runs],
                "pytest_s": [run[1] for run in runs],
                "torch_imported": any(run[3] for run in runs),
                "python": platform.python_version(),
                "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            }
        )
    )


if __name__ == "__main__":
    main()
