"""How fast and frugal is the pass over a pair of checkpoints, against the seed documents' way and the limits?

    python benchmarks/stream.py [--layers 7 24] [--repeat 5] [--directory DIR] [--save]

Makes Llama-shaped pairs in bf16 (7 layers are 2 x 0.98 GB, 24 layers 2 x 3.05 GB) in a temporary directory. Every
measurement is a process of its own, and the ways take turns, so that what else the machine does hits all alike; ratios
are of neighbours in time. Seconds and memory are those of the work alone: a process imports first, then reads the clock
and its peak resident memory.

- seed: benchmarks/seed_way.py; pass: `stream_pair` with hashes; the files in the page cache
- bound: SHA-256 of every byte by two processes at once, which read by pread, and after them the kernel alone, over
  pieces that stay in the cache
- raw: both files read by O_DIRECT, in that of several sizes and depths which is fastest in the median; cold:
  `stream_pair` without hashes; both with the page cache emptied of the files
- sketches: the same pass with the sketches of all tensors, as a claim with every check makes it; battery: that, and the
  neurons of the MLPs and everything that other checks want of the layers
- error: cosines of every tensor against float64; whether counts and maxima are equal to it

Prints JSON. `--save` also writes it to benchmarks/results/stream-<cpu>.json.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

SIDES = ("candidate", "reference")
MIB = 1 << 20
CONFIG = {
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
BATTERY_LAYERS = 12  # the battery takes minutes for more, on two cores
RAW_READS = ((1, 2), (1, 4), (4, 2), (4, 8))  # MiB of a request, requests in flight

Work = Callable[[], dict[str, Any]]


def prepare_seed(directory: str) -> Work:
    """The seed documents' way."""
    import contextlib
    import io

    import seed_way
    from transformers import LlamaModel  # noqa: F401 - AutoModel would import it later

    def work() -> dict[str, Any]:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            seed_way.main(*(str(Path(directory) / side) for side in SIDES))
        cosines = json.loads(printed.getvalue())["cosine"].values()
        return {"tensors": len(cosines), "mean_cosine": statistics.fmean(cosines)}

    return work


def prepare_pass(directory: str, hashing: str) -> Work:
    """One pass over the pair."""
    from checks.checkpoint.local import read_local_index
    from checks.streaming.reader import DirectSource
    from checks.streaming.stream import stream_pair

    prepare_kernel("1")()

    def work() -> dict[str, Any]:
        candidate, reference = (read_local_index(Path(directory) / side) for side in SIDES)
        sources = (DirectSource(Path(directory) / SIDES[0]), DirectSource(Path(directory) / SIDES[1]))
        pairs = [(name, name) for name in candidate.tensors]
        results = list(stream_pair(candidate, reference, sources, pairs, hashing=hashing == "hashing"))
        cosines = [result.sums.cosine for result in results if result.sums]
        return {"tensors": len(results), "mean_cosine": statistics.fmean(cosines)}

    return work


def prepare_battery(directory: str, checks: str) -> Work:
    """The pass as claims make it. `checks`: of those only that take from it ("sketches"), or all ("battery")."""
    from checks.checkpoint.model import Model
    from checks.claim.model import ModelSource
    from checks.pair.asked import layer_visitors_for
    from checks.pair.layer_visits import WANTED_BY
    from checks.pair.pair import Pair

    prepare_kernel("1")()
    takes_all = checks == "battery"

    def work() -> dict[str, Any]:
        models = [Model(ModelSource(side, path=str(Path(directory) / side)), None, ("",)) for side in SIDES]
        visitors = layer_visitors_for(WANTED_BY if takes_all else ())
        pair = Pair(*models, tests_neurons=takes_all, takes_fingerprints=True, layer_visitors=visitors)
        for measure in sorted({one for those in WANTED_BY.values() for one in those}, key=str) if takes_all else ():
            pair.once(measure)
        found = pair.comparison()
        return {"tensors": len(found.compared), "mean_cosine": statistics.fmean(one.cosine for one in found.compared)}

    return work


def prepare_hash(file: str) -> Work:
    """SHA-256 of a file, read by pread."""
    import hashlib

    def work() -> dict[str, Any]:
        digest, view, offset = hashlib.sha256(), memoryview(bytearray(MIB)), 0
        descriptor = os.open(file, os.O_RDONLY)
        while count := os.preadv(descriptor, [view], offset):
            digest.update(view[:count])
            offset += count
        return {"bytes": offset}

    return work


def prepare_kernel(elements: str) -> Work:
    """The kernel alone, again and again over the same half MiB of bf16 on either side."""
    import numpy as np

    from checks.statistics.kernel_cpu import PieceSums

    generator = np.random.default_rng(0)
    values = [generator.standard_normal(MIB // 4, np.float32).view(np.uint32) >> 16 for _ in SIDES]
    ours, theirs = (each.astype(np.uint16).view(np.uint8).data for each in values)

    def work() -> dict[str, Any]:
        sums = PieceSums("BF16", "BF16")
        for _ in range(0, int(elements), MIB // 4):
            sums.add(ours, theirs)
        return {"positions": sums.result().n}

    work()
    return work


def prepare_raw(directory: str, size: str, depth: str) -> Work:
    """Both files by O_DIRECT, the files taking turns."""
    import mmap
    import threading

    step = int(size) * MIB
    files = [os.open(Path(directory) / side / "model.safetensors", os.O_RDONLY | os.O_DIRECT) for side in SIDES]
    todo = iter([(file, offset) for offset in range(0, os.fstat(files[0]).st_size, step) for file in files])
    lock = threading.Lock()
    counts: list[int] = []

    def read() -> None:
        memory = memoryview(mmap.mmap(-1, step))
        while True:
            with lock:
                file, offset = next(todo, (None, 0))
            if file is None:
                return
            counts.append(os.preadv(file, [memory], offset))

    def work() -> dict[str, Any]:
        threads = [threading.Thread(target=read) for _ in range(int(depth))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return {"bytes": sum(counts)}

    return work


def prepare_error(directory: str) -> Work:
    """The pass against float64, tensor by tensor."""
    import torch
    from safetensors import safe_open

    from checks.checkpoint.local import read_local_index
    from checks.streaming.reader import DirectSource
    from checks.streaming.stream import stream_pair

    def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(torch.dot(a, b) / (torch.dot(a, a) * torch.dot(b, b)).sqrt())

    def work() -> dict[str, Any]:
        paths = [Path(directory) / side for side in SIDES]
        candidate, reference = map(read_local_index, paths)
        ours, theirs = (safe_open(path / "model.safetensors", "pt") for path in paths)
        raw, centred, is_exact = 0.0, 0.0, True
        pairs = [(name, name) for name in candidate.tensors]
        for result in stream_pair(candidate, reference, (DirectSource(paths[0]), DirectSource(paths[1])), pairs):
            sums = result.sums
            a, b = (opened.get_tensor(result.candidate).double().flatten() for opened in (ours, theirs))
            difference = a - b
            is_exact &= (sums.n, sums.equal) == (a.numel(), int((difference == 0).sum()))
            is_exact &= sums.max_difference == float(difference.abs().max())
            raw = max(raw, abs(sums.cosine - cosine(a, b)))
            centred = max(centred, abs(sums.centred_cosine - cosine(a - a.mean(), b - b.mean())))
        return {"cosine": raw, "centred_cosine": centred, "counts_and_maxima_exact": is_exact}

    return work


PREPARE: dict[str, Callable[..., Work]] = {
    "seed": prepare_seed,
    "pass": prepare_pass,
    "battery": prepare_battery,
    "hash": prepare_hash,
    "kernel": prepare_kernel,
    "raw": prepare_raw,
    "error": prepare_error,
}


def peak_memory() -> float:
    """The largest resident memory that this process has had, in MiB."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found.group(1)) / 1024 if found else float("nan")


def be_child(name: str, *arguments: str) -> None:
    """Prepare, then measure the work, and print it as JSON."""
    work = PREPARE[name](*arguments)
    memory, cpu, wall = peak_memory(), time.process_time(), time.perf_counter()
    found = work()
    measured = {
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
        "memory_mib": peak_memory() - memory,
    }
    print(json.dumps({**measured, **found}))


def start(name: str, *arguments: object) -> subprocess.Popen[str]:
    """A child process that measures one thing."""
    command = [sys.executable, __file__, "--child", name, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def outcome(child: subprocess.Popen[str]) -> dict[str, Any]:
    """What a child printed."""
    printed = child.communicate()[0]
    if child.returncode:
        raise SystemExit(f"{child.args} failed")
    found: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return found


def tensors(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the model."""
    width, wide, keys = 2048, 8192, 512
    in_layer = {
        "input_layernorm": (width,),
        "mlp.down_proj": (width, wide),
        "mlp.gate_proj": (wide, width),
        "mlp.up_proj": (wide, width),
        "post_attention_layernorm": (width,),
        "self_attn.k_proj": (keys, width),
        "self_attn.o_proj": (width, width),
        "self_attn.q_proj": (width, width),
        "self_attn.v_proj": (keys, width),
    }
    yield "model.embed_tokens.weight", (32000, width)
    for layer in range(layers):
        yield from ((f"model.layers.{layer}.{name}.weight", shape) for name, shape in in_layer.items())
    yield "model.norm.weight", (width,)


def make_pair(directory: Path, layers: int) -> int:
    """Write both checkpoints; the reference is the candidate with noise. Returns the bytes of one file."""
    import numpy as np

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in tensors(layers):
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    files = []
    for side in SIDES:
        (directory / side).mkdir(parents=True)
        (directory / side / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
        files.append((directory / side / "model.safetensors").open("wb"))
        files[-1].write(len(text).to_bytes(8, "little") + text)
    generator = np.random.default_rng(layers)
    for _, shape in tensors(layers):
        ours = generator.standard_normal(shape, np.float32) * np.float32(0.02) + np.float32(len(shape) == 1)
        theirs = ours + generator.standard_normal(shape, np.float32) * np.float32(0.004)
        for file, values in zip(files, (ours, theirs), strict=True):
            file.write((values.view(np.uint32) >> 16).astype(np.uint16).data)
    for file in files:
        file.close()
    os.sync()  # what is not on the disk yet cannot be dropped from the page cache
    return 8 + len(text) + offset


def files_of(directory: Path) -> list[Path]:
    """The weights of both sides."""
    return [directory / side / "model.safetensors" for side in SIDES]


def empty_cache(directory: Path) -> None:
    """Drop both files from the page cache."""
    for file in files_of(directory):
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure_bound(directory: Path, elements: int) -> dict[str, Any]:
    """SHA-256 of both files in two processes at once, then the kernel alone."""
    hashes = [outcome(child) for child in [start("hash", file) for file in files_of(directory)]]
    kernel = outcome(start("kernel", elements))
    return {
        "wall_s": max(each["wall_s"] for each in hashes) + kernel["wall_s"],
        "cpu_s": sum(each["cpu_s"] for each in hashes) + kernel["cpu_s"],
        "kernel_cpu_s": kernel["cpu_s"],
    }


def measure_pair(directory: Path, layers: int, repeat: int) -> dict[str, Any]:
    """All ways over one pair, in turns."""
    size = make_pair(directory, layers)
    found: dict[str, Any] = {"layers": layers, "bytes_of_one_file": size, "error": outcome(start("error", directory))}
    warm: dict[str, list[dict[str, Any]]] = {"pass": [], "sketches": [], "bound": [], "seed": []}
    for turn in range(repeat):
        for file in files_of(directory):
            outcome(start("hash", file))  # brings it back to the page cache
        warm["pass"].append(outcome(start("pass", directory, "hashing")))
        warm["sketches"].append(outcome(start("battery", directory, "sketches")))
        warm["bound"].append(measure_bound(directory, size // 2))
        if turn < 3:
            warm["seed"].append(outcome(start("seed", directory)))
    cold = []
    raw: dict[tuple[int, int], list[dict[str, Any]]] = {how: [] for how in RAW_READS}
    for _ in range(repeat):
        for how, reads in raw.items():
            empty_cache(directory)
            reads.append(outcome(start("raw", directory, *how)))
        empty_cache(directory)
        cold.append(outcome(start("pass", directory, "plain")))
    best = min(raw, key=lambda how: statistics.median(read["wall_s"] for read in raw[how]))
    battery = [outcome(start("battery", directory, "battery"))] if layers <= BATTERY_LAYERS else []
    return {**found, **warm, "battery": battery, "cold": cold, "raw": raw[best], "raw_mib_and_depth": best}


def ratios(over: list[dict[str, Any]], under: list[dict[str, Any]], key: str) -> dict[str, Any]:
    """Quotients of neighbours in time, and their median."""
    each = [round(a[key] / b[key], 3) for a, b in zip(over, under, strict=False)]
    return {"median": round(statistics.median(each), 3), "each": each}


def summarise(pair: dict[str, Any]) -> dict[str, Any]:
    """The figures of issue 3."""
    return {
        "gigabytes_of_one_file": round(pair["bytes_of_one_file"] / 1e9, 2),
        "seed_wall_over_pass_wall": ratios(pair["seed"], pair["pass"], "wall_s"),
        "seed_cpu_over_pass_cpu": ratios(pair["seed"], pair["pass"], "cpu_s"),
        "seed_memory_over_pass_memory": ratios(pair["seed"], pair["pass"], "memory_mib"),
        "pass_memory_mib": round(max(each["memory_mib"] for each in pair["pass"]), 1),
        "pass_wall_over_bound_wall": ratios(pair["pass"], pair["bound"], "wall_s"),
        "pass_cpu_over_bound_cpu": ratios(pair["pass"], pair["bound"], "cpu_s"),
        "pass_with_sketches": {
            "seed_wall_over_pass_wall": ratios(pair["seed"], pair["sketches"], "wall_s"),
            "seed_memory_over_pass_memory": ratios(pair["seed"], pair["sketches"], "memory_mib"),
            "memory_mib": round(max(each["memory_mib"] for each in pair["sketches"]), 1),
            "wall_over_bound_wall": ratios(pair["sketches"], pair["bound"], "wall_s"),
        },
        "battery": [
            {key: round(each[key], 1) for key in ("wall_s", "cpu_s", "memory_mib")} for each in pair["battery"]
        ],
        "cold_wall_over_raw_wall": ratios(pair["cold"], pair["raw"], "wall_s"),
        "error": {key: pair["error"][key] for key in ("cosine", "centred_cosine", "counts_and_maxima_exact")},
    }


def machine() -> dict[str, Any]:
    """What the figures depend on, without names of machines or people."""
    information = Path("/proc/cpuinfo").read_text()
    model = re.search(r"model name\s*:\s*(.+)", information)
    memory = re.search(r"MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return {
        "cpu": model.group(1).strip() if model else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "sha_ni": " sha_ni" in information,
        "memory_gib": round(int(memory.group(1)) / MIB, 1) if memory else None,
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("numpy", "torch", "numba", "transformers")},
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[7, 24])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--directory", help="where to put the temporary directory; needs 7 GB there")
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        be_child(*arguments.child)
        return
    load, pairs = [os.getloadavg()], []
    for layers in arguments.layers:
        with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
            pairs.append(measure_pair(Path(directory), layers, arguments.repeat))
        load.append(os.getloadavg())
    result = {
        "benchmark": "stream",
        "machine": machine(),
        "load_average_before_and_after": load,
        "figures": [summarise(pair) for pair in pairs],
        "measurements": pairs,
    }
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.save:
        name = re.sub(r"[^a-z0-9]+", "-", result["machine"]["cpu"].lower()).strip("-")
        (HERE / "results" / f"stream-{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
