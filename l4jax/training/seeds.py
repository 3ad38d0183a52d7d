"""Random keys of whole 64-bit seeds."""

from __future__ import annotations

import jax
import numpy as np
from jaxtyping import Array, Key

from l4jax.parallel.arrays import host_array


def key_of(seed: int) -> Key[Array, ""]:
    """The random key of a seed from 0 to 2**64 - 1, all of whose bits count.

    ``jax.random.key`` fails from 2**63 on and keeps only the lower 32 bits.
    """
    return jax.random.wrap_key_data(host_array([seed >> 32, seed & 0xFFFFFFFF], np.uint32), impl="threefry2x32")
