"""Stated, configured and stored sizes of one model, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from checks.catalog.architecture import Architecture
from checks.catalog.parameters import UncountableError, count
from checks.checkpoint.checkpoint import Checkpoint
from checks.checkpoint.errors import CheckpointUnavailable
from checks.pair.candidate import Candidate
from checks.pair.comparison import main_stack
from checks.pair.matching import predicts_further_tokens


@dataclass(frozen=True)
class DeclaredSizes:
    """Relative differences between sizes that should agree, by what was compared; and what could not be compared.

    `details` are for the record; of a checkpoint on the hub, `read` among them says which commit was read.
    """

    differences: Mapping[str, float]
    missing: str
    details: Mapping[str, Any] = field(default_factory=dict)


def declared_differences(candidate: Candidate) -> DeclaredSizes:
    """How far do the parameter counts that are stated, configured and stored lie apart?

    The relative difference of two totals is |a - b| / max(a, b). A dimension of the configuration that contradicts the
    shapes counts as 1. Comparisons that lack a side are left out and named in `missing`.
    """
    totals: dict[str, float] = {}
    notes: list[str] = []
    differences: dict[str, float] = {}
    dimensions: dict[str, Any] = {}
    stored: dict[str, Any] = {}
    tied_copy = 0.0
    entry = candidate.catalog_entry
    if candidate.component is None:
        if candidate.training.total:
            totals["claim"] = candidate.training.total
        if entry is not None and entry.parameters.get("total") is not None:
            totals["published"] = float(entry.parameters["total"].value)
    if candidate.architecture is not None and not _has_other_parts(candidate):
        try:
            counted = count(candidate.architecture)
        except UncountableError as error:
            notes.append(str(error))
        else:
            totals["configuration"] = float(counted.total)
            if candidate.architecture.tie_word_embeddings:
                tied_copy = float(counted.embedding)
    try:
        checkpoint = candidate.checkpoint
    except CheckpointUnavailable as error:
        notes.append(f"stored shapes: {error}")
    else:
        roles = checkpoint.roles
        stored = {
            "missing_tensors": {"count": roles.missing_count, "names": list(roles.missing[:10])},
            "misfitting_tensors": dict(list(roles.problems.items())[:10]),
        }
        matrices = [entry for entry in checkpoint.tensors.values() if len(entry.shape) >= 2]
        packed = next((entry for entry in matrices if not entry.is_float), None)
        if packed is not None:
            notes.append(f"stored shapes: {packed.stored_name} is {packed.dtype}, whose elements are no parameters")
        else:
            totals["shapes"] = float(checkpoint.parameters)
            # A tied head is one matrix, which some exporters store twice.
            if tied_copy and totals["shapes"] - tied_copy >= totals["configuration"]:
                totals["shapes"] -= tied_copy
        if candidate.architecture is not None:
            dimensions = mismatched_dimensions(checkpoint, candidate.architecture)
            differences.update(dict.fromkeys(dimensions, 1.0))
        if checkpoint.provenance:
            stored["read"] = {"candidate": dict(checkpoint.provenance)}
    names = list(totals)
    for position, one in enumerate(names):
        for other in names[position + 1 :]:
            differences[f"{one} and {other}"] = abs(totals[one] - totals[other]) / max(totals[one], totals[other])
    details = {"totals": totals, "dimensions": dimensions, **stored}
    return DeclaredSizes(differences, "; ".join(notes), details)


def mismatched_dimensions(checkpoint: Checkpoint, architecture: Architecture) -> dict[str, str]:
    """Dimensions of the configuration that the stored shapes contradict: what → configured and stored."""
    found: dict[str, str] = {}
    embedding = [
        entry
        for entry in checkpoint.tensors.values()
        if entry.role.category == "embedding" and entry.role.layer is None and len(entry.shape) == 2
    ]
    if len(embedding) == 1:
        rows, width = embedding[0].shape
        # Rows may be padded beyond the vocabulary; fewer rows than the vocabulary are a contradiction.
        if architecture.vocab_size is not None and rows < architecture.vocab_size:
            found["vocab_size"] = f"configured {architecture.vocab_size}, stored {rows} rows"
        if architecture.hidden_size is not None and width != architecture.hidden_size:
            found["hidden_size"] = f"configured {architecture.hidden_size}, stored {width} columns"
    stack = main_stack(checkpoint.tensors.values())
    numbered = [entry for entry in checkpoint.tensors.values() if entry.role.layer is not None]
    main = [entry for entry in numbered if not predicts_further_tokens(entry)]
    layers = {entry.role.layer for entry in main if entry.role.stack == stack}
    configured = architecture.num_hidden_layers
    if layers and configured is not None:
        # Without a template a block that predicts further tokens is a layer like any other.
        extra = 0 if len(main) < len(numbered) else architecture.num_nextn_predict_layers or 0
        if not configured <= len(layers) <= configured + extra:
            found["num_hidden_layers"] = f"configured {configured}, stored {len(layers)}"
    return found


def _has_other_parts(candidate: Candidate) -> bool:
    """Does the model have parts (a vision tower) that the text configuration does not count?"""
    return candidate.component is None and len(candidate.source.architectures) > 1
