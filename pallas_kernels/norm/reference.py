"""What :func:`pallas_kernels.norm.add_norm` computes, written out in float64."""

from __future__ import annotations

from typing import Any

import numpy as np


def add_norm(x_BD: Any, update_BD: Any, scale_D: Any, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """The sum, and the sum divided by the root of its mean square, times the scale."""
    x_BD, update_BD, scale_D = (np.asarray(a, np.float64) for a in (x_BD, update_BD, scale_D))
    sum_BD = x_BD + update_BD
    return sum_BD, sum_BD / np.sqrt((sum_BD**2).mean(-1, keepdims=True) + eps) * scale_D
