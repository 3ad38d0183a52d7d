"""The configuration of a decoder."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from l4jax.config.checks import check, check_positive
from l4jax.config.vision import VisionConfig
from sharding.kinds import shown

Architecture = Literal["llama", "llama4"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3 frequency scaling: long wavelengths are divided by ``factor``, short ones kept, those between blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        check_positive(self, "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        low, high = self.low_freq_factor, self.high_freq_factor
        check(low <= high, f"rope_scaling has low_freq_factor {low} above high_freq_factor {high}; expected at most that")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Routed experts of Llama 4: top-1 sigmoid routing beside one ungated shared expert of the same width.

    ``moe_layers[i]`` is True where layer ``i`` has experts; the other layers are dense.
    """

    num_experts: int
    intermediate_size: int
    moe_layers: tuple[bool, ...]

    def __post_init__(self) -> None:
        check_positive(self, "num_experts", "intermediate_size")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A Llama 3 or Llama 4 decoder.

    ``rope_layers[i]`` is True if layer ``i`` rotates its queries and keys. If it is False (NoPE), the layer has no positional
    encoding, attends to everything before it and, with ``attn_temperature_tuning``, scales its queries by position.
    ``attention_chunk_size`` confines attention in the RoPE layers to keys with the same ``position // attention_chunk_size``.
    ``intermediate_size`` is the width of the dense feed-forward layers; the experts' width is in ``moe``.
    ``sources`` says, field by field, where each value was read; equality ignores it.
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

    def __post_init__(self) -> None:
        check_positive(
            self,
            *("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "intermediate_size"),
            *("max_position_embeddings", "rms_norm_eps", "rope_theta", "floor_scale"),
        )
        heads, kv_heads = self.num_heads, self.num_kv_heads
        check(heads % kv_heads == 0, f"num_heads is {heads}; expected a multiple of num_kv_heads, which is {kv_heads}")
        check(self.head_dim % 2 == 0, f"head_dim is {self.head_dim}; expected an even number, because RoPE rotates pairs")
        per_layer = [("rope_layers", self.rope_layers)]
        if self.moe is not None:
            per_layer.append(("moe.moe_layers", self.moe.moe_layers))
        for name, layers in per_layer:
            check(len(layers) == self.num_layers, f"{name} describes {len(layers)} layers; expected num_layers, which is {self.num_layers}")
        chunk = self.attention_chunk_size
        check(chunk is None or chunk > 0, f"attention_chunk_size is {chunk}; expected a number above 0, or null for unlimited attention")
        # float32 holds every position below 2**24 exactly. With chunks, rotation counts positions from the beginning of the chunk.
        exact = 2**31 if chunk is not None else 2**24
        context = self.max_position_embeddings
        check(context <= exact, f"max_position_embeddings is {context}; expected at most {exact}, which positions are exact for")
        for name in ("attention_chunk_size", "floor_scale"):
            check((getattr(self, name) or 1) < 2**31, f"{name} is {getattr(self, name)}; expected less than 2**31")
        check(math.isfinite(self.attn_scale), f"attn_scale is {self.attn_scale}; expected a finite number")
        tokens = [("bos_token_id", self.bos_token_id), ("pad_token_id", self.pad_token_id)]
        for name, token in tokens + [("eos_token_ids", token) for token in self.eos_token_ids]:
            inside = token is None or 0 <= token < self.vocab_size
            check(inside, f"{name} has token {shown(token)}, which is outside the vocabulary of {self.vocab_size}; correct one of them")

    @property
    def output_weight(self) -> str:
        """Name of the output head's weight: the embedding's if they are tied."""
        return "embed" if self.tie_word_embeddings else "head"
