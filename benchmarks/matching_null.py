"""How many neurons of independent models find one partner by both matchings? The null of T2 on the lineage zoo.

    python benchmarks/matching_null.py ZOO [--half setting] [--matching anchored tokens] [--workers 2] [--save]
    python benchmarks/matching_null.py ZOO --matching text --derived [--limit 8] [--workers 2] [--save]

Runs matchings over every pair of one half that the ancestry calls innocent, and prints the largest agreements and
scores: `anchored` is that of `independence.anchored`, `tokens` and `text` those of `independence.neurons` by shared
tokens and by a common text (both models are run over it). `--derived`: over the other pairs too, and how many of them
are found, at the level of a claim with 20 calibrated cases. `--limit`: only so many pairs of either kind, 2 at least.

`--save` also writes every pair to benchmarks/results/matching-null-<half>.json, beside the matchings of earlier runs;
not with `--limit`. Bounds are set on the half `setting` alone.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from checks.checkpoint.errors import CheckpointUnavailable  # noqa: E402
from checks.checkpoint.model import Model  # noqa: E402
from checks.claim.model import ModelSource  # noqa: E402
from checks.pair import measures  # noqa: E402
from checks.pair.mlp_samples import spread  # noqa: E402
from checks.pair.pair import Pair  # noqa: E402
from checks.pair.probed_matching import match_by_tokens  # noqa: E402
from checks.statistics.block_matching import MatchingTest  # noqa: E402
from checks.statistics.double_matching import LEAST_UNITS  # noqa: E402
from checks.statistics.units import critical_z  # noqa: E402
from tests.zoo.ancestry import load_ancestry  # noqa: E402

INNOCENT = "innocent"
FIGURES = ("agreement", "largest_block", "largest_mismatched", "joint_z", "largest_z")
# As of independence.neurons and independence.anchored in thresholds.yaml; calibrated cases of a claim.
LEVEL, CASES = 1e-3, 20


def by_tokens(pair: Pair) -> MatchingTest:
    """The matching by shared tokens alone, without the second opinion of a common text."""
    return match_by_tokens(*pair.once(measures.samples), pair.once(measures.tokens).ids, measures.SEED)


MATCHINGS: dict[str, Callable[[Pair], MatchingTest]] = {
    "anchored": measures.matching_by_anchors,
    "tokens": by_tokens,
    "text": measures.matching_by_text,
}


def zoo_pairs(half: str, zoo: Path) -> Iterator[tuple[str, str, str]]:
    """Candidate, reference and relation of every pair whose models are built, each pair in one order."""
    seen: set[frozenset[str]] = set()
    for candidate, reference, relation in load_ancestry().pairs(half):
        names = frozenset((candidate.name, reference.name))
        built = all((zoo / name / "config.json").is_file() for name in names)
        if built and names not in seen:
            seen.add(names)
            yield candidate.name, reference.name, relation


def measure(zoo: str, candidate: str, reference: str, relation: str, matchings: list[str]) -> dict[str, Any]:
    """Some matchings of one pair; the reason where one cannot be had."""
    ours, theirs = (Model(ModelSource(name, path=f"{zoo}/{name}"), None, ("",)) for name in (candidate, reference))
    pair = Pair(ours, theirs)
    row: dict[str, Any] = {"candidate": candidate, "reference": reference, "relation": relation}
    for name in matchings:
        try:
            row[name] = summary(MATCHINGS[name](pair))
        except CheckpointUnavailable as error:
            row[name] = {"reason": str(error)}
    return row


def summary(test: MatchingTest) -> dict[str, Any]:
    """The figures of one matching."""
    blocks = [block for block in test.blocks if block.matching.z is not None and block.matching.units >= LEAST_UNITS]
    return {
        "agreement": test.agreement,
        "largest_block": max((block.matching.agreement for block in blocks), default=None),
        "largest_mismatched": test.null.largest_agreement,
        "joint_z": test.joint_z,
        "largest_z": max((test.z_adjusted(block) or 0.0 for block in blocks), default=None),
        "z": [round(block.matching.z, 3) for block in blocks if block.matching.z is not None],
        "neurons": test.units,
        "found": test.finding(critical_z(LEVEL, CASES * test.tests)).dependent,
        "reason": test.abstains_because,
    }


def summarised(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What all pairs say: the largest figures of the innocent ones and how z varies; how many others are found."""
    result: dict[str, Any] = {"pairs": sum(row["relation"] == INNOCENT for row in rows), "largest": {}}
    for name in MATCHINGS:
        innocent = [row[name] for row in rows if name in row and row["relation"] == INNOCENT]
        related = [row[name] for row in rows if name in row and row["relation"] != INNOCENT]
        largest = {
            one: max((row[one] for row in innocent if row.get(one) is not None), default=None) for one in FIGURES
        }
        scores = [z for row in innocent for z in row.get("z", ())]
        if innocent:
            result["largest"][name] = largest | {
                "matched_pairs": sum(row.get("reason") is None for row in innocent),
                "found": sum(row.get("found") is True for row in innocent),
                "blocks": len(scores),
                "mean_z": round(math.fsum(scores) / len(scores), 3) if scores else None,
                "sd_z": round(statistics.stdev(scores), 3) if len(scores) > 1 else None,
            }
        if related:
            found = sum(row.get("found") is True for row in related)
            result.setdefault("related", {})[name] = {"pairs": len(related), "found": found}
    return result


def merged(known: list[dict[str, Any]], fresh: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of an earlier run with those of this one; a matching that was repeated is the new one."""
    rows = {(row["candidate"], row["reference"]): {"relation": INNOCENT, **row} for row in known}
    for row in fresh:
        key = row["candidate"], row["reference"]
        rows[key] = {**rows.get(key, {}), **row}
    return list(rows.values())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoo", type=Path)
    parser.add_argument("--half", default="setting")
    parser.add_argument("--matching", nargs="+", choices=list(MATCHINGS), default=["anchored", "tokens"])
    parser.add_argument("--derived", action="store_true", help="the pairs that are not innocent as well")
    parser.add_argument("--limit", type=int, help="pairs of either kind")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    if arguments.save and arguments.limit is not None:
        parser.error("--save needs every pair: leave out --limit")
    pairs = list(zoo_pairs(arguments.half, arguments.zoo))
    chosen = [pair for pair in pairs if pair[2] == INNOCENT], [pair for pair in pairs if pair[2] != INNOCENT]
    wanted = list(chosen[: 1 + arguments.derived])
    if arguments.limit is not None:
        wanted = [spread(kind, max(2, arguments.limit)) for kind in wanted]
    with ProcessPoolExecutor(arguments.workers) as pool:
        found = [
            pool.submit(measure, str(arguments.zoo), *pair, arguments.matching) for kind in wanted for pair in kind
        ]
        rows = [one.result() for one in found]
    path = HERE / "results" / f"matching-null-{arguments.half}.json"
    if arguments.save and path.is_file():
        rows = merged(json.loads(path.read_text(encoding="utf-8"))["rows"], rows)
    result = {"benchmark": "matching null", "half": arguments.half, **summarised(rows), "rows": rows}
    print(json.dumps({key: value for key, value in result.items() if key != "rows"}, indent=1))
    if arguments.save:
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
