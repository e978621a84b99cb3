"""Numbers and names as people read them."""

from __future__ import annotations

import math


def printable(text: str) -> str:
    """`text` with control characters written out: names and statements come from files that nobody vouches for."""
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in text)


def format_value(value: float | int | None) -> str:
    """A number for people: whole numbers whole, others with four significant digits."""
    if value is None:
        return "undefined"
    if isinstance(value, int) or (math.isfinite(value) and value == int(value) and abs(value) < 1e6):
        return str(int(value))
    return f"{value:.4g}"
