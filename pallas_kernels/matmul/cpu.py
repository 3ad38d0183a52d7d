"""Products of a few rows, as XLA's CPU backend computes them fast.

Decoding reads each matrix once a step, so a product should take no longer than reading its matrix. XLA's own kernels for few rows take
longer. Written as below, the same products compile to loops that do not.
"""

from __future__ import annotations

import functools
import math
import operator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from pallas_kernels.implementations import require_cpu

_FEW_ROWS = 16
"""Most float32 rows for which the weight matrix is put first. With more, transposing the result costs what the order gains."""

_LANES = 16
"""Columns of a matrix that are added up side by side: one register of float32 with AVX-512, two with AVX2."""

_MOST_TERMS = 15
"""Most products that one loop adds up in a lane: XLA's CPU backend does not fuse an array that it would compute more often."""


def matmul(x_Bi: Float[Array, "*B i"], weight_oi: Float[Array, "o i"], *, dtype: jnp.dtype | None = None) -> Float[Array, "*B o"]:
    """Of up to 16 float32 rows, or of one bfloat16 row; NotImplementedError where XLA's own product is as fast."""
    require_cpu()
    rows = math.prod(x_Bi.shape[:-1])
    x_Mi = x_Bi.reshape(rows, -1)
    if rows == 1 and x_Bi.dtype in (jnp.float32, jnp.bfloat16) and (terms := _terms(x_Mi.shape[1])):
        product_Mo = _one_row(x_Mi[0], weight_oi, terms)[None]
    elif rows == 1 and x_Bi.dtype == jnp.bfloat16:
        # For two rows XLA has a kernel, which takes about twice as long as reading the matrix.
        product_Mo = jnp.einsum("mi,oi->mo", jnp.pad(x_Mi, ((0, 1), (0, 0))), weight_oi, preferred_element_type=jnp.float32)[:1]
    elif 1 < rows <= _FEW_ROWS and x_Bi.dtype == jnp.float32:
        product_Mo = _weight_first(x_Mi, weight_oi)
    else:
        raise NotImplementedError(f"{rows} rows of {x_Bi.dtype}: XLA's own product is as fast")
    return product_Mo.astype(dtype or x_Bi.dtype).reshape(*x_Bi.shape[:-1], -1)


def _weight_first(x_Mi: Float32[Array, "M i"], weight_oi: Float32[Array, "o i"]) -> Float32[Array, "M o"]:
    """Compute ``weight @ x.T`` and transpose it: that takes as little as half the time. XLA's kernel computes four rows at once."""
    rows = len(x_Mi)
    padded_Mi = jnp.pad(x_Mi, ((0, -rows % 4), (0, 0)))
    # Without the barrier XLA would put the matrix on the right again.
    return jax.lax.optimization_barrier(jnp.einsum("oi,mi->om", weight_oi, padded_Mi))[:, :rows].T


def _terms(inputs: int) -> int | None:
    """How many products :func:`_one_row` adds up in each lane, for rows of this length; None if the row cannot be divided so."""
    return next((terms for terms in range(_MOST_TERMS, 3, -1) if inputs % (terms * _LANES) == 0), None)


def _one_row(x_i: Float[Array, "i"], weight_oi: Float[Array, "o i"], terms: int) -> Float32[Array, "o"]:
    """One loop over the matrix, on all cores, that adds up some products in every lane; then the sums of the lanes.

    XLA lowers a sum that is written out, term by term, to such a loop, which also widens bfloat16 as it reads it. A reduction, or a
    product of one bfloat16 row, it lowers to scalar code or to a copy of the matrix in float32; and a product of one float32 row to a
    kernel for one core.
    """
    outputs = len(weight_oi)
    # Without the barrier XLA would compute the row again for every weight, and widen the whole matrix before a loop of decode steps.
    x_i, weight_oi = jax.lax.optimization_barrier((x_i.astype(jnp.float32), weight_oi))
    weights = weight_oi.reshape(outputs, -1, terms, _LANES).astype(jnp.float32)
    products = weights * x_i.reshape(1, -1, terms, _LANES)
    total = functools.reduce(operator.add, (products[:, :, term : term + 1] for term in range(terms)))
    # Without this barrier XLA might merge the two sums into one reduction.
    lanes = jax.lax.optimization_barrier(total).reshape(outputs, -1)
    return lanes @ jnp.ones(lanes.shape[1], jnp.float32)
