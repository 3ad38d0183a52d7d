"""The residual's sum and its normalisation on Hopper GPUs, for a few rows: one kernel, where XLA makes three for a single row."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from pallas_kernels.implementations import require_hopper
from pallas_kernels.mosaic import kernel
from pallas_kernels.norm import xla

MOST_ROWS = 256
"""As many as a round of speculation verifies. With more, XLA's own kernels have as many thread blocks as an H100 needs."""
MOST_NUMBERS = 16384
"""Numbers of a row that fit in a warpgroup's registers."""
_WIDTH = 4096
"""Numbers of a row that are added at a time."""


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
    if D % 128 or D > MOST_NUMBERS:
        raise NotImplementedError(f"takes rows of a multiple of 128 numbers, up to {MOST_NUMBERS}; they have {D}")
    results = _differentiable(x_BD.reshape(rows, D), update_BD.reshape(rows, D), scale_D, eps)
    return results[0].reshape(*B, D), results[1].reshape(*B, D)


# A Pallas kernel has no derivative: gradients are those of XLA's implementation.
@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _differentiable(x_MD: Array, update_MD: Array, scale_D: Array, eps: float) -> tuple[Array, Array]:
    return _kernel(x_MD.shape, x_MD.dtype, eps)(x_MD, update_MD, scale_D)


@_differentiable.defjvp
def _as_xla(eps: float, primals: Any, tangents: Any) -> Any:
    return jax.jvp(functools.partial(xla.add_norm, eps=eps), primals, tangents)


def _kernel(shape: tuple[int, ...], dtype: Any, eps: float) -> Any:
    """The kernel for rows of this shape: (rows, updates, scales) to (sums, normalised sums)."""
    rows, D = shape
    # One warpgroup has the whole row: sums over several would share the memory that the compiler reserves for a sum.
    parts = [pl.ds(first, min(_WIDTH, D - first)) for first in range(0, D, _WIDTH)]

    def body(x_ref: Any, update_ref: Any, scale_ref: Any, sum_ref: Any, out_ref: Any) -> None:
        row = jax.lax.axis_index("row")
        sums = []
        for part in parts:
            sums.append((x_ref[row, part].astype(jnp.float32) + update_ref[row, part].astype(jnp.float32)).astype(dtype))
            sum_ref[row, part] = sums[-1]
        squares = functools.reduce(jnp.add, [jnp.sum(jnp.square(total.astype(jnp.float32))) for total in sums])
        factor = jax.lax.rsqrt(squares * (1.0 / D) + eps)
        for part, total in zip(parts, sums, strict=True):
            normed = (total.astype(jnp.float32) * factor).astype(dtype)
            out_ref[row, part] = (normed.astype(jnp.float32) * scale_ref[part].astype(jnp.float32)).astype(dtype)

    result = jax.ShapeDtypeStruct(shape, dtype)
    return kernel(
        "add_norm",
        body,
        out_type=(result, result),
        grid=(rows,),
        grid_names=("row",),
        reduction_scratch_bytes=1024,
    )
