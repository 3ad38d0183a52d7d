"""Angles of rotary position embedding, with Llama 3's frequency scaling."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32

from l4jax.config import ModelConfig, RopeScaling


def rotary_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> np.ndarray:
    """Angular frequency of each pair, radians per position: ``theta ** (-2 i / head_dim)``, scaled as Llama 3.1 does.

    With scaling, wavelengths above ``original / low_freq_factor`` are stretched by ``factor``, wavelengths below
    ``original / high_freq_factor`` are kept, and those between are blended. If both factors are equal (Llama 4 Scout), there are
    none between. Returns float32 [head_dim / 2].
    """
    # Single precision throughout, as the reference does.
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = (1.0 / (np.float32(theta) ** exponents)).astype(np.float32)
    if scaling is None:
        return frequencies
    original = scaling.original_max_position_embeddings
    wavelengths = 2 * math.pi / frequencies
    stretched = frequencies / np.float32(scaling.factor)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    if high == low:
        blended = frequencies
    else:
        keep = ((original / wavelengths - low) / (high - low)).astype(np.float32)
        blended = (1 - keep) * stretched + keep * frequencies
    result = np.where(wavelengths > original / low, stretched, np.where(wavelengths < original / high, frequencies, blended))
    return result.astype(np.float32)


def rotary_angles(config: ModelConfig, position_BT: Int32[Array, "B T"]) -> tuple[Float32[Array, "B T r"], Float32[Array, "B T r"]]:
    """Cosine and sine of every pair's angle at each position, float32 [B, T, head_dim / 2].

    If attention is confined to chunks, positions are counted from the beginning of the chunk: rotation is relative, so the
    mathematics is the same, and float32 angles stay exact to 3e-4. Counted from the beginning of the sequence, at Scout's ten
    million tokens they would be off by half a radian.
    """
    if config.attention_chunk_size is not None:
        position_BT = position_BT % config.attention_chunk_size
    frequencies = jnp.asarray(rotary_frequencies(config.head_dim, config.rope_theta, config.rope_scaling))
    angles = position_BT.astype(jnp.float32)[:, :, None] * frequencies[None, None, :]
    return jnp.cos(angles), jnp.sin(angles)
