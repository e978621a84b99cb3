"""Which tensors say by themselves that two models are related, and which are alike for what their index means."""

from __future__ import annotations

import math

from checks.checkpoint.checkpoint import TensorEntry

# A shorter axis may number positions, states or buckets: what initialises it then shapes any two models alike.
LONG_AXIS = 32
# Rows and columns of these are units, channels, experts or tokens, whose numbers have no meaning across models.
_EXCHANGEABLE = frozenset({"embedding", "attention", "mlp", "output", "router", "routed expert", "shared expert"})


def why_undecided(entry: TensorEntry) -> str | None:
    """Why does it say nothing that a tensor of another model is like this one? None if it says something.

    Matrices of a known role do, whose rows and columns have no meaning by their number. Of others both axes must be at
    least 32 long, split wherever that makes the shorter one longest (axes of length 1 left out): a state matrix A_log
    [d, 16] starts as the logarithms of 1 to 16 in every row, a table of relative positions [169, 12] falls with the
    distance, and both stay alike in models that were trained apart. So do vectors such as the decays of RWKV. Larger
    tables of this kind (A_log [d, 64]) are told from learned ones by their content, whatever they are called: see
    `checks.statistics.common_sequence`; they are listed as ordinary and not compared.
    """
    shape = [size for size in entry.shape if size != 1]
    if len(shape) < 2:
        return "a vector, whose index may have a meaning of its own"
    if entry.role.category in _EXCHANGEABLE:
        return None
    splits = (min(math.prod(shape[:axis]), math.prod(shape[axis:])) for axis in range(1, len(shape)))
    if max(splits) >= LONG_AXIS:
        return None
    return f"an axis shorter than {LONG_AXIS}, whose index may have a meaning of its own, and no known role"
