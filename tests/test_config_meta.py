"""params.json of Meta."""

from __future__ import annotations

from typing import Any

import pytest

from l4jax.config import ConfigError, RopeScaling, flat_fields
from l4jax.config_formats import config_from_hf, config_from_meta

# As published.
LLAMA_31_8B = {
    "dim": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "n_kv_heads": 8,
    "vocab_size": 128256,
    "ffn_dim_multiplier": 1.3,
    "multiple_of": 1024,
    "norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "use_scaled_rope": True,
}
MAVERICK = {
    "dim": 5120,
    "n_layers": 48,
    "n_heads": 40,
    "n_kv_heads": 8,
    "head_dim": 128,
    "vocab_size": -1,
    "ffn_dim_multiplier": 1.2,
    "ffn_exp": 4.0,
    "multiple_of": 2048,
    "norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "attention_chunk_size": 8192,
    "nope_layer_interval": 4,
    "attn_temperature_tuning": True,
    "floor_scale": 8192.0,
    "moe_args": {"num_experts": 128, "interleave_moe_layer_step": 2},
    "vision_args": {
        "image_size": {"height": 336, "width": 336},
        "patch_size": {"height": 14, "width": 14},
        "dim": 1408,
        "n_layers": 34,
        "n_heads": 16,
        "mlp_ratio": 4.0,
        "output_dim": 4096,
        "pixel_shuffle_ratio": 0.5,
    },
}
SCOUT = {**MAVERICK, "use_qk_norm": True, "use_scaled_rope": True, "moe_args": {"num_experts": 16}}


@pytest.mark.parametrize(
    ("dim", "multiplier", "multiple", "width"),
    [(4096, 1.3, 1024, 14336), (8192, 1.3, 4096, 28672), (16384, 1.2, 4096, 53248), (4096, None, 256, 11008)],
)
def test_dense_widths_are_the_published_ones(dim: int, multiplier: float | None, multiple: int, width: int) -> None:
    params = {**LLAMA_31_8B, "dim": dim, "ffn_dim_multiplier": multiplier, "multiple_of": multiple}
    assert config_from_meta(params, vocab_size=128256).intermediate_size == width


def test_llama_3() -> None:
    config = config_from_meta(LLAMA_31_8B, vocab_size=128256)
    assert config.rope_scaling == RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
    assert (config.architecture, config.head_dim, config.num_kv_heads, config.max_position_embeddings) == ("llama", 128, 8, 131072)
    assert (config.bos_token_id, config.eos_token_ids) == (128000, (128001, 128008, 128009))
    assert config.attention_chunk_size is None
    assert config.rope_layers == (True,) * 32
    unscaled = config_from_meta({**LLAMA_31_8B, "use_scaled_rope": False}, vocab_size=128256)
    assert unscaled.rope_scaling is None
    assert unscaled.max_position_embeddings == 8192


def test_llama_4_agrees_with_the_hugging_face_configuration() -> None:
    hf_vision = {"hidden_size": 1408, "image_size": 336, "vision_output_dim": 4096}
    hf_text: dict[str, Any] = {"max_position_embeddings": 262144, "bos_token_id": 200000, "pad_token_id": 200018}
    hf_text |= {"eos_token_id": [200001, 200007, 200008]}
    wrapper = {"architectures": ["Llama4ForConditionalGeneration"], "vision_config": hf_vision}
    maverick = {"interleave_moe_layer_step": 2, "num_local_experts": 128, "use_qk_norm": False, "attn_temperature_tuning": True}
    assert config_from_meta(MAVERICK, vocab_size=202048) == config_from_hf({**wrapper, "text_config": hf_text | maverick})
    scaling = {
        "rope_type": "llama3",
        "factor": 16.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
    }
    scout = {"use_qk_norm": True, "rope_scaling": scaling}
    assert config_from_meta(SCOUT, vocab_size=202048) == config_from_hf({**wrapper, "text_config": hf_text | scout})


def test_absent_fields_have_the_defaults_of_metas_own_classes() -> None:
    params = {"dim": 64, "n_layers": 4, "n_heads": 4, "nope_layer_interval": 2, "vocab_size": -1}
    config = config_from_meta(params, vocab_size=96)
    assert (config.attn_temperature_tuning, config.use_qk_norm, config.attention_chunk_size) == (False, False, None)
    assert (config.rope_theta, config.rms_norm_eps, config.moe, config.vision) == (500000.0, 1e-5, None, None)
    sources = dict(config.sources)
    assert sources["attn_temperature_tuning"] == "default of Meta's Llama 4 ModelArgs: false"
    assert sources["vocab_size"] == "derived from the shape of tok_embeddings.weight"
    assert sources["bos_token_id"] == "derived from the vocabulary's size, 96, which no tokenizer of Meta's has"
    assert (config.bos_token_id, config.eos_token_ids) == (None, ())


@pytest.mark.parametrize("params", [LLAMA_31_8B, MAVERICK, SCOUT, {**SCOUT, "moe_args": None, "vision_args": None}])
def test_every_value_has_a_source(params: dict[str, Any]) -> None:
    config = config_from_meta(params, vocab_size=202048 if "head_dim" in params else 128256)
    assert dict(config.sources).keys() == flat_fields(config).keys()


def test_tied_embeddings_are_the_callers_to_see() -> None:
    for tied, found in ((True, "absence"), (False, "presence")):
        config = config_from_meta(LLAMA_31_8B, vocab_size=128256, tie_word_embeddings=tied)
        assert config.tie_word_embeddings == tied
        assert dict(config.sources)["tie_word_embeddings"] == f"derived from the {found} of output.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": None}, "params.json: dim is null; expected an integer"),
        ({"vocab_size": 32000}, "vocab_size is 32000, but tok_embeddings.weight has 202048 rows"),
        ({"quantization_args": {"scheme": "int4"}}, "quantization_args is"),
        ({"lora_args": {"rank": 16}}, "lora_args is"),
        ({"moe_args": {"num_experts": 8, "top_k": 2}}, "moe_args.top_k is 2"),
        ({"moe_args": {}}, "moe_args.num_experts is missing"),
        ({"moe_args": 5}, "moe_args is 5; expected an object"),
        ({"ffn_exp": None}, "not both ffn_exp and ffn_dim_multiplier"),
        ({"multiple_of": 0}, "multiple_of is 0"),
        ({"nope_layer_interval": 0}, "nope_layer_interval is 0"),
        ({"vision_args": {**MAVERICK["vision_args"], "patch_size": {"height": 14, "width": 7}}}, "patch_size is 7 x 14; expected a square"),
        ({"floor_scale": 8192.5}, "floor_scale is 8192.5; expected an integer"),
    ],
)
def test_what_is_not_supported_is_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        config_from_meta({**MAVERICK, **changes}, vocab_size=202048)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_llama_3_must_state_its_rope_theta() -> None:
    params = {key: value for key, value in LLAMA_31_8B.items() if key != "rope_theta"}
    with pytest.raises(ConfigError, match="rope_theta is missing"):
        config_from_meta(params, vocab_size=128256)


def test_llama_3_2s_small_models_must_say_their_scaling():
    """Their params.json has no factor, and Meta's code the constant of Llama 3.1: 8, where they were trained with 32."""
    small = {**LLAMA_31_8B, "dim": 2048, "n_layers": 16}
    with pytest.raises(ConfigError, match=r"no rope_scaling_factor, and dim 2048 is not one of Llama 3\.1's; add it \(.* 32 in") as refused:
        config_from_meta(small, vocab_size=128256)
    assert "\n" not in str(refused.value)
    config = config_from_meta({**small, "rope_scaling_factor": 32.0}, vocab_size=128256)
    assert config.rope_scaling is not None and config.rope_scaling.factor == 32.0


def test_a_null_scaling_factor_is_metas_default():
    config = config_from_meta({**SCOUT, "rope_scaling_factor": None}, vocab_size=202048)
    assert config.rope_scaling is not None and config.rope_scaling.factor == 16.0
