"""The residual's sum and its normalisation on Hopper GPUs, for a few rows: one kernel, where XLA makes three for a single row."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels.implementations import require_hopper
from pallas_kernels.mosaic import plgpu
from pallas_kernels.norm import xla

MOST_ROWS = 64
"""With more, XLA's own kernel has as many thread blocks as an H100 needs."""
_WIDTH = 4096
"""Most numbers of a row that a warpgroup keeps in registers."""
_WARPGROUPS = (1, 2, 4, 8)


def add_norm(
    x_BD: Float[Array, "*B D"], update_BD: Float[Array, "*B D"], scale_D: Float[Array, "D"], eps: float
) -> tuple[Float[Array, "*B D"], Float[Array, "*B D"]]:
    """One thread block a row. Raises NotImplementedError for what the kernel does not take."""
    require_hopper()
    dtypes, (*B, D) = {str(array.dtype) for array in (x_BD, update_BD, scale_D)}, x_BD.shape
    if len(dtypes) > 1 or not dtypes <= {"bfloat16", "float16"}:
        raise NotImplementedError(f"takes bfloat16 or float16, the same for all arrays; they are {', '.join(sorted(dtypes))}")
    rows = x_BD.size // D
    if rows > MOST_ROWS:
        raise NotImplementedError(f"takes up to {MOST_ROWS} rows; there are {rows}")
    warpgroups = next((n for n in _WARPGROUPS if n * _WIDTH >= D and D % (n * 128) == 0), None)
    if warpgroups is None:
        raise NotImplementedError(f"takes rows of a multiple of 128 numbers, up to {_WARPGROUPS[-1] * _WIDTH}; they have {D}")
    results = _differentiable(x_BD.reshape(rows, D), update_BD.reshape(rows, D), scale_D, eps, warpgroups)
    return results[0].reshape(*B, D), results[1].reshape(*B, D)


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _differentiable(x_MD: Array, update_MD: Array, scale_D: Array, eps: float, warpgroups: int) -> tuple[Array, Array]:
    return _kernel(x_MD.shape, x_MD.dtype, eps, warpgroups)(x_MD, update_MD, scale_D)


@_differentiable.defjvp
def _as_xla(eps: float, warpgroups: int, primals: Any, tangents: Any) -> Any:
    return jax.jvp(functools.partial(xla.add_norm, eps=eps), primals, tangents)


def _kernel(shape: tuple[int, ...], dtype: Any, eps: float, warpgroups: int) -> Any:
    """The kernel for rows of this shape: (rows, updates, scales) to (sums, normalised sums)."""
    rows, D = shape
    width = D // warpgroups

    def body(x_ref: Any, update_ref: Any, scale_ref: Any, sum_ref: Any, out_ref: Any, parts_s: Any, part_written: Any) -> None:
        row, warpgroup = jax.lax.axis_index("row"), jax.lax.axis_index("warpgroup")
        mine = pl.ds(warpgroup * width, width)
        total = (x_ref[row, mine].astype(jnp.float32) + update_ref[row, mine].astype(jnp.float32)).astype(dtype)
        sum_ref[row, mine] = total
        total = total.astype(jnp.float32)
        squares = jnp.sum(total * total)
        if warpgroups > 1:
            parts_s[warpgroup] = squares
            plgpu.barrier_arrive(part_written)
            plgpu.barrier_wait(part_written)
            squares = functools.reduce(jnp.add, [parts_s[i] for i in range(warpgroups)])
        normed = (total * jax.lax.rsqrt(squares * (1.0 / D) + eps)).astype(dtype)
        out_ref[row, mine] = (normed.astype(jnp.float32) * scale_ref[mine].astype(jnp.float32)).astype(dtype)

    result = jax.ShapeDtypeStruct(shape, dtype)
    return plgpu.kernel(
        body,
        out_type=(result, result),
        grid=(rows,),
        grid_names=("row",),
        num_threads=warpgroups,
        thread_name="warpgroup",
        scratch_types=[plgpu.SMEM((warpgroups,), jnp.float32), plgpu.Barrier(num_arrivals=warpgroups)],
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=1024),
        kernel_name="add_norm",
    )
