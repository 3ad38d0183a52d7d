"""Attention's heads: queries and keys rotated, normalised and scaled, and keys and values written to the cache."""

from __future__ import annotations

from jaxtyping import Array, Float

from pallas_kernels.heads import hopper, xla
from pallas_kernels.heads.inputs import Heads, Pools, Targets
from pallas_kernels.heads.xla import put
from pallas_kernels.implementations import Implementation, first_supported

__all__ = ["Heads", "Pools", "Targets", "put", "split_heads", "write_heads"]

SPLIT = {"hopper": hopper.split_heads, "xla": xla.split_heads}
WRITE = {"hopper": hopper.write_heads, "xla": xla.write_heads}


def split_heads(
    heads: Heads, *, implementation: Implementation = None
) -> tuple[Float[Array, "B T K G h"], Float[Array, "B T K h"], Float[Array, "B T K h"]]:
    """Queries, keys and values. ``implementation``: as for :func:`pallas_kernels.implementations.first_supported`.

    Queries and keys are rotated in interleaved pairs, (0, 1), (2, 3), ... (arXiv 2104.09864), then normalised, and queries then scaled;
    each of these in float32, rounded to the heads' dtype, and only where ``heads`` asks for it.
    """
    return first_supported("split_heads", SPLIT, implementation, heads)


def write_heads[P: Pools](
    heads: Heads, pools: P, targets: Targets, *, implementation: Implementation = None
) -> tuple[Float[Array, "B T K G h"], P]:
    """As :func:`split_heads`, but keys and values are written to the pools. No two tokens that are written may have the same target.

    Returns the queries and the pools. If the caller's program donates the pools, they are written in place.
    """
    return first_supported("write_heads", WRITE, implementation, heads, pools, targets)
