"""Known public bases: their fingerprints are well formed, and found inside what contains them."""

from __future__ import annotations

from pathlib import Path

import pytest

from checks.statistics.vocabulary import fingerprint
from checks.tokens import Vocabulary, read_vocabulary
from checks.tokens import bases as module
from checks.tokens.bases import bases_inside, public_bases


def vocabulary(texts: list[bytes]) -> Vocabulary:
    return Vocabulary("BPE", tuple(texts), tuple(range(len(texts))), "ids")


def test_fingerprints_are_sorted_hashes() -> None:
    assert list(public_bases()) == ["cl100k_base", "gpt2", "llama_2"]
    for hashes in public_bases().values():
        assert len(set(hashes)) == 200
        assert list(hashes) == sorted(hashes)
        assert all(len(bytes.fromhex(one)) == 8 for one in hashes)


def test_a_base_is_found_in_its_extension_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    base = [b"token %d" % index for index in range(3000)]
    monkeypatch.setattr(module, "public_bases", lambda: {"ours": fingerprint(base, 200)})
    assert bases_inside(vocabulary([*base, b"more"])) == {"ours": 1.0}
    assert bases_inside(vocabulary(base[:2000])) == {}


def test_the_examples_contain_no_public_base(examples: Path) -> None:
    read = read_vocabulary({"tokenizer.json": (examples / "base" / "tokenizer.json").read_bytes()})
    assert bases_inside(read) == {}
