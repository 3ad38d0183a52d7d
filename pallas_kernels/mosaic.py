"""What kernels for Hopper GPUs share (Pallas, Mosaic GPU)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu
from jaxtyping import Array

from pallas_kernels.keys import PagedKeys

plgpu: Any = mosaic_gpu  # its types are incomplete

DTYPES = ("bfloat16", "float16")
HEAD_DIMS = (64, 128)
"""Dtypes that the kernels take, and head dimensions that attention's take."""
ROWS = 64
"""Rows of a warpgroup: the least that its matrix product takes."""
SMS = 132
"""Streaming multiprocessors of an H100 (SXM)."""
SHARED_BYTES = 227 * 1024 - 4096
"""Shared memory of a thread block, less what barriers, alignment and the compiler take."""
LOG2_E = 1.4426950408889634
MASKED = -1e30
"""The score of a key that a row does not see: finite, because exp2(-inf - -inf) is NaN."""
NOWHERE = 2**30
"""Where an interval of no keys starts."""

Softmax = tuple[Array, Array, Array]
"""A warpgroup's running softmax over the keys so far: the sum of weighted values, each row's highest score, and its sum of weights."""


def kernel(name: str, body: Callable[..., None], *, out_type: Any, reduction_scratch_bytes: int = 0, **options: Any) -> Callable[..., Any]:
    """A kernel with the house's compiler settings; ``options`` are those of ``plgpu.kernel``."""
    scratch = {"reduction_scratch_bytes": reduction_scratch_bytes} if reduction_scratch_bytes else {}
    parameters = plgpu.CompilerParams(approx_math=True, **scratch)
    made: Callable[..., Any] = plgpu.kernel(body, out_type=out_type, kernel_name=name, compiler_params=parameters, **options)
    return made


def require_supported(q: Array, keys: Sequence[Array], key_block: int, cached: PagedKeys | None) -> None:
    """Raise NotImplementedError, with the reason, unless the dtypes, the head dimension and the pages are such as the kernels take."""
    pools = () if cached is None else (cached.k_PKph, cached.v_PKph)
    dtypes = {str(array.dtype) for array in (q, *keys, *pools)}
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        raise NotImplementedError(f"takes bfloat16 or float16, the same for all arrays; they are {', '.join(sorted(dtypes))}")
    if q.shape[-1] not in HEAD_DIMS:
        raise NotImplementedError(f"takes head dimensions 64 and 128; this one is {q.shape[-1]}")
    if cached is not None and (cached.k_PKph.shape[2] % key_block or cached.pages_BW.shape[1] == 0):
        size, pages = cached.k_PKph.shape[2], cached.pages_BW.shape[1]
        raise NotImplementedError(f"takes pages of a multiple of {key_block} tokens; they have {size}, {pages} a row")


def tiles(columns: int, itemsize: int = 2) -> Any:
    """How a matrix lies in shared memory: in tiles of 8 rows and ``columns`` columns, swizzled."""
    return plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(columns * itemsize)


def over(row: Array, columns: int) -> Array:
    """Broadcast a number of each row over its columns."""
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


def online_softmax(score: Array, before: Softmax, dtype: Any) -> tuple[Array, Softmax]:
    """A step of the online softmax (arXiv 2205.14135, algorithm 1), in base 2: the weights of more keys, rounded to ``dtype``, and the
    running softmax with these weights in its sum, rescaled so that the weighted values can be added.
    """
    out, highest, total = before
    new_highest = jnp.maximum(highest, jnp.max(score, axis=1))
    rescale = jnp.exp2(highest - new_highest)
    # Of a row that has seen no key the highest score is MASKED itself: its weights must be 0, not 1.
    weight = jnp.exp2(score - over(jnp.maximum(new_highest, MASKED / 2), score.shape[1]))
    total = total * rescale + jnp.sum(weight, axis=1)
    return weight.astype(dtype), (out * over(rescale, out.shape[1]), new_highest, total)


def finish(attended: Softmax) -> tuple[Array, Array]:
    """Output and log-sum-exp; zeros and -inf for a row that saw no key."""
    out, highest, total = attended
    nothing = total == 0.0
    safe = jnp.where(nothing, 1.0, total)
    return out * over(1.0 / safe, out.shape[1]), jnp.where(nothing, -jnp.inf, (highest + jnp.log2(safe)) / LOG2_E)


def swiglu(gate: Array, up: Array) -> Array:
    """``silu(gate) * up``, in float32."""
    return gate / (1.0 + jnp.exp(-gate)) * up


def copy_in_turn(steps: Array, stages: int, consumed: Sequence[Any], fetch: Callable[[Array, Array], None]) -> None:
    """The warpgroup that copies: call ``fetch(step, stage)`` for each step, once what the stage held before is consumed.

    ``consumed``: sets of barriers, one barrier a stage in each, at which the warpgroups that compute arrive.
    """

    def wait(stage: Array) -> None:
        for barrier in consumed:
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
    jax.lax.fori_loop(jnp.maximum(steps - stages, 0), steps, drain, 0)  # no thread block may end before its barriers' last phases
