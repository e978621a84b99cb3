"""Tokenizers: what they share, and what that is worth. Suspicion only: a full match asks the weights.

Tokenizers are published and free to take. A fine-tuned model nearly always keeps its base's, which is why the documents
begin here; a model trained from scratch may take one as well, so that only the weights can tell.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from checks.applicable import require_text_decoder
from checks.checkpoint.errors import CheckpointUnavailable
from checks.escalation import weigh_pair
from checks.evidence.decisions import Decision, decide_by_bands
from checks.evidence.record import CONTRADICTS, INCONCLUSIVE, SUPPORTS

if TYPE_CHECKING:
    from checks.evidence.judge import Judge
    from checks.pair.pair import Pair
    from checks.tokens import Vocabulary


# Below so many tokens a vocabulary is mostly the alphabet, which all share.
FEWEST_TOKENS = 500
FEWEST_RANKED = 200
FEWEST_SPECIAL = 3
FEWEST_CUT_WORDS = 50

# Digits are cut one by one or in groups by convention, which many unrelated tokenizers share: recorded, never counted.
CONVENTIONAL_PARTS = ("digits",)

# What unrelated public tokenizers share, measured (docs/tokenizers.md): the share of the reference's tokens that the
# candidate has, by how many times as large the candidate's vocabulary is (from which ratio on).
UNRELATED = ((1.5, 0.57, 0.92), (1 / 1.5, 0.34, 0.74), (0.0, 0.17, 0.44))

# From this measured value on a public base that both sides contain is named, whatever the outcome.
NAMES_BASES_FROM = 0.5

# Special tokens that unrelated models share: the names of the original papers and libraries, and of ChatML and FIM.
COMMON_SPECIAL = frozenset(
    {
        *("<s>", "</s>", "<unk>", "<pad>", "<mask>", "<bos>", "<eos>", "<sep>", "<cls>"),
        *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[BOS]", "[EOS]"),
        *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>"),
        *("<|pad|>", "<|unk|>", "<|bos|>", "<|eos|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    }
)


def vocabulary(pair: Pair, judge: Judge) -> None:
    """How much of the reference's vocabulary does the candidate have?

    Null hypothesis: none; vocabularies are free to take, and unrelated ones share the frequent words of their text:
    about half at equal size, 70 to 92 % of a small English one inside a large one (docs/tokenizers.md). From the
    documented 90 % on, the weights of the reference clear or confirm the suspicion; without them it stays open.
    Statistic: |candidate ∩ reference| / |reference| over normalised tokens, 0 to 1: the direction that the documents
    define. The other direction and the Jaccard index are in the record; a reference's vocabulary cut down shows in the
    other direction, and then the case does not support.
    The level of unrelated tokenizers of such sizes stands beside the value.
    Documented: tutorial-qa.md, Q2, "Vocabulary 중복률 기준"; Q1.
    Known false positives: a common public base (cl100k_base inside Llama-3 and Qwen), named when it is known.
    Blind to: a tokenizer that was exchanged after the weights were taken.
    Where a tokenizer's files cannot be had and the catalogue knows its kind or size, the record says what it knows.
    """
    from checks.statistics.vocabulary import numbering, overlap, rank_agreement

    try:
        ours, theirs = _vocabularies(pair, judge)
    except CheckpointUnavailable as error:
        _say_what_is_known(pair, judge, error)
        raise
    found = overlap(ours.ids().keys(), theirs.ids().keys())
    order_kept = rank_agreement(ours.rank_of(), theirs.rank_of()).order_kept
    numbers = numbering(ours.numbered(), theirs.numbered(), order_kept)
    value = found.of_reference
    assert value is not None  # a vocabulary has tokens
    low, high = next((low, high) for ratio, low, high in UNRELATED if found.candidate >= ratio * found.reference)
    decision = judge.decide(lambda limits: decide_by_bands(limits, value))
    if min(found.candidate, found.reference) < FEWEST_TOKENS:
        decision = Decision(
            INCONCLUSIVE, f"no power: {min(found.candidate, found.reference)} tokens are little more than an alphabet"
        )
    elif decision.outcome == SUPPORTS:
        other = decide_by_bands(judge.threshold, found.of_candidate)
        if other.outcome == CONTRADICTS:
            decision = Decision(
                INCONCLUSIVE,
                f"{value:.1%} of the reference's tokens, but {found.of_candidate:.1%} of the candidate's are in the "
                "reference: a vocabulary that was cut down would look so",
            )
    _finish(
        pair,
        judge,
        decision,
        value,
        f"{value:.1%} of the reference's tokens are the candidate's (between unrelated vocabularies of such sizes "
        f"{low:.0%} to {high:.0%})",
        ours,
        theirs,
        of_candidate=found.of_candidate,
        of_reference=found.of_reference,
        jaccard=found.jaccard,
        common=found.common,
        tokens={"candidate": found.candidate, "reference": found.reference},
        same_id=numbers.same_id,
        commonest_shift={"ids": numbers.shift, "share": numbers.shifted},
        equal_prefix=numbers.prefix,
        numbering=numbers.pattern,
        order_kept=order_kept,
        unrelated={
            "share_of_the_reference": [low, high],
            "of": "unrelated public tokenizers whose sizes stand to each other as these",
            "source": "docs/tokenizers.md",
        },
    )


def ranks(pair: Pair, judge: Judge) -> None:
    """Do the common tokens come in the same order of merges?

    Null hypothesis: each tokenizer was trained on its own text; then neighbours in one order are not neighbours in the
    other (measured on unrelated public tokenizers: at most 0.0005 of them).
    Statistic: share of common tokens whose successor by merge rank, among the common tokens, is the same in both, 0 to
    1. Ids do not matter, so that extended, shifted and renumbered vocabularies keep it. Spearman's correlation is in
    the record; it is 0.4 to 0.8 between unrelated ones, since frequent tokens come first in all.
    Documented: tutorial-qa.md, Q2, "Merge Rules 비교": equal merges are the same tokenizer.
    Known false positives: a common public base (0.90 between Llama-3 and Qwen).
    Blind to: BPE vocabularies without their merges (vocab.json alone), which have no ranks.
    """
    from checks.statistics.vocabulary import rank_agreement

    ours, theirs = _vocabularies(pair, judge)
    found = rank_agreement(ours.rank_of(), theirs.rank_of())
    details: dict[str, Any] = {
        "common": found.common,
        "spearman": found.spearman,
        "ranks_from": {"candidate": ours.ranks_from, "reference": theirs.ranks_from},
        "merges": {"candidate": ours.merges, "reference": theirs.merges},
    }
    if found.order_kept is None or found.common < FEWEST_RANKED:
        judge.inconclusive(
            f"no power: {found.common} common tokens have a rank; {FEWEST_RANKED} are needed"
            f"{_without_merges(ours, theirs)}",
            read=_read(pair, ours, theirs),
            **details,
        )
    value = found.order_kept
    decision = judge.decide(lambda limits: decide_by_bands(limits, value))
    text = f"{value:.1%} of {found.common} common tokens are followed by the same one"
    _finish(pair, judge, decision, value, text, ours, theirs, **details)


def special_tokens(pair: Pair, judge: Judge) -> None:
    """Does the candidate have the reference's own special tokens?

    Null hypothesis: none; names are chosen freely, and those that unrelated models share do not count.
    Statistic: share of the reference's special tokens, without the common names, that the candidate has too, 0 to 1.
    Documented: tutorial-qa.md, Q2, "Special Tokens 비교"; bounds of this suite.
    Known false positives: a chat format taken over with its data.
    Blind to: special tokens that stand in code and in no file (tiktoken), and to renamed ones.
    """
    ours, theirs = _vocabularies(pair, judge)
    wanted = set(theirs.special) - COMMON_SPECIAL
    found = wanted & set(ours.special)
    details: dict[str, Any] = {
        "special_tokens": {"candidate": len(ours.special), "reference": len(theirs.special)},
        "counted": len(wanted),
        "shared": [text[:80] for text in sorted(found)[:50]],
        "common_names": sorted(COMMON_SPECIAL & set(ours.special) & set(theirs.special)),
        "same_id": sum(ours.special[text] == theirs.special[text] for text in found),
        "roles": {"candidate": ours.roles, "reference": theirs.roles},
    }
    if len(wanted) < FEWEST_SPECIAL or not ours.special:
        judge.inconclusive(
            f"no power: the reference has {len(wanted)} special tokens of its own ({FEWEST_SPECIAL} are needed), the "
            f"candidate {len(ours.special)} in all",
            read=_read(pair, ours, theirs),
            **details,
        )
    value = len(found) / len(wanted)
    decision = judge.decide(lambda limits: decide_by_bands(limits, value))
    text = f"{len(found)} of the reference's {len(wanted)} own special tokens are the candidate's"
    _finish(pair, judge, decision, value, text, ours, theirs, **details)


def segmentation(pair: Pair, judge: Judge) -> None:
    """Do both tokenizers cut the same text at the same places?

    Null hypothesis: each tokenizer was trained on its own text. Measured on unrelated public tokenizers: at most 0.62.
    Statistic: mean over Korean, English and code of the Jaccard index of the cuts inside words, 0 to 1. Both cut the
    project's fixed text (checks/tokens/text.yaml) by their own merges, word by word of one common rule. Words that both
    leave in single bytes do not count, nor do digits, whose cuts (one by one, in threes) are a convention.
    Documented: tutorial-qa.md, Q2, "Encoding 결과 비교": other cuts are another tokenizer.
    Known false positives: a common public base (0.90 between Llama-3 and Qwen: equal cuts in English).
    Blind to: a tokenizer's own rule for words; tokens that span words. Unigram and WordPiece are not cut.
    """
    from checks.statistics.vocabulary import segmentation_agreement
    from checks.tokens.segment import can_segment, fixed_text, learnt_words

    ours, theirs = _vocabularies(pair, judge)
    if not can_segment(ours) or not can_segment(theirs):
        judge.not_applicable(
            f"the tokenizers are {ours.kind} and {theirs.kind}; only BPE with its merges is cut here"
            f"{_without_merges(ours, theirs)}",
            read=_read(pair, ours, theirs),
        )
    found = {part: segmentation_agreement(*learnt_words(text, ours, theirs)) for part, text in fixed_text().items()}
    details: dict[str, Any] = {
        "parts": {
            part: {"jaccard": one.jaccard, "words": one.words, "cut_words": one.cut_words, "same": one.same_words}
            for part, one in found.items()
        }
    }
    counted = [one for part, one in found.items() if part not in CONVENTIONAL_PARTS]
    agreements = [one.jaccard for one in counted if one.jaccard is not None]
    cut_words = sum(one.cut_words for one in counted)
    if not agreements or cut_words < FEWEST_CUT_WORDS:
        judge.inconclusive(
            f"no power: {cut_words} words are cut by either; {FEWEST_CUT_WORDS} are needed",
            read=_read(pair, ours, theirs),
            **details,
        )
    value = sum(agreements) / len(agreements)
    decision = judge.decide(lambda limits: decide_by_bands(limits, value))
    text = f"{value:.1%} of the cuts inside words are the same"
    _finish(pair, judge, decision, value, text, ours, theirs, **details)


def _vocabularies(pair: Pair, judge: Judge) -> tuple[Vocabulary, Vocabulary]:
    from checks.tokens import vocabulary_of

    require_text_decoder(pair.candidate, judge, "a tokenizer")
    ours, theirs = vocabulary_of(pair.candidate), vocabulary_of(pair.reference)
    if ours is None:
        judge.not_applicable(f"{pair.candidate.name} has no tokenizer file that is read")
    if theirs is None:
        judge.not_applicable(f"{pair.reference.name} has no tokenizer file that is read")
    return ours, theirs


def _without_merges(ours: Vocabulary, theirs: Vocabulary) -> str:
    """Whose merges are not at hand, for a reason; empty where that is not so."""
    without = [side for side, found in (("candidate", ours), ("reference", theirs)) if found.ranks_from == "none"]
    return f"; without merges: the {' and the '.join(without)}'s vocabulary" if without else ""


def _say_what_is_known(pair: Pair, judge: Judge, error: CheckpointUnavailable) -> None:
    """Inconclusive with the catalogue's facts of a tokenizer that cannot be had; nothing where it has none."""
    from checks.tokens import vocabulary_of
    from checks.tokens.known import described, known_facts

    facts: dict[str, Any] = {}
    for side, model in (("candidate", pair.candidate), ("reference", pair.reference)):
        try:
            vocabulary_of(model)
        except CheckpointUnavailable:
            if found := known_facts(model.catalog_entry):
                facts[side] = found
    if facts:
        said = "; ".join(f"the {side}'s is {described(found)}" for side, found in facts.items())
        judge.inconclusive(f"{error}; of what cannot be had the catalogue knows: {said}", catalogue=facts)


def _finish(
    pair: Pair,
    judge: Judge,
    decision: Decision,
    value: float,
    measured: str,
    ours: Vocabulary,
    theirs: Vocabulary,
    **details: Any,
) -> None:
    """Record the decision; a match is decided by the weights of the reference. Names a public base of both."""
    from checks.tokens.bases import bases_inside

    inside = {"candidate": bases_inside(ours), "reference": bases_inside(theirs)}
    shared = sorted(inside["candidate"].keys() & inside["reference"].keys())
    details["public_bases"] = inside
    details["shared_public_bases"] = shared
    base = f" (both contain the public {', '.join(shared)})" if shared and value >= NAMES_BASES_FROM else ""
    if decision.outcome == CONTRADICTS:
        opinion = weigh_pair(pair, judge)
        decision = Decision(opinion.outcome, f"{measured}{base}; {opinion.reason}", opinion.powered)
        details["weights"] = opinion.details
    elif decision.outcome == SUPPORTS:
        decision = Decision(SUPPORTS, f"{measured}{base}", decision.powered)
    elif base:
        decision = replace(decision, reason=f"{decision.reason}{base}")
    judge.finish(decision, value, read=_read(pair, ours, theirs), **details)


def _read(pair: Pair, ours: Vocabulary, theirs: Vocabulary) -> dict[str, Any]:
    """Which files were read, for the record."""
    return {
        side: {"name": model.name, "kind": found.kind, "sha256": found.sha256}
        for side, model, found in (("candidate", pair.candidate, ours), ("reference", pair.reference, theirs))
    }
