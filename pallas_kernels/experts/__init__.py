"""The feed-forward of a mixture of experts: each row through the SwiGLU block that it chose, and through the one that all share."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from pallas_kernels.experts import hopper, xla
from pallas_kernels.experts.dense import swiglu_block
from pallas_kernels.experts.weights import Experts
from pallas_kernels.implementations import Implementation, first_supported

__all__ = ["Experts", "experts", "swiglu_block"]

IMPLEMENTATIONS = {"hopper": hopper.experts, "xla": xla.experts}


def experts(
    x_MD: Float[Array, "M D"],
    score_M: Float32[Array, "M"] | None,
    expert_M: Int32[Array, "M"],
    routed: Experts,
    shared: Experts | None = None,
    shared_here: Bool[Array, ""] | None = None,
    *,
    implementation: Implementation = None,
) -> Float[Array, "M D"]:
    """``routed[expert](score * x) + shared(x)`` of each row, where an expert is ``down @ (silu(gate @ x) * (up @ x))``.

    ``expert_M``: the row's expert; a number outside [0, E) means none, whose output is zeros. ``score_M``: None for rows that are scaled
    already. ``shared``: one expert; None for no such summand. ``shared_here``: False leaves it out, because it counts on another device;
    None: it counts. No row is dropped, however many chose one expert. Products accumulate in float32; hidden values and results have
    ``x``'s dtype.
    ``implementation``: as for :func:`pallas_kernels.implementations.first_supported`.
    """
    E = len(routed.down_EDF)
    expert_M = jnp.where((expert_M >= 0) & (expert_M < E), expert_M, E)  # one number for all that have none
    return first_supported("experts", IMPLEMENTATIONS, implementation, x_MD, score_M, expert_M, routed, shared, shared_here)
