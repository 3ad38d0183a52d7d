"""FLOPs and bytes of an op. XLA's own analysis does not see inside a Pallas kernel."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a call costs.

    ``flops``: of the scores that are not masked and of their product with the values, two for each multiplication. ``least_bytes``:
    queries, the keys and values that are seen, and the result, each moved once. ``copied_bytes``: what the kernel copies between the GPU's
    memory and shared memory.
    """

    flops: int
    least_bytes: int
    copied_bytes: int


def kernel_flops(kernel: str, operands: Sequence[Sequence[int]]) -> int:
    """FLOPs of a kernel for Hopper GPUs whose operands have these shapes, if every query sees all keys; 0 for a kernel of another name."""
    match kernel, operands:
        case "tree_attention", [(B, K, M, h), (_, _, p, _), _, (_, _, S, _), *_, (_, W)]:
            return 4 * B * K * M * h * (W * p + S)
        case "flash_attention", [(B, T, K, G, h), (_, S, _, _), _, _, _, *cache]:
            cached = cache[0][2] * cache[2][1] if cache else 0
            return 4 * B * T * K * G * h * (S + cached)
    return 0
