"""How many bytes does the hub path transfer, against what was asked for? Figure 4.

    python benchmarks/hub.py [--gigabytes 100] [--budget 5e9] [--request 67108864]

A mixture-of-experts checkpoint of the given size, as sparse files, is served by the loopback hub of the tests. Its
index is read, then norms, routers and whole layers spread over the depth until the budget is spent, in requests of
bounded size. Prints one JSON line. "wire" counts status lines and headers too; wall seconds include a server in the
same process.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import struct
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from math import prod
from pathlib import Path
from types import ModuleType

from checks.checkpoint.hub import HubSource, read_hub_index
from checks.checkpoint.index import INDEX_NAME, CheckpointIndex, TensorInfo

WIDTH, EXPERT_WIDTH, EXPERTS, HEADS_WIDTH, KEY_WIDTH, VOCABULARY = 4096, 1280, 128, 8192, 1024, 196_608
SHARD_BYTES = 5_000_000_000
SMALL = re.compile(r"norm|mlp\.gate\.weight")


def loopback() -> ModuleType:
    """The tests' conftest, which holds the loopback hub."""
    path = Path(__file__).resolve().parents[1] / "tests" / "checkpoint" / "conftest.py"
    spec = importlib.util.spec_from_file_location("loopback", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["loopback"] = module
    spec.loader.exec_module(module)
    return module


def shapes(gigabytes: float) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a mixture of experts in bf16, with as many layers as come closest to the size."""
    layer = [
        ("input_layernorm.weight", (WIDTH,)),
        ("post_attention_layernorm.weight", (WIDTH,)),
        ("self_attn.q_proj.weight", (HEADS_WIDTH, WIDTH)),
        ("self_attn.k_proj.weight", (KEY_WIDTH, WIDTH)),
        ("self_attn.v_proj.weight", (KEY_WIDTH, WIDTH)),
        ("self_attn.o_proj.weight", (WIDTH, HEADS_WIDTH)),
        ("mlp.gate.weight", (EXPERTS, WIDTH)),
    ]
    for expert in range(EXPERTS):
        layer += [
            (f"mlp.experts.{expert}.gate_proj.weight", (EXPERT_WIDTH, WIDTH)),
            (f"mlp.experts.{expert}.up_proj.weight", (EXPERT_WIDTH, WIDTH)),
            (f"mlp.experts.{expert}.down_proj.weight", (WIDTH, EXPERT_WIDTH)),
        ]
    layers = round(gigabytes * 1e9 / (2 * sum(prod(shape) for _, shape in layer)))
    yield "model.embed_tokens.weight", (VOCABULARY, WIDTH)
    for number in range(layers):
        yield from ((f"model.layers.{number}.{name}", shape) for name, shape in layer)
    yield "model.norm.weight", (WIDTH,)
    yield "lm_head.weight", (VOCABULARY, WIDTH)


def write_sparse(directory: Path, gigabytes: float) -> None:
    """The checkpoint as shards that have headers and holes, and their index."""
    shards: list[dict[str, dict[str, object]]] = []
    ends: list[int] = []  # bytes of tensors in each shard
    for name, shape in shapes(gigabytes):
        size = 2 * prod(shape)
        if not shards or ends[-1] + size > SHARD_BYTES:
            shards.append({})
            ends.append(0)
        shards[-1][name] = {"dtype": "BF16", "shape": shape, "data_offsets": [ends[-1], ends[-1] + size]}
        ends[-1] += size
    weight_map: dict[str, str] = {}
    for number, header in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(header, file)
        text = json.dumps(header).encode()
        with (directory / file).open("wb") as opened:
            opened.write(struct.pack("<Q", len(text)) + text)
            opened.truncate(8 + len(text) + ends[number - 1])
    (directory / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))


def plan(index: CheckpointIndex, budget: int) -> list[TensorInfo]:
    """Norms and routers of all layers, then whole layers (last, first, middle, …) while they fit, in disk order."""
    chosen = [tensor for tensor in index.tensors.values() if SMALL.search(tensor.name)]
    left = budget - sum(tensor.stop - tensor.start for tensor in chosen)
    layers: dict[int, list[TensorInfo]] = defaultdict(list)
    for tensor in index.tensors.values():
        found = re.match(r"model\.layers\.(\d+)\.", tensor.name)
        if found and not SMALL.search(tensor.name):
            layers[int(found[1])].append(tensor)
    for number in dict.fromkeys((len(layers) - 1, 0, len(layers) // 2, *range(len(layers)))):
        size = sum(tensor.stop - tensor.start for tensor in layers[number])
        if size <= left:
            chosen += layers[number]
            left -= size
    return sorted(chosen, key=lambda tensor: (tensor.shard, tensor.start))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=100)
    parser.add_argument("--budget", type=float, default=5e9, help="bytes")
    parser.add_argument("--request", type=int, default=64 << 20, help="largest request, in bytes")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        hub = loopback().LoopbackHub()
        # Before huggingface_hub is imported, which reads them then.
        os.environ |= {
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": f"{folder}/home",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }
        (Path(folder) / "weights").mkdir()
        write_sparse(Path(folder) / "weights", arguments.gigabytes)
        commit = hub.add_directory("org/name", Path(folder) / "weights")

        started = time.perf_counter()
        index = read_hub_index("org/name", commit)
        index_seconds = time.perf_counter() - started
        index_wire, index_requests = hub.wire_bytes, len(hub.requests)

        source = HubSource(index)
        buffer = memoryview(bytearray(arguments.request))
        asked = 0
        started = time.perf_counter()
        for tensor in plan(index, int(arguments.budget)):
            for start in range(tensor.start, tensor.stop, arguments.request):
                size = min(arguments.request, tensor.stop - start)
                source.read_into(tensor.shard, start, buffer[:size])
                asked += size
        seconds = time.perf_counter() - started
        wire = hub.wire_bytes - index_wire
        hub.close()
    print(
        json.dumps(
            {
                "benchmark": "hub",
                "checkpoint_bytes": sum(shard.size for shard in index.shards.values()),
                "shards": len(index.shards),
                "tensors": len(index.tensors),
                "index_wire_bytes": index_wire,
                "index_requests": index_requests,
                "index_wall_s": round(index_seconds, 2),
                "budget": int(arguments.budget),
                "asked": asked,
                "transferred": source.transferred,
                "wire": wire,
                "wire_over_asked": round(wire / asked, 5),
                "requests": len(hub.requests) - index_requests,
                "wall_s": round(seconds, 2),
                "python": platform.python_version(),
                "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            }
        )
    )


if __name__ == "__main__":
    main()
