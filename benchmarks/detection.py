"""What does the suite find in a lineage zoo, and whom does it accuse?

    python -m tests.zoo.build --output ZOO          # once; about two hours on one core
    python benchmarks/detection.py ZOO --half setting|scoring [--only MODEL …] [--innocents N] [--workers 2] [--save]

Writes a claim "was trained from scratch" for every model of one half, with the half's reference models as its panel,
runs pytest on all of them, and holds the verdicts against the ancestry. Thresholds are set on the half `setting`; only
the half `scoring` scores them. Prints tables in Markdown; `--save` writes them, with every value of every check, to
benchmarks/results/detection-<half>.md and .json, beside the rows of models that an earlier run saved.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.zoo.ancestry import ZooModel, load_ancestry  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results"
DERIVED, SHARED_START, INNOCENT = "derived", "shared initialisation", "innocent"
# How tables write outcomes.
MARKS = {"contradicts": "found", "supports": "-", "inconclusive": "?", "not applicable": ".", "error": "E"}


@dataclass(frozen=True)
class ZooClaim:
    """One claim about one model: its references by name with the truth about each, and the verdict that is right."""

    name: str
    model: ZooModel
    references: dict[str, str]
    right: str
    initial: dict[str, Any] | None = None

    def document(self, zoo: Path) -> dict[str, Any]:
        """The claim file."""
        claim = {
            "claim": self.name,
            "statement": f"{self.model.name} was trained from scratch.",
            "model": {"name": self.name, "path": str(zoo / self.model.name)},
            "references": [
                {"name": name.partition("/")[2], "path": str(zoo / name)} for name in sorted(self.references)
            ],
            "nearest": 0,
        }
        return claim | ({"initial": self.initial} if self.initial else {})


def zoo_claims(half: str, zoo: Path, innocents: int) -> Iterator[ZooClaim]:
    """A claim for every model of a half, and those that state their initial weights.

    `innocents`: references that a model has nothing to do with, at most; others in turn for other models. Those that
    the ancestry names beside a model are always kept.
    """
    ancestry = load_ancestry()
    references: dict[str, dict[str, str]] = defaultdict(dict)
    for candidate, reference, relation in ancestry.pairs(half):
        references[candidate.name][reference.name] = relation
    for number, (name, all_relations) in enumerate(references.items()):
        model = ancestry.models[name]
        innocent = [reference for reference, relation in all_relations.items() if relation == INNOCENT]
        unrelated = [reference for reference in innocent if reference not in model.beside]
        kept = {unrelated[(number + step) % len(unrelated)] for step in range(innocents)} if unrelated else set()
        kept.update(model.beside)
        relations = {one: said for one, said in all_relations.items() if said != INNOCENT or one in kept}
        references[name] = relations
        guilty = any(relation != INNOCENT for relation in relations.values())
        # A base is not derived from its own descendants' other parents: what it shares, it gave.
        yield ZooClaim(name.partition("/")[2], model, relations, "REFUTED" if guilty else "SUPPORTED")
    seed = json.loads((zoo / half / "llama" / "zoo.json").read_text(encoding="utf-8"))["initial_seed"]
    generated = {"generator": "torch", "seed": seed}
    published = {"checkpoint": str(zoo / half / "llama_initial")}
    forged = {"checkpoint": str(zoo / half / "forged_initial")}
    for claim, short_name, right, initial in (
        ("twin_with_seed", "llama_twin", "SUPPORTED", generated),
        ("twin_with_step_0", "llama_twin", "REFUTED", published),
        ("second_twin_with_seed", "llama_second_twin", "SUPPORTED", generated),
        ("derived_with_seed", "llama_fine_tuned", "REFUTED", generated),
        ("derived_with_forged_step_0", "llama_fine_tuned", "REFUTED", forged),
        ("graft_with_seed", "llama_grafted", "REFUTED", generated),
    ):
        name = f"{half}/{short_name}"
        if name in references:  # the small half has fewer models
            yield ZooClaim(claim, ancestry.models[name], references[name], right, initial)


def run_suite(claims: list[ZooClaim], zoo: Path, workers: int, directory: Path) -> dict[str, Any]:
    """verdict.json of one pytest run over all claims."""
    (directory / "claims").mkdir()
    for claim in claims:
        path = directory / "claims" / f"{claim.name}.yaml"
        path.write_text(yaml.safe_dump(claim.document(zoo), sort_keys=False), encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "claims", "-q", "--no-header", "--tb=no", "-p", "no:cacheprovider"]
    command += ["-n", str(workers)] if workers > 1 else []
    finished = subprocess.run(
        [*command, "--report", "report"], cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    report = directory / "report" / "verdict.json"
    if not report.is_file():
        raise SystemExit(f"pytest ended with {finished.returncode} and no report:\n{finished.stdout[-4000:]}")
    loaded: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return loaded


def scores(claims: list[ZooClaim], report: dict[str, Any]) -> list[dict[str, Any]]:
    """For every claim: the verdict and the right one; for every reference: what each check said."""
    rows = []
    for claim in claims:
        found = report["claims"][claim.name]
        by_reference: dict[str, dict[str, Any]] = {}
        for name, relation in claim.references.items():
            label = name.partition("/")[2]
            cases = [case for case in found["cases"].values() if case.get("reference") == label]
            checks: dict[str, list[dict[str, Any]]] = defaultdict(list)
            for case in cases:
                checks[case["check"]].append(case)
            by_reference[label] = {
                "relation": relation,
                "checks": {check: _worst(cases) for check, cases in checks.items()},
            }
        accused = [
            (label, check)
            for label, one in by_reference.items()
            for check, said in one["checks"].items()
            if one["relation"] == INNOCENT and said["outcome"] == "contradicts" and said["strength"] == "decisive"
        ]
        rows.append(
            {
                "claim": claim.name,
                "derivation": claim.model.derivation,
                "kind": claim.model.kind,
                "unnoticed": claim.model.unnoticed,
                "right": claim.right,
                "verdict": found["verdict"],
                "text": found["text"],
                "accused": accused,
                "references": by_reference,
            }
        )
    return rows


def _worst(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """The case of a check (one for each layer, or one) that speaks most against the claim."""
    order = ("contradicts", "error", "inconclusive", "supports", "unavailable", "not applicable", "no report")
    case = min(cases, key=lambda one: order.index(one["outcome"]))
    evidence = case["evidence"] or {}
    facts = {name: evidence.get(name) for name in ("value", "reason")}
    return {"outcome": case["outcome"], "strength": case["strength"], **facts}


def tables(rows: list[dict[str, Any]]) -> str:
    """The verdicts, what each check found of each derivation, and whom each check accused."""
    lines = ["| model | derivation | right | verdict | accused innocents |", "|---|---|---|---|---|"]
    for row in rows:
        accused = ", ".join(sorted({f"{label} ({check})" for label, check in row["accused"]})) or "-"
        note = " (expected to be missed)" if row["unnoticed"] else ""
        lines.append(f"| {row['claim']} | {row['derivation']}{note} | {row['right']} | {row['verdict']} | {accused} |")
    checks = sorted({check for row in rows for one in row["references"].values() for check in one["checks"]})
    checks = [check for check in checks if not check.startswith(("architecture.", "tokenizer."))]
    for relation, title in (
        (DERIVED, "derived pairs"),
        (SHARED_START, "shared initial weights"),
        (INNOCENT, "innocent pairs"),
    ):
        lines += [
            "",
            f"{title}, by check: pairs that it contradicts, supports, leaves open (?), or does not apply to (.)",
            "",
        ]
        lines += ["| check | contradicts | supports | ? | . |", "|---|---|---|---|---|"]
        for check in checks:
            said = Counter(
                one["checks"][check]["outcome"]
                for row in rows
                for one in row["references"].values()
                if one["relation"] == relation and check in one["checks"]
            )
            lines.append(
                f"| {check} | {said['contradicts']} | {said['supports']} | {said['inconclusive']} "
                f"| {said['not applicable']} |"
            )
    lines += ["", "derived pairs, by model and check", "", f"| pair | {' | '.join(checks)} |"]
    lines += [f"|---|{'---|' * len(checks)}"]
    for row in rows:
        for label, one in row["references"].items():
            if one["relation"] != INNOCENT:
                marks = [MARKS.get(one["checks"].get(check, {}).get("outcome"), " ") for check in checks]
                lines.append(f"| {row['claim']} / {label} | {' | '.join(marks)} |")
    return "\n".join(lines)


def main() -> None:
    """Run the suite over one half of a zoo and print what it found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoo", type=Path)
    parser.add_argument("--half", choices=("setting", "scoring", "small"), required=True)
    parser.add_argument("--only", nargs="+", metavar="MODEL", help="claims about these models alone")
    parser.add_argument("--innocents", type=int, default=99, help="unrelated references of a model, at most")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    zoo = arguments.zoo.resolve()
    claims = list(zoo_claims(arguments.half, zoo, arguments.innocents))
    claims = [one for one in claims if not arguments.only or one.name in arguments.only]
    absent = [one.name for one in claims if not (zoo / one.model.name / "zoo.json").is_file()]
    if absent:
        print(f"not built, left out: {', '.join(absent)}", file=sys.stderr)
    claims = [one for one in claims if one.name not in absent]
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        rows = scores(claims, run_suite(claims, zoo, arguments.workers, Path(directory)))
    seconds = time.perf_counter() - started
    saved = RESULTS / f"detection-{arguments.half}.json"
    if arguments.save and saved.is_file():
        fresh = {row["claim"] for row in rows}
        rows = [row for row in json.loads(saved.read_text(encoding="utf-8")) if row["claim"] not in fresh] + rows
    missed = [row["claim"] for row in rows if row["right"] == "REFUTED" and row["verdict"] != "REFUTED"]
    harmed = [
        row["claim"] for row in rows if row["accused"] or (row["right"] == "SUPPORTED" and row["verdict"] == "REFUTED")
    ]
    summary = (
        f"{arguments.half}: {len(rows)} claims, {len(claims)} of them now in {seconds:.0f} s; "
        f"not found: {', '.join(missed) or 'none'}; "
        f"accused although innocent: {', '.join(harmed) or 'none'}"
    )
    text = f"{summary}\n\n{tables(rows)}\n"
    print(text)
    if arguments.save:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"detection-{arguments.half}.md").write_text(text, encoding="utf-8")
        saved.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
