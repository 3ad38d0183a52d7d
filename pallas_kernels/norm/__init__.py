"""Root-mean-square normalisation, alone and with the residual's sum before it."""

from __future__ import annotations

from jaxtyping import Array, Float

from pallas_kernels.implementations import Implementation, first_supported
from pallas_kernels.norm import hopper, xla
from pallas_kernels.norm.xla import rms_normalize

__all__ = ["add_norm", "rms_normalize"]

IMPLEMENTATIONS = {"hopper": hopper.add_norm, "xla": xla.add_norm}


def add_norm(
    x_BD: Float[Array, "*B D"],
    update_BD: Float[Array, "*B D"],
    scale_D: Float[Array, "D"],
    *,
    eps: float,
    implementation: Implementation = None,
) -> tuple[Float[Array, "*B D"], Float[Array, "*B D"]]:
    """``x + update``, and this sum RMS-normalised over the last axis and then scaled; both in ``x``'s dtype, normalised in float32.

    As in Llama, the scale is applied after the cast back to the dtype. ``implementation``: as for
    :func:`pallas_kernels.implementations.first_supported`.
    """
    return first_supported("add_norm", IMPLEMENTATIONS, implementation, x_BD, update_BD, scale_D, eps=eps)
