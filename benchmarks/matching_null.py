"""How many neurons of independent models find one partner by both matchings? The null of T2 on the lineage zoo.

    python benchmarks/matching_null.py ZOO [--half setting] [--workers 2] [--save]

Runs the matchings of `independence.anchored` and of `independence.neurons` by tokens over every pair of one half that
the ancestry calls innocent, and prints the largest agreements and scores; `--save` also writes every pair to
benchmarks/results/matching-null-<half>.json. Bounds are set on the half `setting` alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from checks.checkpoint.errors import CheckpointUnavailable  # noqa: E402
from checks.checkpoint.model import Model  # noqa: E402
from checks.claim.model import ModelSource  # noqa: E402
from checks.pair import measures  # noqa: E402
from checks.pair.pair import Pair  # noqa: E402
from checks.pair.probed_matching import match_by_tokens  # noqa: E402
from checks.statistics.block_matching import MatchingTest  # noqa: E402
from checks.statistics.double_matching import LEAST_UNITS  # noqa: E402
from tests.zoo.ancestry import load_ancestry  # noqa: E402

INNOCENT = "innocent"


def innocent_pairs(half: str, zoo: Path) -> list[tuple[str, str]]:
    """Candidate and reference of every innocent pair whose models are built, each pair in one order."""
    found: dict[frozenset[str], tuple[str, str]] = {}
    for candidate, reference, relation in load_ancestry().pairs(half):
        built = all((zoo / one.name / "config.json").is_file() for one in (candidate, reference))
        if relation == INNOCENT and built:
            found.setdefault(frozenset((candidate.name, reference.name)), (candidate.name, reference.name))
    return list(found.values())


def measure(zoo: str, candidate: str, reference: str) -> dict[str, Any]:
    """Both matchings of one pair; the reason where one cannot be had."""
    ours, theirs = (Model(ModelSource(name, path=f"{zoo}/{name}"), None, ("",)) for name in (candidate, reference))
    pair = Pair(ours, theirs)
    row: dict[str, Any] = {"candidate": candidate, "reference": reference}
    for name, test in (("anchored", measures.matching_by_anchors), ("tokens", by_tokens)):
        try:
            row[name] = summary(test(pair))
        except CheckpointUnavailable as error:
            row[name] = {"reason": str(error)}
    return row


def by_tokens(pair: Pair) -> MatchingTest:
    """The matching by shared tokens alone, without the second opinion of a common text."""
    return match_by_tokens(*pair.once(measures.samples), pair.once(measures.tokens).ids, measures.SEED)


def summary(test: MatchingTest) -> dict[str, Any]:
    """The figures of one matching."""
    blocks = [block for block in test.blocks if block.matching.z is not None and block.matching.units >= LEAST_UNITS]
    return {
        "agreement": test.agreement,
        "largest_block": max((block.matching.agreement for block in blocks), default=None),
        "largest_mismatched": test.null.largest_agreement,
        "joint_z": test.joint_z,
        "largest_z": max((test.z_adjusted(block) or 0.0 for block in blocks), default=None),
        "neurons": test.units,
        "reason": test.abstains_because,
    }


def largest(rows: list[dict[str, Any]], test: str, figure: str) -> float | None:
    """The largest figure over all pairs."""
    return max((row[test][figure] for row in rows if row[test].get(figure) is not None), default=None)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoo", type=Path)
    parser.add_argument("--half", default="setting")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    pairs = innocent_pairs(arguments.half, arguments.zoo)
    with ProcessPoolExecutor(arguments.workers) as pool:
        found = [pool.submit(measure, str(arguments.zoo), *pair) for pair in pairs]
        rows = [one.result() for one in found]
    figures = ("agreement", "largest_block", "largest_mismatched", "joint_z", "largest_z")
    result = {
        "benchmark": "matching null",
        "half": arguments.half,
        "pairs": len(rows),
        "largest": {test: {one: largest(rows, test, one) for one in figures} for test in ("anchored", "tokens")},
        "rows": rows,
    }
    print(json.dumps({key: value for key, value in result.items() if key != "rows"}, indent=1))
    if arguments.save:
        path = HERE / "results" / f"matching-null-{arguments.half}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
