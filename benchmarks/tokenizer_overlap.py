"""What do real tokenizers share? Makes the tables of docs/tokenizers.md, and the fingerprints of public bases.

    python benchmarks/tokenizer_overlap.py DIRECTORY              tables, in Markdown
    python benchmarks/tokenizer_overlap.py --base NAME=FILE …     fingerprints, as checks/tokens/bases.yaml has them

DIRECTORY holds one directory for each tokenizer, with the files that its model is published with. Where several files
could make a vocabulary each is read, and the docs say where they differ.
"""

from __future__ import annotations

import argparse
from itertools import combinations
from pathlib import Path

from checks.checkpoint.gguf_header import gguf_header
from checks.statistics.vocabulary import (
    contained,
    fingerprint,
    numbering,
    overlap,
    rank_agreement,
    segmentation_agreement,
)
from checks.tokens import Vocabulary, read_vocabulary
from checks.tokens.bases import public_bases
from checks.tokens.files import COMPANIONS, LARGEST_FILE, OTHER_FILES, VOCABULARY_FILES
from checks.tokens.segment import can_segment, fixed_text, learnt_words

HASHES = 200


def read_all(directory: Path) -> dict[str, dict[str, Vocabulary]]:
    """Every vocabulary below a directory: by the name of its directory and of its file."""
    found: dict[str, dict[str, Vocabulary]] = {}
    for place in sorted(path for path in directory.iterdir() if path.is_dir()):
        files = {path.name: _bytes(path) for path in place.iterdir()}
        companions = {name: files[name] for name in COMPANIONS if name in files}
        for name in sorted(files):
            if name in VOCABULARY_FILES or name.endswith(OTHER_FILES):
                found.setdefault(place.name, {})[name] = read_vocabulary({name: files[name], **companions})
    return found


def _bytes(path: Path) -> bytes:
    """A file, or of a GGUF file the header: its tensors may be large."""
    return gguf_header(path, LARGEST_FILE) if path.suffix == ".gguf" else path.read_bytes()


def sizes(vocabularies: dict[str, Vocabulary]) -> None:
    """One row for each vocabulary."""
    print("| tokenizer | kind | ids | tokens | special | merges | public bases inside |\n|---|---|---|---|---|---|---|")
    for name, one in vocabularies.items():
        inside = {base: contained(sample, one.ids()) for base, sample in public_bases().items()}
        shown = ", ".join(f"{base} {share:.0%}" for base, share in inside.items() if share is not None)
        kind = f"{one.kind}, {'bytes' if one.byte_level else 'characters'}"
        merges = "-" if one.merges is None else f"{one.merges:,}"
        print(
            f"| {name} | {kind} | {len(one.texts):,} | {len(one.ids()):,} | {len(one.special)} | {merges} | {shown} |"
        )


def pairs(chosen: list[tuple[str, Vocabulary, str, Vocabulary]]) -> None:
    """One row for each pair. Both directions of the containments; the rest is symmetric, but for the ids' pattern."""
    text = fixed_text()
    print(
        "\n| A | B | common | of A | of B | Jaccard | ids of A as B's | same id | Spearman | order kept | cuts ko "
        "| cuts en | cuts code | (digits) |\n" + "|---" * 14 + "|"
    )
    for first, a, second, b in chosen:
        shared, order = overlap(a.ids(), b.ids()), rank_agreement(a.rank_of(), b.rank_of())
        ids = numbering(a.numbered(), b.numbered(), order.order_kept)
        segments = [
            segmentation_agreement(*learnt_words(part, a, b)).jaccard if can_segment(a) and can_segment(b) else None
            for part in text.values()
        ]
        row = [
            first,
            second,
            f"{shared.common:,}",
            _share(shared.of_candidate),
            _share(shared.of_reference),
            _number(shared.jaccard),
            ids.pattern,
            _share(ids.same_id),
            _number(order.spearman),
            _number(order.order_kept, 4),
            *(_number(one, 2) for one in segments),
        ]
        print("| " + " | ".join(row) + " |")


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _published(files: dict[str, Vocabulary]) -> Vocabulary:
    """The file that stands for a tokenizer: the one that its model was published with, before any made of it."""
    return next(
        (files[name] for name in ("tokenizer.model", "vocab.json", "tokenizer.json") if name in files),
        next(iter(files.values())),
    )


def _directions(published: dict[str, Vocabulary], one: str, other: str) -> list[tuple[str, str]]:
    """Which is the candidate of a pair: the first; the other too if it numbers the first's tokens in another way."""
    a, b = published[one], published[other]
    order = rank_agreement(a.rank_of(), b.rank_of()).order_kept
    back = numbering(b.numbered(), a.numbered(), order).pattern
    differs = back not in ("none", numbering(a.numbered(), b.numbered(), order).pattern)
    return [(one, other), *([(other, one)] if differs else [])]


def bases(arguments: list[str]) -> None:
    """Fingerprints of vocabularies that others are built on."""
    print("bases:")
    for argument in arguments:
        name, _, file = argument.partition("=")
        data = Path(file).read_bytes()
        vocabulary = read_vocabulary({Path(file).name: data})
        hashes = fingerprint([text for text in vocabulary.ids() if len(text) > 1], HASHES)
        print(
            f"  {name}:\n    tokens: {len(vocabulary.ids())}\n    file_sha256: {next(iter(vocabulary.sha256.values()))}"
        )
        print("    hashes: >-")
        for start in range(0, len(hashes), 6):
            print("      " + " ".join(hashes[start : start + 6]))


def main() -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, nargs="?")
    parser.add_argument("--base", action="append", metavar="NAME=FILE", default=[])
    arguments = parser.parse_args()
    if arguments.base:
        bases(arguments.base)
    elif arguments.directory is None:
        parser.error("name a directory of tokenizers")
    else:
        found = read_all(arguments.directory)
        sizes({f"{place} ({file})": one for place, files in found.items() for file, one in files.items()})
        published = {place: _published(files) for place, files in found.items()}
        pairs(
            [
                (first, published[first], second, published[second])
                for one, other in combinations(published, 2)
                for first, second in _directions(published, one, other)
            ]
        )
        same = [(place, *two) for place, files in found.items() for two in combinations(files, 2)]
        pairs([(f"{place} {a}", found[place][a], f"{place} {b}", found[place][b]) for place, a, b in same])


if __name__ == "__main__":
    main()
