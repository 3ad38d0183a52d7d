"""What heads cost."""

from __future__ import annotations

from pallas_kernels.cost import Cost


def heads_cost(B: int, T: int, K: int, G: int, h: int, *, rotated: bool, written: int | None = None) -> Cost:
    """The cost of a call, in bfloat16 or float16; copies are those of the Hopper kernel. T tokens of B rows, K KV heads of G query heads
    each, head dimension h. ``written``: tokens whose keys and values are written to a cache; None: all are returned.
    """
    tokens = B * T
    input_bytes = tokens * K * (G + 2) * h * 2
    key_value_bytes = (tokens if written is None else written) * K * 2 * h * 2
    angle_bytes = 2 * (h // 2) * 4 * rotated  # the kernel copies each twice, for both numbers of a pair, in every KV head
    query_bytes = tokens * K * G * h * 2
    return Cost(
        flops=4 * tokens * K * (G + 1) * h * rotated,
        least_bytes=input_bytes + tokens * angle_bytes + query_bytes + key_value_bytes,
        copied_bytes=input_bytes + tokens * K * 2 * angle_bytes + query_bytes + key_value_bytes,
    )
