"""Does one layer of a 519B mixture of experts fit into 24 GiB, and how long do its experts take?

    python benchmarks/large_layer.py [--experts 192] [--noise 0.2] [--stage STAGE …] [--tests 2] [--save]

Two checkpoints with one layer of A.X-K1's shapes in bf16 (17 GB a side with 192 experts of 7168 x 2048) that need no
disk: their bytes are cut out of one random block whose spread changes along it, a place of its own for every tensor;
the reference's block has noise of `--noise` times that spread on it, and its experts have other numbers. Every stage
runs in a process of its own:

pairing    16 experts of the candidate look among all experts of the reference for their counterpart (pair_mlps)
anchored   the same, and independence.anchored on the pairs
units      the exact permutation test of `--tests` MLPs, as independence.units makes of every one
pass       hashes, cosines and unit tests of the first `--tests` experts alone, in one pass over both sides

Prints JSON: wall and CPU seconds, bytes read, the peak of resident memory; `--save` writes it to
benchmarks/results/large-layer.json, beside the stages that an earlier run saved. Reading is a copy in memory here: a
disk's own time comes on top.
"""

from __future__ import annotations

import argparse
import bisect
import json
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from stream import machine  # noqa: E402

from checks.checkpoint.canonical import CanonicalModel  # noqa: E402
from checks.checkpoint.checkpoint import Checkpoint  # noqa: E402
from checks.checkpoint.index import CheckpointIndex, Shard, TensorInfo  # noqa: E402

RESULT = HERE / "results" / "large-layer.json"
WIDTH, UNITS, EXPERTS = 7168, 2048, 192
CONFIG = {
    "model_type": "axk1",
    "hidden_size": WIDTH,
    "moe_intermediate_size": UNITS,
    "num_hidden_layers": 1,
    "first_k_dense_replace": 0,
    "n_shared_experts": 1,
    "num_attention_heads": 64,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
# Elements of the random block, and how far apart the tensors' places in it begin: an odd number, so that no row of one
# tensor is a row of another.
BLOCK, STRIDE = 1 << 27, 200_003
# Elements between which the spread of the block changes, and by how much (standard deviation of its logarithm).
PATCH, SPREAD = 1 << 17, 0.5
NOISE = 0.2
SHARD = "model.safetensors"


def shapes(experts: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of one layer."""
    start = "model.layers.0."
    for norm in ("input_layernorm", "post_attention_layernorm", "post_mlp_layernorm"):
        yield f"{start}{norm}.weight", (WIDTH,)
    attention = {
        "q_a_proj": (1536, WIDTH),
        "q_a_layernorm": (1536,),
        "q_b_proj": (64 * 192, 1536),
        "kv_a_proj_with_mqa": (576, WIDTH),
        "kv_a_layernorm": (512,),
        "kv_b_proj": (64 * 256, 512),
        "o_proj": (WIDTH, 64 * 128),
    }
    for name, shape in attention.items():
        yield f"{start}self_attn.{name}.weight", shape
    yield f"{start}mlp.gate.weight", (experts, WIDTH)
    for whose in ("shared_experts", *(f"experts.{expert}" for expert in range(experts))):
        for part, shape in (("gate", (UNITS, WIDTH)), ("up", (UNITS, WIDTH)), ("down", (WIDTH, UNITS))):
            yield f"{start}mlp.{whose}.{part}_proj.weight", shape


def renumbered(name: str, experts: int) -> str:
    """Which of the candidate's tensors one of the reference's is a copy of: its experts are numbered otherwise."""
    head, mark, tail = name.partition(".experts.")
    number, _, rest = tail.partition(".")
    return f"{head}{mark}{(5 * int(number) + 3) % experts}.{rest}" if mark else name


class SyntheticFiles:
    """A checkpoint whose bytes are cut out of a block in memory; counts what is read."""

    def __init__(self, experts: int, block: torch.Tensor, rename: Callable[[str], str]) -> None:
        self.where, self.provenance = "synthetic", {}
        self._block = memoryview(block.view(torch.uint8).numpy())
        self._lock = threading.Lock()
        self.bytes_read = 0
        places = {name: number * STRIDE for number, (name, _) in enumerate(shapes(experts))}
        self._tensors, self._starts, self._places, end = {}, [], [], 0
        for name, shape in shapes(experts):
            size = 2 * prod(shape)
            self._tensors[name] = TensorInfo(name, "BF16", shape, SHARD, end, end + size)
            self._starts.append(end)
            self._places.append(2 * places[rename(name)])
            end += size
        self._size = end

    def index(self) -> CheckpointIndex:
        """What a header would say."""
        return CheckpointIndex(self.where, {SHARD: Shard(SHARD, self._size)}, self._tensors)

    def source(self) -> SyntheticFiles:
        """It reads from itself."""
        return self

    def small_file(self, name: str, largest: int = 0) -> bytes | None:
        """None but the configuration."""
        return self.config() if name == "config.json" else None

    def config(self) -> bytes:
        """The configuration."""
        return json.dumps(CONFIG).encode()

    def read_into(self, shard: str, start: int, buffer: memoryview) -> None:
        """Bytes of one tensor, or of neighbours."""
        buffer = buffer.cast("B")
        done = 0
        while done < len(buffer):
            number = bisect.bisect_right(self._starts, start + done) - 1
            stop = self._starts[number + 1] if number + 1 < len(self._starts) else self._size
            count = min(len(buffer) - done, stop - start - done)
            place = self._places[number] + start + done - self._starts[number]
            buffer[done : done + count] = self._block[place : place + count]
            done += count
        with self._lock:
            self.bytes_read += done


def checkpoints(experts: int, noise: float) -> tuple[Checkpoint, Checkpoint]:
    """Candidate and reference."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.empty(2, BLOCK // PATCH, PATCH, dtype=torch.bfloat16)
    for number in range(BLOCK // PATCH):
        size = 0.02 * torch.exp(SPREAD * torch.randn((), generator=generator))
        one, added = size * torch.randn(2, PATCH, generator=generator)
        blocks[0, number], blocks[1, number] = one, one + noise * added
    ours = SyntheticFiles(experts, blocks[0].flatten(), lambda name: name)
    theirs = SyntheticFiles(experts, blocks[1].flatten(), lambda name: renumbered(name, experts))
    return Checkpoint(ours), Checkpoint(theirs)


def pairing(candidate: Checkpoint, reference: Checkpoint, tests: int) -> dict[str, Any]:
    """Experts that found their counterpart."""
    from checks.pair.mlp_pairs import pair_mlps
    from checks.pair.mlp_samples import sample_mlps

    found = pair_mlps(*sample_mlps(CanonicalModel(candidate), CanonicalModel(reference)))
    experts = [(one.expert, other.expert) for one, other in found.mapped]
    count = sum(place.kind == "routed" for place in CanonicalModel(reference).mlps(0))
    right = sum(one == (None if other is None else (5 * other + 3) % count) for one, other in experts)
    return {"pairs": len(experts), "right": right, "searched": found.searched}


def anchored(candidate: Checkpoint, reference: Checkpoint, tests: int) -> dict[str, Any]:
    """Pairs, and the share of their neurons that agree."""
    from checks.pair.anchored_matching import match_by_anchors
    from checks.pair.mlp_samples import sample_mlps

    test = match_by_anchors(*sample_mlps(CanonicalModel(candidate), CanonicalModel(reference)))
    return {"pairs": len(test.blocks), "agreement": round(test.agreement, 4), "neurons": test.units}


def units(candidate: Checkpoint, reference: Checkpoint, tests: int) -> dict[str, Any]:
    """z of some MLPs."""
    from checks.pair.matching import mlp_pairs
    from checks.pair.neurons import neuron_group, read_matrices

    started = time.perf_counter()
    groups = [
        neuron_group(*one)
        for one in read_matrices(candidate, reference, mlp_pairs(candidate, reference)[:tests], "cpu")
    ]
    each = (time.perf_counter() - started) / len(groups)
    z = [None if group.test.z is None else round(group.test.z, 2) for group in groups]
    return {"mlps": len(groups), "z": z, "seconds_per_mlp": round(each, 2)}


def whole_pass(candidate: Checkpoint, reference: Checkpoint, tests: int) -> dict[str, Any]:
    """One pass over everything."""
    from checks.pair.comparison import compare

    found = compare(candidate, reference, with_neurons=True)
    return {"tensors": len(found.compared), "mlps": len(found.neurons or ())}


STAGES = {"pairing": pairing, "anchored": anchored, "units": units, "pass": whole_pass}


def measure(stage: str, experts: int, noise: float, tests: int) -> dict[str, Any]:
    """One stage, in this process."""
    sides = checkpoints(tests if stage == "pass" else experts, noise)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, cpu = time.perf_counter(), time.process_time()
    found = STAGES[stage](*sides, tests)
    read = [side.files.bytes_read for side in sides]  # type: ignore[attr-defined]
    return {
        "stage": stage,
        "noise": noise,
        **found,
        "wall_seconds": round(time.perf_counter() - wall, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "gigabytes_of_each_side": round(sides[0].index.shards[SHARD].size / 1e9, 2),
        "gigabytes_read": [round(one / 1e9, 2) for one in read],
        "peak_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "before_gib": round(before / 2**20, 2),
        "threads": torch.get_num_threads(),
    }


def main() -> None:
    """Run the stages, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=EXPERTS)
    parser.add_argument("--noise", type=float, default=NOISE, help="of the reference, in spreads of the weights")
    parser.add_argument("--stage", nargs="+", choices=list(STAGES), default=list(STAGES))
    parser.add_argument("--tests", type=int, default=2, help="MLPs of the stages units and pass")
    parser.add_argument("--save", action="store_true")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.stage[0], arguments.experts, arguments.noise, arguments.tests)))
        return
    rows = []
    for stage in arguments.stage:
        command = [sys.executable, __file__, "--child", "--stage", stage, "--experts", str(arguments.experts)]
        command += ["--noise", str(arguments.noise), "--tests", str(arguments.tests)]
        finished = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        rows.append(json.loads(finished.stdout))
        print(json.dumps(rows[-1]), flush=True)
    if arguments.save:
        fresh = {(row["stage"], row["noise"]) for row in rows}
        known = json.loads(RESULT.read_text(encoding="utf-8")).get("stages", []) if RESULT.is_file() else []
        rows = [row for row in known if (row["stage"], row["noise"]) not in fresh] + rows
        document = {"machine": machine(), "shapes": {"width": WIDTH, "units": UNITS}, "stages": rows}
        RESULT.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
