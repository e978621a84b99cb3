"""How alike do related and unrelated small models go on? The figures of docs/behavior.md for `behavior.next_token`.

    python -m tests.zoo.build --output ZOO          # once; about two hours on one core
    python benchmarks/behavior.py ZOO --half setting|scoring [--only MODEL …] [--save]

Some models of one half (`--only`: others) are asked against five references: the half's llama, qwen and mixtral, and
`base` and `independent` of examples/. Prints a table in Markdown; `--save` writes it to
benchmarks/results/behavior-<half>.md.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from checks.evidence.thresholds import threshold  # noqa: E402
from checks.generation.agreement import decide_agreement  # noqa: E402
from checks.generation.asking import beginnings  # noqa: E402
from checks.generation.local import LocalTextModel  # noqa: E402
from checks.generation.prompts import continuations  # noqa: E402
from checks.statistics.agreement import equal_answers, first_word  # noqa: E402
from tests.zoo.ancestry import ZooModel, load_ancestry  # noqa: E402

REFERENCES = ("llama", "qwen", "mixtral")
EXAMPLES = ("base", "independent")
# Copies, further trainings of every kind, and innocent models.
CANDIDATES = (
    "llama_other_seed",
    "llama_other_data",
    "llama_pruned",
    "llama_int8",
    "qwen_rescaled",
    "mixtral_rotated",
    "llama_continued",
    "llama_fine_tuned",
    "qwen_fine_tuned",
    "mixtral_fine_tuned",
    "llama_lora",
    "llama_new_tokenizer",
    "qwen_all_permuted_tuned",
)
HEAD = (
    "| candidate | truth | nearest reference | agreement | best control | excess | corrected p | outcome |\n"
    + 8 * "|---"
    + "|"
)


def words_of(directory: Path) -> list[str]:
    """The word with which a model goes on after each prompt."""
    with LocalTextModel(directory, directory.name) as model:
        return [first_word(text) for text in beginnings(model, continuations().prompts)]


def row(model: ZooModel, ours: Sequence[str], references: dict[str, list[str]]) -> str:
    """What `behavior.next_token` makes of one candidate; truth: the references that it is not innocent of."""
    limits = threshold("behavior.next_token")
    assert limits.contradicts_from is not None
    found = equal_answers(ours, references, 10**-limits.contradicts_from / len(references))
    nearest = min(found, key=lambda one: (one.p, -one.excess))
    figures = f"{nearest.agreement:.2f} | {nearest.control_agreement:.2f} | {nearest.excess:.2f}"
    outcome = decide_agreement(limits, found, "next words").outcome
    relation = load_ancestry().relation
    related = {one: relation(model.name, f"{model.half}/{one}") for one in REFERENCES}
    truth = ", ".join(f"{one}: {said}" for one, said in related.items() if said != "innocent") or "innocent"
    who = f"{model.name.partition('/')[2]} | {truth} | {nearest.reference}"
    return f"| {who} | {figures} | {nearest.corrected_p(len(found)):.1g} | {outcome} |"


def main() -> None:
    """Ask, print and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoo", type=Path)
    parser.add_argument("--half", choices=("setting", "scoring"), required=True)
    parser.add_argument("--only", nargs="+", default=CANDIDATES, help="models by name, without the half")
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()

    half = arguments.zoo / arguments.half
    references = {name: words_of(half / name) for name in REFERENCES}
    references |= {f"examples/{name}": words_of(ROOT / "examples" / "checkpoints" / name) for name in EXAMPLES}
    lines = [HEAD]
    print(HEAD)
    models = load_ancestry().models
    for name in arguments.only:
        lines.append(row(models[f"{arguments.half}/{name}"], words_of(half / name), references))
        print(lines[-1], flush=True)
    if arguments.save:
        path = ROOT / "benchmarks" / "results" / f"behavior-{arguments.half}.md"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
