"""Student's t for any degrees of freedom, without scipy."""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist

import numpy as np

_NODES, _NODE_WEIGHTS = np.polynomial.legendre.leggauss(48)


@lru_cache(maxsize=4096)
def t_quantile(probability: float, freedom: float) -> float:
    """Quantile of Student's t; `probability` above .5 and below 1, `freedom` 1 or more, not only whole numbers.

    P(0 < T < √f tan θ) = Γ((f+1)/2) / (√π Γ(f/2)) ∫₀^θ cos^(f-1), by Gauss-Legendre quadrature and Newton's method.
    Raises ValueError outside these ranges.
    """
    if not (0.5 < probability < 1 and freedom >= 1):
        raise ValueError(f"there is no such quantile of t: {probability} with {freedom} degrees of freedom")
    if freedom > 1e6:
        return NormalDist().inv_cdf(probability)
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    low, high = 0.0, math.pi / 2
    angle = math.atan(NormalDist().inv_cdf(probability) / math.sqrt(freedom))
    for _ in range(60):
        area = scale * angle / 2 * float(_NODE_WEIGHTS @ np.cos(angle / 2 * (_NODES + 1)) ** (freedom - 1))
        miss = area - (probability - 0.5)
        low, high = (low, angle) if miss > 0 else (angle, high)
        step = miss / (scale * max(math.cos(angle) ** (freedom - 1), 1e-300))
        following = angle - step if low < angle - step < high else (low + high) / 2
        if abs(following - angle) <= 1e-14 * angle:
            break
        angle = following
    return math.sqrt(freedom) * math.tan(angle)
