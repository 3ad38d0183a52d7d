"""The ops that tokamax also has, timed like ours."""

from __future__ import annotations

import importlib.util
from typing import Any

import jax.numpy as jnp
from jax import Array

from benchmarks.h100.bench import Bench, Record
from benchmarks.h100.errors import NotHere
from benchmarks.h100.ops import CASES, compare
from benchmarks.h100.shapes import SHAPES


def measure(bench: Bench, record: Record, *, op: str) -> None:
    """Milliseconds a call of tokamax's attention or grouped product, for every shape."""
    if importlib.util.find_spec("tokamax") is None:
        raise NotHere("tokamax is not installed")
    import tokamax

    for shape in SHAPES[bench.sizes.name][op]:
        if op == "flash_attention" and shape.S > shape.T:
            continue  # it takes no pages
        arrays, _, flops = CASES[op](shape)

        def call(*given: Array, shape: Any = shape) -> Any:
            if op == "grouped_matmul":
                return tokamax.ragged_dot(*given, group_sizes=jnp.asarray(shape.sizes, jnp.int32))
            q_BTKGh, k_BSKh, v_BSKh = given
            q_BTHh = q_BTKGh.reshape(shape.B, shape.T, -1, shape.h)
            return tokamax.dot_product_attention(q_BTHh, k_BSKh, v_BSKh, is_causal=True, scale=shape.h**-0.5)

        compare(bench, record, shape, arrays, {"tokamax": call}, flops)
