"""What a call of an op costs, of which XLA knows nothing where a kernel of l4jax's own computes it."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Cost:
    """FLOPs of the numbers that are wanted (two for each multiplication); the bytes of all operands that are needed and of the result,
    each moved once; and the bytes that the kernel's own copies move between a GPU's memory and its multiprocessors.
    """

    flops: int
    least_bytes: int
    copied_bytes: int
