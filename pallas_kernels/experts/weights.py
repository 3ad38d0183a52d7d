"""What experts are made of, and what they are given."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Experts:
    """E SwiGLU blocks: of each, the gate matrix and the up matrix, and the down matrix; all are stored [out, in]."""

    gate_up_E2FD: Float[Array, "E 2 F D"]
    down_EDF: Float[Array, "E D F"]


def scaled(x_MD: Float[Array, "M D"], score_M: Float32[Array, "M"] | None) -> Float[Array, "M D"]:
    """Each row times its score, rounded to the rows' dtype."""
    return x_MD if score_M is None else (x_MD.astype(jnp.float32) * score_M[:, None]).astype(x_MD.dtype)
