"""FLOPs and bytes of an op. XLA's own analysis does not see inside a Pallas kernel."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a call costs.

    ``flops``: those that are needed (for attention, of the scores that are not masked and of their product with the values), two for each
    multiplication. ``least_bytes``: what is read (for attention, the keys and values that are seen; the matrices of experts that rows
    chose) and the result, each moved once. ``copied_bytes``: what the kernels copy between the GPU's memory and shared memory.
    """

    flops: int
    least_bytes: int
    copied_bytes: int


def kernel_flops(kernel: str, operands: Sequence[Sequence[int]]) -> int:
    """FLOPs of a kernel for Hopper GPUs whose operands have these shapes; 0 for a kernel of another name.

    As if every query saw all keys; every row of experts, padding included, counts as computed, as if each chose one.
    """
    match kernel, operands:
        case "tree_attention", [(B, K, M, h), (_, _, p, _), _, _, _, (_, W), *tree]:
            return 4 * B * K * M * h * (W * p + (tree[0][2] if tree else 0))
        case "flash_attention", [(B, T, K, G, h), (_, S, _, _), _, _, _, *cache]:
            cached = cache[0][2] * cache[2][1] if cache else 0
            return 4 * B * T * K * G * h * (S + cached)
        case "experts_gate_up" | "experts_down", [(places, i), (_, _, o, _), (_, 3)]:  # of many rows
            return 4 * places * i * o
        case "experts_gate_up" | "experts_down", [(*_, M, i), (_, _, o, _), (2, _), *_]:
            return 4 * M * i * o
        case "experts_gate_up" | "experts_down", [(*_, M, i), (_, _, o, _), (_, _, _, _), (2, _), *_]:  # with a shared expert
            return 8 * M * i * o
    return 0
