"""Which lengths the pieces of a prefill have by default."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from l4jax.cache import PAGE_SIZE
from l4jax.config import ModelConfig
from pallas_kernels.flash_attention import holds_no_scores
from sharding.mesh import MeshSpec

PREFILL_LENGTHS = (32, 128, 512)
"""A piece is padded to one of these lengths times the ranks that share its tokens; longer prompts take several pieces."""
LONG_LENGTHS = (2048, 8192)
"""Also, where attention's kernels need no memory for scores: the matrices are read less often, and a chunk of Llama 4 is one piece."""
_SHARE = 0.1
"""The part of the memory beside the weights that a long piece may take while it is computed."""


def default_lengths(config: ModelConfig, spec: MeshSpec, device: jax.Device, dtype: jnp.dtype, available: float) -> tuple[int, ...]:
    """The lengths for each rank that shares a prompt's tokens, ascending. ``available``: bytes of a device beside the weights."""
    if not holds_no_scores(device.device_kind, dtype, config.head_dim):
        return PREFILL_LENGTHS
    context = -(-config.max_position_embeddings // (PAGE_SIZE * spec.token_ranks.count)) * PAGE_SIZE
    fitting = [n for n in LONG_LENGTHS if n <= context and piece_bytes(config, spec, dtype, n) <= _SHARE * available]
    return (*PREFILL_LENGTHS, *fitting)


def piece_bytes(config: ModelConfig, spec: MeshSpec, dtype: jnp.dtype, tokens: int) -> int:
    """Bytes of temporaries that a piece of ``tokens`` tokens a rank takes at most, if attention's kernels hold no scores.

    That are eight states of every token, and its gate, up and hidden values. With experts on several ranks there is room for all ranks'
    tokens, because one rank may get every token: five states of each.
    """
    width = config.intermediate_size if config.moe is None else max(config.intermediate_size, config.moe.intermediate_size)
    arrived = 0 if config.moe is None or spec.expert == 1 else spec.expert
    return dtype.itemsize * tokens * ((8 + 5 * arrived) * config.hidden_size + 3 * width // spec.tensor)
