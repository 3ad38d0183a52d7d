"""Model configuration: one frozen description of everything that changes the mathematics."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

Architecture = Literal["llama", "llama4"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3 frequency scaling: long wavelengths are divided by ``factor``, short ones kept, those between blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Routed experts of Llama 4: top-1 sigmoid routing beside one ungated shared expert of the same width.

    ``moe_layers[i]`` is True where layer ``i`` has experts; the other layers are dense.
    """

    num_experts: int
    intermediate_size: int
    moe_layers: tuple[bool, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Llama 4's image encoder and adapter."""

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    image_size: int
    patch_size: int
    num_channels: int
    rope_theta: float
    norm_eps: float
    pixel_shuffle_ratio: float
    projector_input_dim: int
    projector_output_dim: int
    vision_output_dim: int
    image_token_id: int
    begin_image_token_id: int
    end_image_token_id: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A Llama 3 or Llama 4 decoder.

    ``rope_layers[i]`` is True where layer ``i`` rotates its queries and keys; where it is False (NoPE) the layer has no
    positional encoding, attends to everything before it and, with ``attn_temperature_tuning``, scales its queries by
    position. ``attention_chunk_size`` confines attention in the RoPE layers to ``position // attention_chunk_size``.
    ``intermediate_size`` is the width of the dense feed-forward layers; the experts' is in ``moe``.
    ``sources`` says, field by field, where each value was read; it takes no part in equality.
    """

    architecture: Architecture
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    rope_layers: tuple[bool, ...]
    attention_chunk_size: int | None
    use_qk_norm: bool
    attn_temperature_tuning: bool
    floor_scale: int
    attn_scale: float
    tie_word_embeddings: bool
    moe: MoEConfig | None
    vision: VisionConfig | None
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None
    sources: tuple[tuple[str, str], ...] = dataclasses.field(default=(), compare=False, repr=False)
