"""How fast is the pass over a pair on a GPU, against the disk's and the bus's limits, and does it agree with the CPU's?

    python benchmarks/gpu.py [--layers 64] [--repeat 3] [--device cuda] [--directory DIR] [--save]

Makes a Llama-shaped pair in bf16 (64 layers are 2 x 8.0 GB) and measures, each several times and in turns:

- bus: host to device copies of pinned memory, 256 MiB at a time
- disk: both files read by O_DIRECT; the fastest of several sizes and depths
- warm, cold: `stream_pair` with and without hashes, the page cache full or emptied of the files
- equality: every result of the GPU against the CPU's: counts, maxima and hashes equal, cosines within 1e-6

Prints JSON; `--save` also writes it to benchmarks/results/gpu-<name>.json. Without a GPU it says so and ends with
status 2.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from stream import RAW_READS, SIDES, empty_cache, machine, make_pair, prepare_raw  # noqa: E402

from checks.checkpoint.local import read_local_index  # noqa: E402
from checks.streaming.reader import DirectSource  # noqa: E402
from checks.streaming.stream import TensorResult, stream_pair  # noqa: E402

COPY_BYTES = 256 << 20
LARGEST_ERROR = 1e-6


def stream(directory: Path, device: str, hashing: bool) -> list[TensorResult]:
    """The whole pass."""
    paths = [directory / side for side in SIDES]
    candidate, reference = map(read_local_index, paths)
    sources = (DirectSource(paths[0]), DirectSource(paths[1]))
    pairs = [(name, name) for name in candidate.tensors]
    return list(stream_pair(candidate, reference, sources, pairs, hashing=hashing, device=device))


def bus_rate(device: str, repeat: int) -> float:
    """GB/s of copies from pinned memory, the median."""
    import torch

    host = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    rates = []
    for _ in range(repeat + 1):
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        for _ in range(8):
            there.copy_(host, non_blocking=True)
        torch.cuda.synchronize(device)
        rates.append(8 * COPY_BYTES / (time.perf_counter() - started) / 1e9)
    return statistics.median(rates[1:])


def seconds_of(work: Any) -> float:
    """Wall seconds of one call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def disagreements(ours: list[TensorResult], theirs: list[TensorResult]) -> list[str]:
    """What two devices say differently of the same pair; empty if they agree."""
    found = []
    for one, other in zip(ours, theirs, strict=True):
        a, b = one.sums, other.sums
        assert a is not None
        assert b is not None
        exact = ("n", "equal", "max_difference")
        wrong = [name for name in exact if getattr(a, name) != getattr(b, name)]
        wrong += [name for name in ("cosine", "centred_cosine") if not _near(getattr(a, name), getattr(b, name))]
        hashes = ("candidate_sha256", "reference_sha256")
        wrong += [name for name in hashes if getattr(one, name) != getattr(other, name)]
        if wrong:
            found.append(f"{one.candidate}: {', '.join(wrong)}")
    return found


def _near(one: float | None, other: float | None) -> bool:
    return one is other if one is None or other is None else abs(one - other) <= LARGEST_ERROR


def measure(directory: Path, layers: int, repeat: int, device: str) -> dict[str, Any]:
    """Everything of one pair."""
    size = make_pair(directory, layers)
    times: dict[str, list[float]] = {}
    for _ in range(repeat):
        for hashing in (True, False):
            name = "with hashes" if hashing else "without"
            stream(directory, "cpu", hashing=False)  # fills the page cache
            times.setdefault(f"warm, {name}", []).append(seconds_of(lambda how=hashing: stream(directory, device, how)))
            empty_cache(directory)
            times.setdefault(f"cold, {name}", []).append(seconds_of(lambda how=hashing: stream(directory, device, how)))
        for megabytes, depth in RAW_READS:
            empty_cache(directory)
            read = prepare_raw(str(directory), str(megabytes), str(depth))
            times.setdefault(f"disk, {megabytes} MiB x {depth}", []).append(seconds_of(read))
    medians = {name: statistics.median(values) for name, values in times.items()}
    disk = min(value for name, value in medians.items() if name.startswith("disk"))
    different = disagreements(stream(directory, device, True), stream(directory, "cpu", True))
    total = 2 * size
    return {
        "bytes": total,
        "seconds": times,
        "gb_per_s": {name: round(total / value / 1e9, 3) for name, value in medians.items()},
        "bus_gb_per_s": round(bus_rate(device, repeat), 2),
        "cold_over_disk": {name: round(value / disk, 3) for name, value in medians.items() if name.startswith("cold")},
        "different_from_the_cpu": different,
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--directory", help="where to put the temporary directory; needs 17 GB there")
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("no GPU that torch can use: nothing was measured", file=sys.stderr)
        raise SystemExit(2)
    name = torch.cuda.get_device_name(arguments.device)
    with tempfile.TemporaryDirectory(dir=arguments.directory) as folder:
        measured = measure(Path(folder), arguments.layers, arguments.repeat, arguments.device)
    text = json.dumps({"benchmark": "gpu", "gpu": name, "machine": machine(), **measured}, indent=1)
    print(text)
    if arguments.save:
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        (HERE / "results" / f"gpu-{slug}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
