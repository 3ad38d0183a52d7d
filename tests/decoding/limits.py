"""How far counts may be from what is expected before a test fails."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def chi_square_limit(degrees: int) -> float:
    """What a chi-square exceeds once in 1e9 times: 6 standard deviations, by Wilson and Hilferty's approximation."""
    return degrees * (1 - 2 / (9 * degrees) + 5.998 * (2 / (9 * degrees)) ** 0.5) ** 3


def assert_frequencies(counts: Sequence[float], chances: Sequence[float]) -> None:
    """Assert that counts fit their probabilities, by a chi-square at 1e-9. Impossible outcomes must not occur; rare ones share one cell."""
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
    """The lowest and highest plausible count: a smaller one has a chance below one in a million, and so has a larger one."""
    if mean > 1000:
        return mean - 4.9 * mean**0.5, mean + 4.9 * mean**0.5
    below = np.cumsum([math.exp(n * math.log(mean) - mean - math.lgamma(n + 1)) for n in range(2000)])
    return float(np.argmax(below > 1e-6)), float(np.argmax(below > 1 - 1e-6))
