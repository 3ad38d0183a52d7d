"""Which lengths the pieces of a prefill have by default."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from l4jax.cache import PAGE_SIZE
from l4jax.config import ModelConfig
from pallas_kernels.flash_attention import keeps_no_scores
from sharding.mesh import MeshSpec

PREFILL_LENGTHS = (32, 128, 512)
"""A piece is padded to one of these lengths times the ranks that share its tokens; longer prompts take several pieces."""
LONG_LENGTHS = (2048, 8192)
"""Used too where attention keeps no scores in memory. Longer pieces read the weights less often, and 8,192 tokens are an attention chunk
of Llama 4."""
_MOST_MEMORY = 0.1
"""The part of the memory that weights leave free that the temporaries of a long piece may take."""


def default_lengths(
    config: ModelConfig, drafter: ModelConfig | None, spec: MeshSpec, device: jax.Device, dtype: jnp.dtype, available: float
) -> tuple[int, ...]:
    """The lengths for each rank that shares a prompt's tokens, ascending.

    ``drafter``: its decoder, if there is one. ``available``: bytes of a device that weights leave free.
    """
    if not all(keeps_no_scores(device.device_kind, dtype, decoder.head_dim) for decoder in (config, drafter) if decoder):
        return PREFILL_LENGTHS
    context = -(-config.max_position_embeddings // (PAGE_SIZE * spec.token_ranks.count)) * PAGE_SIZE
    fitting = [n for n in LONG_LENGTHS if n <= context and piece_bytes(config, drafter, spec, dtype, n) <= _MOST_MEMORY * available]
    return (*PREFILL_LENGTHS, *fitting)


def piece_bytes(config: ModelConfig, drafter: ModelConfig | None, spec: MeshSpec, dtype: jnp.dtype, tokens: int) -> int:
    """The most bytes of a device that the temporaries of a piece of ``tokens`` tokens a rank take, if attention keeps no scores in memory.

    Of every token eight arrays of the model's width, eight more with a drafter, and this device's part of its gate, up and hidden values.
    With experts on several ranks one of them may get the tokens of all, so there is room for those: of each, five arrays of that width.
    """
    width = config.intermediate_size if config.moe is None else max(config.intermediate_size, config.moe.intermediate_size)
    expert_ranks = 0 if config.moe is None or spec.expert == 1 else spec.expert
    return dtype.itemsize * tokens * ((8 + 8 * (drafter is not None) + 5 * expert_ranks) * config.hidden_size + 3 * width // spec.tensor)
