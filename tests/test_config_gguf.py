"""Metadata of GGUF files."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from l4jax.config import ConfigError, RopeScaling, flat_fields
from l4jax.config_formats import config_from_gguf
from l4jax.model.rotary import rotary_angles, rotary_frequencies

METADATA = {
    "general.architecture": "llama",
    "llama.block_count": 2,
    "llama.context_length": 8192,
    "llama.embedding_length": 512,
    "llama.feed_forward_length": 1536,
    "llama.attention.head_count": 8,
    "llama.attention.head_count_kv": 2,
    "llama.rope.freq_base": 500000.0,
    "llama.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
    "llama.vocab_size": 1000,
    "llama.rope.dimension_count": 64,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.eot_token_id": 3,
    "tokenizer.ggml.padding_token_id": 4,
}


def read(metadata: dict[str, Any], rope_freqs: np.ndarray | None = None, *, tied: bool = True) -> Any:
    return config_from_gguf(metadata, vocab_size=1000, tie_word_embeddings=tied, rope_freqs=rope_freqs)


def test_values_and_sources() -> None:
    config = read(METADATA)
    assert (config.hidden_size, config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (512, 2, 8, 2, 64)
    assert (config.intermediate_size, config.max_position_embeddings, config.rope_theta) == (1536, 8192, 500000.0)
    assert (config.bos_token_id, config.eos_token_ids, config.pad_token_id) == (1, (2, 3), 4)
    assert config.tie_word_embeddings
    assert config.rope_scaling is None
    # The file has the float32 nearest to it.
    assert config.rms_norm_eps == 1e-5
    assert dict(config.sources).keys() == flat_fields(config).keys()
    assert dict(config.sources)["rope_theta"] == "GGUF: llama.rope.freq_base"
    assert not read(METADATA, tied=False).tie_word_embeddings
    for tied, found in ((True, "absence"), (False, "presence")):
        assert dict(read(METADATA, tied=tied).sources)["tie_word_embeddings"] == f"derived from the {found} of output.weight"


def test_absent_fields() -> None:
    optional = ("llama.attention.head_count_kv", "llama.rope.freq_base", "llama.vocab_size", "llama.rope.dimension_count")
    config = read({key: value for key, value in METADATA.items() if key not in optional and not key.startswith("tokenizer")})
    assert (config.num_kv_heads, config.rope_theta, config.bos_token_id, config.eos_token_ids) == (8, 10000.0, None, ())
    assert dict(config.sources)["rope_theta"] == "default of llama.cpp: 10000.0"


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3_scaling_is_recognised_by_its_divisors(factor: float) -> None:
    scaling = RopeScaling(factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
    divisors = rotary_frequencies(64, 500000.0, None) / rotary_frequencies(64, 500000.0, scaling)
    config = read(METADATA, divisors.astype(np.float32))
    assert config.rope_scaling == scaling
    assert dict(config.sources)["rope_scaling.factor"] == "derived from GGUF: rope_freqs.weight"


def test_an_unknown_scaling_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rope_freqs.weight \(shape \(32,\), largest 2\) is not the scaling of any known Llama 3 model"):
        read(METADATA, np.full(32, 2, np.float32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"general.architecture": "qwen2"}, 'general.architecture is "qwen2", which is not supported'),
        ({"llama.vocab_size": 999}, "llama.vocab_size is 999, but token_embd.weight has 1000 rows"),
        ({"llama.expert_count": 8}, "llama.expert_count is 8"),
        ({"llama.rope.scaling.type": "linear"}, 'llama.rope.scaling.type is "linear"'),
        ({"llama.rope.scaling.type": "yarn"}, 'llama.rope.scaling.type is "yarn"'),
        ({"llama.rope.scale_linear": 4.0}, "llama.rope.scale_linear is 4.0"),
        ({"llama.rope.dimension_count": 32}, "llama.rope.dimension_count is 32"),
        ({"llama.attention.value_length": 32}, "llama.attention.value_length is 32"),
        ({"llama.attention.head_count": [8, 4]}, "llama.attention.head_count is [8, 4]; expected an integer"),
        ({"llama.logit_scale": 0.5}, "llama.logit_scale is 0.5"),
        ({"llama.embedding_scale": 12.0}, "llama.embedding_scale is 12.0"),
        ({"llama.residual_scale": 0.5}, "llama.residual_scale is 0.5"),
        ({"llama.attention.scale": 0.5}, "llama.attention.scale is 0.5"),
        ({"llama.attention.clamp_kqv": 8.0}, "llama.attention.clamp_kqv is 8.0"),
        ({"llama.attention.causal": False}, "llama.attention.causal is false"),
        ({"llama.attention.sliding_window": 4096}, "llama.attention.sliding_window is 4096"),
        ({"llama.rope.scaling.factor": 8.0}, "llama.rope.scaling.factor is 8.0"),
        ({"llama.rope.scaling.attn_factor": 1.2}, "llama.rope.scaling.attn_factor is 1.2, which is not supported; expected 1"),
    ],
)
def test_what_is_not_supported_is_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        read({**METADATA, **changes})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_attention_factor_of_1_is_the_rotation_that_is_computed() -> None:
    """ggml's ``rope_yarn``, outside YaRN: cosine and sine of position * base^(-2 i / width), both times the factor."""
    position, width, base = 7, 64, 500000.0

    def reference(factor: float) -> np.ndarray:
        angle = position * base ** (-np.arange(0, width, 2) / width)
        return factor * np.stack([np.cos(angle), np.sin(angle)])

    config = read({**METADATA, "llama.rope.scaling.attn_factor": 1.0})
    computed = np.stack(rotary_angles(config, jnp.full((1, 1), position, jnp.int32)))[:, 0, 0]
    np.testing.assert_allclose(computed, reference(1.0), atol=1e-6)
    assert np.abs(computed - reference(1.2)).max() > 0.1


def test_a_missing_field_is_named() -> None:
    with pytest.raises(ConfigError, match=r"GGUF: llama.block_count is missing; expected an integer"):
        read({key: value for key, value in METADATA.items() if key != "llama.block_count"})
