"""Experts on Hopper GPUs: kernels for few rows, and others for many."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from pallas_kernels.experts import few_rows, many_rows
from pallas_kernels.experts.dense import swiglu_block
from pallas_kernels.experts.weights import Experts, scaled
from pallas_kernels.implementations import require_hopper


def experts(
    x_MD: Float[Array, "M D"],
    score_M: Float32[Array, "M"] | None,
    expert_M: Int32[Array, "M"],
    routed: Experts,
    shared: Experts | None,
    shared_here: Bool[Array, ""] | None,
) -> Float[Array, "M D"]:
    """Of a few rows, the shared block is one more expert. Raises NotImplementedError for what the kernels do not take."""
    require_hopper()
    dtypes = {str(array.dtype) for array in jax.tree.leaves((x_MD, routed, shared))}
    if len(dtypes) > 1 or not dtypes <= {"bfloat16", "float16"}:
        raise NotImplementedError(f"takes bfloat16 or float16, the same for all arrays; they are {', '.join(sorted(dtypes))}")
    (M, D), (E, _, F, _) = x_MD.shape, routed.gate_up_E2FD.shape
    if M <= few_rows.MOST_ROWS:
        with jax.named_scope("routed_experts"):
            return few_rows.experts(x_MD, score_M, expert_M, routed, shared, shared_here)
    if D % (2 * many_rows.OUTPUTS) or F % many_rows.OUTPUTS:
        D_unit, F_unit = 2 * many_rows.OUTPUTS, many_rows.OUTPUTS
        raise NotImplementedError(f"takes D a multiple of {D_unit} and F of {F_unit}; they are {D} and {F}")
    with jax.named_scope("routed_experts"):
        out_MD = many_rows.experts(scaled(x_MD, score_M), expert_M, routed)
        # Rows without an expert were never written.
        out_MD = jnp.where((expert_M < E)[:, None], out_MD, jnp.zeros((), x_MD.dtype))
    if shared is None:
        return out_MD
    with jax.named_scope("shared_expert"):
        shared_MD = swiglu_block(x_MD, shared.gate_up_E2FD[0], shared.down_EDF[0])
        return out_MD + (shared_MD if shared_here is None else jnp.where(shared_here, shared_MD, jnp.zeros_like(shared_MD)))
