"""How many bytes does the hub path transfer, against what was asked for and against the budget? Figure 4.

    python benchmarks/hub.py [--gigabytes 100] [--read screen] [--budget 5000000000] [--seed 0] [--claim] [--save]

Two mixture-of-experts checkpoints of the given size, as sparse files, are served by the loopback hub of the tests as
candidate and reference. Their indexes are read, the sampler plans what to read of the pair, and every planned range is
read through a source that keeps what it received; then once more, which must transfer nothing. Prints JSON; `--save`
also writes it to benchmarks/results/hub.json. "wire" counts status lines and headers too; wall seconds include a server
in the same process, and one request at a time. `--claim` runs pytest on a claim about both models instead, with every
check and an empty store, and counts what that transfers; the result goes to benchmarks/results/hub-claim.json. The
weights are holes, all zero: bytes and requests are those of real weights, the time that statistics take is not.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from stream import machine  # noqa: E402

from checks.checkpoint.hub import HubSource, read_hub_index  # noqa: E402
from checks.checkpoint.index import INDEX_NAME  # noqa: E402
from checks.checkpoint.roles import role_of  # noqa: E402
from checks.streaming.planned_source import PlannedSource, planned_source  # noqa: E402
from checks.streaming.read_plan import SAMPLE, SCREEN, ReadRequest, byte_ranges  # noqa: E402
from checks.streaming.sampling import SCREEN_BUDGET, Side, plan_reads  # noqa: E402
from tests.loopback_hub import LoopbackHub  # noqa: E402

WIDTH, EXPERT_WIDTH, EXPERTS, HEADS_WIDTH, KEY_WIDTH, VOCABULARY = 4096, 1280, 128, 8192, 1024, 196_608
SHARD_BYTES = 5_000_000_000
CONFIG = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "hidden_size": WIDTH,
    "moe_intermediate_size": EXPERT_WIDTH,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 8,
    "num_attention_heads": HEADS_WIDTH // 128,
    "num_key_value_heads": KEY_WIDTH // 128,
    "head_dim": 128,
    "vocab_size": VOCABULARY,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}


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
    (directory / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers_of(weight_map)}))


def layers_of(names: Iterable[str]) -> int:
    """How many layers the names number."""
    return 1 + max(int(name.split(".")[2]) for name in names if name.startswith("model.layers."))


def read_all(source: PlannedSource, ranges: list[tuple[str, int, int]]) -> float:
    """Read ranges one after the other; wall seconds."""
    started = time.perf_counter()
    for shard, start, stop in ranges:
        source.read_into(shard, start, memoryview(bytearray(stop - start)))
    return time.perf_counter() - started


def serve(folder: str, gigabytes: float) -> tuple[LoopbackHub, dict[str, str]]:
    """A hub with both checkpoints, and their commits. The environment then names this hub."""
    hub = LoopbackHub()
    # Before huggingface_hub is imported, which reads them then.
    os.environ |= {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": f"{folder}/home",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
    }
    commits = {}
    for name in ("candidate", "reference"):
        weights = Path(folder) / name
        weights.mkdir()
        write_sparse(weights, gigabytes)
        commits[name] = hub.add_directory(f"org/{name}", weights)
    return hub, commits


def run_claim(folder: str, gigabytes: float, request: ReadRequest) -> dict[str, Any]:
    """Serve both, and run pytest on a claim that the one was not derived from the other."""
    hub, commits = serve(folder, gigabytes)
    claim = Path(folder) / "claim.yaml"
    sources = {
        name: {"name": name, "repo": f"org/{name}", "revision": commit, "config": f"{name}/config.json"}
        for name, commit in commits.items()
    }
    document = {
        "claim": "sparse",
        "statement": "The candidate was trained from scratch.",
        "model": sources["candidate"],
        "references": [sources["reference"]],
        "nearest": 0,
    }
    claim.write_text(yaml.safe_dump(document))
    options = ["--read", request.mode, "--seed", str(request.seed), "--store", f"{folder}/store"]
    options += [] if request.budget is None else ["--budget", str(request.budget)]
    started = time.perf_counter()
    with (Path(folder) / "log").open("w+") as log:
        ended = subprocess.Popen(
            [sys.executable, "-m", "pytest", str(claim), "-q", "--report", f"{folder}/report", *options],
            cwd=HERE.parent,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        _, _, usage = os.wait4(ended.pid, 0)
        log.seek(0)
        tail = log.read()[-2000:]
    seconds, wire, requests = time.perf_counter() - started, hub.wire_bytes, len(hub.requests)
    hub.close()
    outcomes: dict[str, int] = {}
    evidence = Path(folder) / "report" / "evidence.jsonl"
    if not evidence.is_file():
        raise SystemExit(f"pytest wrote no report:\n{tail}")
    for line in evidence.read_text().splitlines():
        outcome = json.loads(line)["outcome"]
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    return {
        "benchmark": "hub, a claim",
        "machine": machine(),
        "gigabytes_each": gigabytes,
        "mode": request.mode,
        "budget": request.budget,
        "wire": wire,
        "within_budget": request.budget is None or wire <= request.budget,
        "requests": requests,
        "wall_s": round(seconds, 1),
        "peak_rss_mib": round(usage.ru_maxrss / 1024),
        "outcomes": outcomes,
        "last_line": tail.strip().splitlines()[-1],
    }


def measure(folder: str, gigabytes: float, request: ReadRequest) -> dict[str, Any]:
    """Serve, plan and read."""
    started = time.perf_counter()
    hub, commits = serve(folder, gigabytes)
    indexes = [read_hub_index(f"org/{name}", commit) for name, commit in commits.items()]
    candidate, reference = (Side(index, {name: role_of(name) for name in index.tensors}) for index in indexes)
    sources = [HubSource(index) for index in indexes]
    index_seconds = time.perf_counter() - started
    index_wire, index_requests = hub.wire_bytes, len(hub.requests)

    started = time.perf_counter()
    plan = plan_reads(candidate, reference, [(name, name) for name in indexes[0].tensors], request)
    plan_seconds = time.perf_counter() - started

    asked, seconds, again = 0, 0.0, 0.0
    for index, reads, source in zip(indexes, (plan.candidate.reads, plan.reference.reads), sources, strict=True):
        ranges = list(byte_ranges(index, reads))
        asked += sum(stop - start for _, start, stop in ranges)
        kept = planned_source(source, index, reads, keep=True, directory=Path(folder))
        seconds += read_all(kept, ranges)
        again += read_all(kept, ranges)
        kept.close()
    transferred, wire = sum(source.transferred for source in sources), hub.wire_bytes - index_wire
    hub.close()
    return {
        "benchmark": "hub",
        "machine": machine(),
        "checkpoint_bytes": [sum(shard.size for shard in index.shards.values()) for index in indexes],
        "shards": len(indexes[0].shards),
        "tensors": len(indexes[0].tensors),
        "index_wire_bytes": index_wire,
        "index_requests": index_requests,
        "index_wall_s": round(index_seconds, 2),
        "plan": plan.as_evidence(),
        "plan_wall_s": round(plan_seconds, 2),
        "planned": plan.bytes,
        "asked": asked,
        "transferred": transferred,
        "wire": wire,
        "wire_over_asked": round(wire / asked, 5),
        "wire_with_indexes": wire + index_wire,
        "within_budget": request.budget is None or wire + index_wire <= request.budget,
        "requests": len(hub.requests) - index_requests,
        "wall_s": round(seconds, 2),
        "wall_s_again": round(again, 2),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=100, help="of each checkpoint")
    parser.add_argument("--read", choices=(SCREEN, SAMPLE), default=SCREEN)
    parser.add_argument("--budget", type=int, help="bytes of both together (default: 5 GB for screen)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--claim", action="store_true", help="run pytest on a claim about both")
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    budget = SCREEN_BUDGET if arguments.budget is None and arguments.read == SCREEN else arguments.budget
    with tempfile.TemporaryDirectory() as folder:
        run = run_claim if arguments.claim else measure
        result = run(folder, arguments.gigabytes, ReadRequest(arguments.read, budget, arguments.seed))
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.save:
        (HERE / "results" / ("hub-claim.json" if arguments.claim else "hub.json")).write_text(text + "\n")


if __name__ == "__main__":
    main()
