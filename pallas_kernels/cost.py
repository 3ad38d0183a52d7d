"""FLOPs and bytes of an op. XLA's own analysis does not see inside a Pallas kernel."""

from __future__ import annotations

import dataclasses
import math
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

    Every query counts as if it saw all keys; and every row, padding included, as if it were multiplied by one routed expert.
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


@dataclasses.dataclass(frozen=True)
class Load:
    """What decides how much kernels read.

    ``seen``: cached tokens on a device that each row sees. ``tokens``: new tokens in all of a device's rows. ``experts``: those that tokens
    choose from, on this device and on others; 0 for a model without experts.
    """

    seen: int
    tokens: int
    experts: int = 0

    def chosen(self, here: int) -> float:
        """How many of a device's ``here`` experts tokens are expected to choose, if they choose at random."""
        return here * (1 - (1 - 1 / self.experts) ** self.tokens)


def kernel_bytes(kernel: str, operands: Sequence[Sequence[int]], written: int, load: Load) -> float:
    """Bytes that a kernel for Hopper GPUs moves from and to the GPU's memory.

    ``operands``: their shapes; those of floating point have 2 bytes a number. ``written``: bytes of the results that are not changed in
    place. Data that several thread blocks copy counts once, because the L2 cache serves the others. Raises ValueError for a kernel of
    another name.
    """

    def nbytes(dims: Sequence[int], itemsize: int = 2) -> int:
        return itemsize * math.prod(dims)

    match kernel, operands:
        case "tree_attention", [(B, K, M, h), (_, _, p, _), _, rows, _, (_, W), *tree]:
            keys = min(load.seen, W * p) + (tree[0][2] if tree else 0)
            return written + nbytes((B, K, M, h)) + nbytes(rows, 4) + 2 * nbytes((B, K, keys, h))
        case "flash_attention", [(B, T, K, G, h), (_, S, _, _), _, rows, bounds, *cache]:
            cached = min(load.seen, cache[0][2] * cache[2][1]) if cache else 0
            return written + nbytes((B, T, K, G, h)) + nbytes(rows, 4) + nbytes(bounds, 4) + 2 * nbytes((B, K, S + cached, h))
        case "merge_splits", [out, lse]:
            return written + nbytes(out, 4) + nbytes(lse, 4)
        case "add_norm", _:
            return written + sum(map(nbytes, operands))
        case "heads", [(B, T, K, g, h), *_]:  # the queries, a key and a value, once in and once out
            return 2 * nbytes((B, T, K, g, h))
        case "experts_gate_up" | "experts_down", [_, (E, _, o, i), *others]:
            shared = sum(len(dims) == 4 for dims in others)
            return written + nbytes(operands[0]) + (load.chosen(E) + shared) * nbytes((2, o, i))
    raise ValueError(f"the bytes of kernel {kernel!r} with operands {operands} are not known; expected a case for it in kernel_bytes")
