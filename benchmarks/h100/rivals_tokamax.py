"""The ops that tokamax also has, timed like ours."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

from jax import Array

from benchmarks.h100.bench import Bench, Record
from benchmarks.h100.errors import NotHere
from benchmarks.h100.ops import CASES, compare, in_groups, normal
from benchmarks.h100.shapes import SHAPES
from pallas_kernels.shapes import Mixture


def measure(bench: Bench, record: Record, *, op: str) -> None:
    """Milliseconds of tokamax's attention, or of experts by its grouped products, for every shape."""
    if importlib.util.find_spec("tokamax") is None:
        raise NotHere("tokamax is not installed")
    import tokamax

    for shape in SHAPES[bench.sizes.name][op]:
        if op == "flash_attention" and shape.S > shape.T:
            continue  # it takes no pages
        arrays, _, flops = CASES[op](shape)
        if op == "experts":
            arrays = functools.partial(_in_out, shape)

        def call(*given: Array, shape: Any = shape) -> Any:
            if op == "experts":
                return in_groups(tokamax.ragged_dot, shape, *given)
            q_BTKGh, k_BSKh, v_BSKh = given
            q_BTHh = q_BTKGh.reshape(shape.B, shape.T, -1, shape.h)
            return tokamax.dot_product_attention(q_BTHh, k_BSKh, v_BSKh, is_causal=True, scale=shape.h**-0.5)

        compare(bench, record, shape, arrays, {"tokamax": call}, flops)


def _in_out(shape: Mixture, key: Array) -> tuple[Array, ...]:
    """Rows and matrices, which tokamax takes as [in, out]."""
    return normal(key, (shape.M, shape.D), (shape.E, shape.D, 2 * shape.F), (shape.E, shape.F, shape.D))
