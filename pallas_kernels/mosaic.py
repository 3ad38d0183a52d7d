"""What kernels for Hopper GPUs share (Pallas, Mosaic GPU)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu
from jaxtyping import Array

plgpu: Any = mosaic_gpu  # its types are incomplete

ROWS = 64
"""Rows of a warpgroup: the least that its matrix product takes."""
SMS = 132
"""Streaming multiprocessors of an H100: as many blocks run at once."""
SHARED_BYTES = 227 * 1024 - 4096
"""Shared memory of a block, less what barriers, alignment and the compiler take."""
LOG2_E = 1.4426950408889634
MASKED = -1e30
"""The score of a key that a row does not see: finite, because exp2(-inf - -inf) is NaN."""
NOWHERE = 2**30
"""Where an interval of no keys starts."""

Softmax = tuple[Array, Array, Array]
"""Attention of a warpgroup's rows over some keys: the sum of weighted values, the highest score, and the sum of weights."""


def tiles(columns: int, itemsize: int = 2) -> Any:
    """How a matrix lies in shared memory: in tiles of 8 rows and ``columns`` columns, swizzled."""
    return plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(columns * itemsize)


def over(row: Array, columns: int) -> Array:
    """Each row's number in every column."""
    return jax.lax.broadcast_in_dim(row, (ROWS, columns), [0])


def product(a: Any, b: Any, columns: int) -> Array:
    """The matrix product of a warpgroup, in float32; ``b`` is in shared memory."""

    def into(accumulator: Any) -> Array:
        plgpu.wgmma(accumulator, a, b)
        return accumulator[...]

    return pl.run_scoped(into, plgpu.ACC((ROWS, columns), jnp.float32))


def add_product(sums: Array, a: Array, b: Any) -> Array:
    """``sums`` plus the matrix product, accumulated in the same registers."""
    return pl.run_state(lambda accumulator: plgpu.wgmma(accumulator, a, b))(plgpu.ACC.init(sums))


def no_keys(h: int) -> Softmax:
    """Attention over nothing."""
    layout, row = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)
    return (
        plgpu.layout_cast(jnp.zeros((ROWS, h), jnp.float32), layout),
        plgpu.layout_cast(jnp.full((ROWS,), MASKED, jnp.float32), row),
        plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), row),
    )


def weigh(score: Array, before: Softmax, dtype: Any) -> tuple[Array, Softmax]:
    """The weights of some keys, whose scores are base-2 logarithms; and ``before``, scaled so that their weighted values can be added."""
    out, highest, total = before
    now = jnp.maximum(highest, jnp.max(score, axis=1))
    shrunk = jnp.exp2(highest - now)
    # Of a row that has seen no key the highest score is MASKED itself: its weights must be 0, not 1.
    weight = jnp.exp2(score - over(jnp.maximum(now, MASKED / 2), score.shape[1]))
    total = total * shrunk + jnp.sum(weight, axis=1)
    return weight.astype(dtype), (out * over(shrunk, out.shape[1]), now, total)


def finish(attended: Softmax) -> tuple[Array, Array]:
    """Output and log-sum-exp; zeros and -inf for a row that saw no key."""
    out, highest, total = attended
    safe = jnp.maximum(total, 1e-30)
    out = out * over(jnp.where(total > 0.0, 1.0 / safe, 0.0), out.shape[1])
    return out, jnp.where(total > 0.0, (highest + jnp.log2(safe)) / LOG2_E, -jnp.inf)


def copy_in_turn(steps: Array, stages: int, read: tuple[Any, Any], fetch: Callable[[Array, Array], None]) -> None:
    """Call ``fetch(step, stage)`` for each step, in the warpgroup that copies, when the keys and values before in that stage were read.

    ``read``: barriers at which the other warpgroups arrive, of each stage's keys and of its values.
    """

    def wait(stage: Array) -> None:
        for barrier in read:
            plgpu.barrier_wait(barrier.at[stage])

    def turn(step: Array, carry: int) -> int:
        stage = jax.lax.rem(step, stages)
        pl.when(step >= stages)(lambda: wait(stage))
        fetch(step, stage)
        return carry

    def drain(step: Array, carry: int) -> int:
        wait(jax.lax.rem(step, stages))
        return carry

    jax.lax.fori_loop(0, steps, turn, 0)
    jax.lax.fori_loop(jnp.maximum(steps - stages, 0), steps, drain, 0)  # a block must not end with a barrier's arrivals not waited for
