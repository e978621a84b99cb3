"""How much arithmetic does a training take, and how much could the hardware have done?

Feasibility only: a continued training and one from scratch of the same length take the same arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

SECONDS_PER_HOUR = 3600
HOURS_PER_DAY = 24

# Training compute is best spent at about 20 tokens a parameter (Hoffmann et al. 2022, arXiv 2203.15556, Table 3).
COMPUTE_OPTIMAL_TOKENS_PER_PARAMETER = 20


def parameter_flops(active_parameters: float, tokens: float) -> float:
    """6·N·D: floating-point operations of the weights' matrix products, forward and backward.

    Each active parameter takes one multiply-add (2 operations) per token forward and two backward (Kaplan et al. 2020,
    arXiv 2001.08361, section 2.1). In operations. Raises ValueError unless both are positive and finite.
    """
    _require_positive(active_parameters=active_parameters, tokens=tokens)
    return 6.0 * active_parameters * tokens


def mean_context(sequence_length: float, window: float | None = None) -> float:
    """How many earlier positions does a token see on average, in causal attention over sequences of this length?

    s/2 without a window; with a sliding window w < s the first w tokens see w/2, the others w: w - w²/(2s). In tokens.
    """
    _require_positive(sequence_length=sequence_length)
    if window is None or window >= sequence_length:
        return sequence_length / 2
    _require_positive(window=window)
    return window - window * window / (2 * sequence_length)


def attention_flops(tokens: float, contexts: Sequence[float], heads: int, query_key_dim: int, value_dim: int) -> float:
    """Operations of queries times keys and weights times values, forward and backward, which 6·N·D leaves out.

    A token of a layer with mean context c takes 2·c·heads·(query_key_dim + value_dim) forward and twice that backward
    (Chowdhery et al. 2022, arXiv 2204.02311, appendix B, there with the full context; here causal). `contexts`: one for
    each attention layer, in tokens. Raises ValueError unless all are positive.
    """
    _require_positive(tokens=tokens, heads=heads, query_key_dim=query_key_dim, value_dim=value_dim)
    for context in contexts:
        _require_positive(context=context)
    return 6.0 * tokens * heads * (query_key_dim + value_dim) * math.fsum(contexts)


def hardware_flops(accelerator_hours: float, peak: float) -> float:
    """Operations that accelerators could do in so many accelerator hours at a peak in operations per second."""
    _require_positive(accelerator_hours=accelerator_hours, peak=peak)
    return accelerator_hours * SECONDS_PER_HOUR * peak


def accelerator_hours(count: float, days: float) -> float:
    """Accelerator hours of so many accelerators in so many days."""
    _require_positive(count=count, days=days)
    return count * days * HOURS_PER_DAY


def utilisation(needed_flops: float, accelerator_hours: float, peak: float) -> float:
    """Model FLOP utilisation: needed operations over those at the hardware's peak (Chowdhery et al. 2022)."""
    _require_positive(needed_flops=needed_flops)
    return needed_flops / hardware_flops(accelerator_hours, peak)


def tokens_per_parameter(tokens: float, parameters: float) -> float:
    """D/N."""
    _require_positive(tokens=tokens, parameters=parameters)
    return tokens / parameters


def share_of_compute_optimal(tokens: float, active_parameters: float) -> float:
    """Compute-optimal tokens over the stated tokens: 1 at 20 tokens per active parameter, 10 at two."""
    return COMPUTE_OPTIMAL_TOKENS_PER_PARAMETER / tokens_per_parameter(tokens, active_parameters)


def _require_positive(**values: float) -> None:
    for name, value in values.items():
        if not math.isfinite(value) or value <= 0:
            raise ValueError(f"{name} must be positive and finite, got {value}")
