"""What heads cost."""

from __future__ import annotations

from pallas_kernels.cost import Cost


def heads_cost(B: int, T: int, K: int, G: int, h: int, *, rotated: bool, written: int | None = None) -> Cost:
    """The cost of a call, in bfloat16 or float16; copies are those of the Hopper kernel. T tokens of B rows, K KV heads of G query heads
    each, head dimension h. ``written``: tokens whose keys and values are written to a cache; None: all are returned.
    """
    tokens = B * T
    given = tokens * K * (G + 2) * h * 2
    kept = (tokens if written is None else written) * K * 2 * h * 2
    angles = 2 * h * 4 * rotated
    return Cost(
        4 * tokens * K * (G + 1) * h * rotated,
        given + tokens * (angles // 2 + K * G * h * 2) + kept,
        given + tokens * K * (angles + G * h * 2) + kept,
    )
