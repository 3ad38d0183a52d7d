"""How far counts may be from what is expected before a test fails."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def chi_square_limit(degrees: int) -> float:
    """What a chi-square exceeds once in 1e9 times: 6 standard deviations, by Wilson and Hilferty's approximation."""
    return degrees * (1 - 2 / (9 * degrees) + 5.998 * (2 / (9 * degrees)) ** 0.5) ** 3


def assert_frequencies(counts: Sequence[float], chances: Sequence[float]) -> None:
    """Chi-square at 1e-9 of counts whose probabilities add up to 1; what cannot happen has not happened, and rare ones count together."""
    counts_N, means_N = np.asarray(counts, np.float64), np.asarray(chances, np.float64) * np.sum(counts)
    assert math.isclose(np.sum(chances), 1, rel_tol=1e-5)
    assert not counts_N[means_N == 0].any()
    rare_N = means_N < 20
    cells = [*zip(counts_N[~rare_N], means_N[~rare_N], strict=True)]
    if means_N[rare_N].sum() >= 5:
        cells.append((counts_N[rare_N].sum(), means_N[rare_N].sum()))
    if len(cells) > 1:
        chi_square = sum((count - mean) ** 2 / mean for count, mean in cells)
        assert chi_square < chi_square_limit(len(cells) - 1), (chi_square, cells)


def poisson_limits(mean: float) -> tuple[float, float]:
    """Counts below and above which there is a chance of less than one in a million each."""
    if mean > 1000:
        return mean - 4.9 * mean**0.5, mean + 4.9 * mean**0.5
    below = np.cumsum([math.exp(n * math.log(mean) - mean - math.lgamma(n + 1)) for n in range(2000)])
    return float(np.argmax(below > 1e-6)), float(np.argmax(below > 1 - 1e-6))
