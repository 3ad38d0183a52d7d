"""ModelConfig from the metadata of a GGUF file of the llama architecture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from l4jax.config import ConfigError, ModelConfig, RopeScaling
from l4jax.config_formats.fields import Section, head_dim, plain_attention, presence, shorten
from l4jax.model.rotary import rotary_frequencies

_PREFIX = "llama."
_SUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "expert_count": (0,),
    "attention.sliding_window": (0,),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.scale": (0,),
    "embedding_scale": (0, 1),
    "residual_scale": (0, 1),
    "logit_scale": (0, 1),
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (1, 0),
    "rope.scaling.attn_factor": (1,),
    "rope.scale_linear": (1, 0),
}
_ENDS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
# (factor, low, high, original context) of Llama 3.1 to 3.3 and of Llama 3.2's small models.
_SCALINGS = ((8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192))


def config_from_gguf(
    metadata: Mapping[str, Any], *, vocab_size: int, tie_word_embeddings: bool, rope_freqs: np.ndarray | None
) -> ModelConfig:
    """Read a GGUF file's metadata (plain Python values, arrays as lists).

    ``vocab_size`` is the number of rows of ``token_embd.weight``, ``tie_word_embeddings`` is True if there is no
    ``output.weight``, and ``rope_freqs`` is the tensor ``rope_freqs.weight`` [head_dim / 2] if there is one. GGUF keeps Llama 3's
    RoPE scaling only as that tensor, of frequency divisors: the scaling is the one among Llama 3's known scalings
    that gives these divisors. Raises :class:`ConfigError` for another architecture and for what the decoder does not compute.
    """
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ConfigError(f"GGUF: general.architecture is {shorten(architecture)}, which is not supported; expected 'llama'")
    sources = {"architecture": "GGUF: general.architecture"}
    model = {key.removeprefix(_PREFIX): _exact(value) for key, value in metadata.items() if key.startswith(_PREFIX)}
    section = Section(model, f"GGUF: {_PREFIX}", {"rope.freq_base": 10000.0}, "llama.cpp", sources)
    section.refuse_other(_SUPPORTED)
    tokens = Section(metadata, "GGUF: ", {}, "", sources)

    hidden = section.take("hidden_size", "embedding_length", int)
    num_layers = section.take("num_layers", "block_count", int)
    num_heads = section.take("num_heads", "attention.head_count", int)
    kv_heads = num_heads
    if "attention.head_count_kv" in model:
        kv_heads = section.take("num_kv_heads", "attention.head_count_kv", int)
    else:
        section.derive("num_kv_heads", None, "attention.head_count, which GGUF means for a model without grouped queries")
    width = head_dim(
        section, section.take("head_dim", "attention.key_length", int) if "attention.key_length" in model else None, hidden, num_heads
    )
    for key in ("attention.value_length", "rope.dimension_count"):
        if model.get(key, width) != width:
            raise ConfigError(
                f"GGUF: {_PREFIX}{key} is {shorten(model[key])}, which is not supported; expected the head dimension, {width}"
            )
    section.derive("vocab_size", None, "the shape of token_embd.weight")
    if model.get("vocab_size", vocab_size) != vocab_size:
        raise ConfigError(
            f"GGUF: {_PREFIX}vocab_size is {shorten(model['vocab_size'])}, but token_embd.weight has {vocab_size} rows; the file is damaged"
        )
    theta = section.take("rope_theta", "rope.freq_base", float)
    return ModelConfig(
        architecture="llama",
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=kv_heads,
        head_dim=width,
        intermediate_size=section.take("intermediate_size", "feed_forward_length", int),
        max_position_embeddings=section.take("max_position_embeddings", "context_length", int),
        rms_norm_eps=section.take("rms_norm_eps", "attention.layer_norm_rms_epsilon", float),
        rope_theta=theta,
        rope_scaling=_rope_scaling(section, rope_freqs, width, theta),
        tie_word_embeddings=section.derive(
            "tie_word_embeddings", tie_word_embeddings, presence("output.weight", there=not tie_word_embeddings)
        ),
        bos_token_id=_token(tokens, "bos_token_id", "tokenizer.ggml.bos_token_id"),
        eos_token_ids=_end_tokens(tokens),
        pad_token_id=_token(tokens, "pad_token_id", "tokenizer.ggml.padding_token_id"),
        **plain_attention(section, num_layers),
        sources=tuple(sources.items()),
    )


def _exact(value: Any) -> Any:
    """Undo GGUF's rounding to float32: the decimal that was meant is the shortest that rounds to it (1e-05, not 9.99999975e-06)."""
    if isinstance(value, float) and float(np.float32(value)) == value:
        return float(str(np.float32(value)))
    return value


def _token(tokens: Section, field: str, key: str) -> int | None:
    if key not in tokens.values:
        tokens.sources[field] = f"absent from GGUF: {key}"
        return None
    return int(tokens.take(field, key, int))


def _end_tokens(tokens: Section) -> tuple[int, ...]:
    keys = [key for key in _ENDS if key in tokens.values]
    ends = tuple(dict.fromkeys(tokens.take("eos_token_ids", key, int) for key in keys))
    tokens.sources["eos_token_ids"] = f"GGUF: {', '.join(keys)}" if keys else f"absent from GGUF: {', '.join(_ENDS)}"
    return ends


def _rope_scaling(section: Section, rope_freqs: np.ndarray | None, width: int, theta: float) -> RopeScaling | None:
    if rope_freqs is None:
        section.derive("rope_scaling", None, "GGUF, which has no rope_freqs.weight")
        return None
    plain = rotary_frequencies(width, theta, None)
    for factor, low, high, original in _SCALINGS:
        scaling = RopeScaling(factor=factor, low_freq_factor=low, high_freq_factor=high, original_max_position_embeddings=original)
        divisors = plain / rotary_frequencies(width, theta, scaling)
        if rope_freqs.shape == divisors.shape and np.allclose(rope_freqs, divisors, rtol=1e-4, atol=0):
            for field in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
                section.derive(f"rope_scaling.{field}", None, "GGUF: rope_freqs.weight")
            return scaling
    raise ConfigError(
        f"GGUF: rope_freqs.weight (shape {rope_freqs.shape}, largest {rope_freqs.max():.6g}) is not the scaling of any known "
        "Llama 3 model; convert the Hugging Face checkpoint instead"
    )
