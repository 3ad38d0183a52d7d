"""config.json of Hugging Face: spellings, defaults, provenance, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from l4jax.config import ConfigError, ModelConfig, MoEConfig, RopeScaling, flat_fields
from l4jax.config_formats import config_from_hf

LLAMA = {"architectures": ["LlamaForCausalLM"]}
LLAMA4 = {"architectures": ["Llama4ForCausalLM"]}
WRAPPER = {"architectures": ["Llama4ForConditionalGeneration"]}
SMALL4 = {**LLAMA4, "num_hidden_layers": 4}
SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
GOLDEN = Path(__file__).parent / "golden" / "data"


def source(config: ModelConfig, field: str) -> str:
    return dict(config.sources)[field]


# The values are those of transformers 5.23's configuration classes.
def test_absent_fields_have_the_documented_defaults_of_llama() -> None:
    config = config_from_hf(LLAMA)
    expected = {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "num_layers": 32,
        "num_heads": 32,
        "num_kv_heads": 32,
        "head_dim": 128,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_ids": (2,),
        "pad_token_id": None,
        "attention_chunk_size": None,
        "moe": None,
    }
    assert {name: flat_fields(config)[name] for name in expected} == expected
    assert source(config, "rms_norm_eps") == "default of transformers LlamaConfig: 1e-06"
    assert source(config, "head_dim") == "derived from width / heads"


def test_absent_fields_have_the_documented_defaults_of_llama_4() -> None:
    config = config_from_hf(LLAMA4)
    assert config.rope_layers == (True, True, True, False) * 12
    assert config.moe == MoEConfig(num_experts=16, intermediate_size=8192, moe_layers=(True,) * 48)
    assert (config.hidden_size, config.intermediate_size, config.num_kv_heads, config.head_dim) == (5120, 16384, 8, 128)
    assert (config.rope_theta, config.rms_norm_eps, config.max_position_embeddings) == (500000.0, 1e-5, 131072)
    assert (config.attention_chunk_size, config.use_qk_norm, config.attn_temperature_tuning) == (8192, True, True)
    assert (config.floor_scale, config.attn_scale, config.rope_scaling) == (8192, 0.1, None)
    assert source(config, "use_qk_norm") == "default of transformers Llama4TextConfig: true"
    assert source(config, "rope_layers").startswith("derived from no_rope_layer_interval 4 (default of transformers")


def test_the_vision_defaults_are_those_of_the_class_and_say_so() -> None:
    config = config_from_hf(WRAPPER)
    assert config.vision is not None
    assert (config.vision.hidden_size, config.vision.image_size, config.vision.vision_output_dim) == (768, 448, 7680)
    assert config.vision.image_token_id == 200092
    assert source(config, "vision.hidden_size") == "default of transformers Llama4VisionConfig: 768"
    assert source(config, "vision.image_token_id") == "default of transformers Llama4Config: 200092"


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*/config*.json")), ids=lambda p: f"{p.parent.name}/{p.name}")
def test_every_value_of_a_real_configuration_has_a_source(path: Path) -> None:
    config = config_from_hf(json.loads(path.read_text()))
    assert dict(config.sources).keys() == flat_fields(config).keys()
    assert len(dict(config.sources)) == len(config.sources)


def test_the_wrapper_names_the_section() -> None:
    config = config_from_hf({**WRAPPER, "text_config": {"rope_theta": 7.0}, "vision_config": {"hidden_size": 160}, "boi_token_index": 5})
    assert config.rope_theta == 7.0
    assert source(config, "rope_theta") == "config.json: text_config.rope_theta"
    assert source(config, "vision.hidden_size") == "config.json: vision_config.hidden_size"
    assert source(config, "vision.begin_image_token_id") == "config.json: boi_token_index"


@pytest.mark.parametrize(
    ("fields", "theta", "scaled", "where"),
    [
        ({}, 10000.0, False, "default of transformers LlamaConfig: 10000.0"),
        ({"rope_theta": 5e5, "rope_scaling": None}, 5e5, False, "config.json: rope_theta"),
        ({"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **SCALING}}, 5e5, True, "config.json: rope_theta"),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **SCALING}}, 5e5, True, "config.json: rope_theta"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 3.0}}, 3.0, False, "config.json: rope_parameters.rope_theta"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 3, **SCALING}}, 3.0, True, "config.json: rope_parameters.rope_theta"),
        # The one in the object wins, and rope_scaling over rope_parameters, as in transformers.
        ({"rope_theta": 9.0, "rope_parameters": {"rope_theta": 3.0}}, 3.0, False, "config.json: rope_parameters.rope_theta"),
        (
            {"rope_scaling": {"rope_type": "llama3", **SCALING}, "rope_parameters": {"rope_theta": 3.0}},
            1e4,
            True,
            "default of transformers LlamaConfig: 10000.0",
        ),
    ],
)
def test_both_spellings_of_rope(fields: dict[str, Any], theta: float, scaled: bool, where: str) -> None:
    config = config_from_hf({**LLAMA, **fields})
    assert config.rope_theta == theta
    assert source(config, "rope_theta") == where
    assert config.rope_scaling == (RopeScaling(**SCALING) if scaled else None)


def test_llama3_scaling_without_an_original_length_takes_the_context() -> None:
    scaling = {key: value for key, value in SCALING.items() if not key.startswith("original")}
    config = config_from_hf({**LLAMA, "max_position_embeddings": 777, "rope_scaling": {"rope_type": "llama3", **scaling}})
    assert config.rope_scaling is not None
    assert config.rope_scaling.original_max_position_embeddings == 777
    assert source(config, "rope_scaling.original_max_position_embeddings") == "default of transformers: max_position_embeddings: 777"


@pytest.mark.parametrize(
    ("fields", "rope_layers"),
    [
        # A 1 in "no_rope_layers" means that the layer does use RoPE.
        ({"no_rope_layers": [1, 0, 0, 1]}, (True, False, False, True)),
        ({"no_rope_layers": []}, (True, True, True, False)),
        ({"no_rope_layers": None}, (True, True, True, False)),
        ({"no_rope_layer_interval": 2}, (True, False, True, False)),
        ({"no_rope_layers": [0, 1, 1, 1, 1, 1]}, (False, True, True, True)),
    ],
)
def test_which_layers_use_rope(fields: dict[str, Any], rope_layers: tuple[bool, ...]) -> None:
    assert config_from_hf({**SMALL4, **fields}).rope_layers == rope_layers


@pytest.mark.parametrize(
    ("fields", "moe_layers"),
    [
        ({"interleave_moe_layer_step": 2}, (False, True, False, True)),
        ({"interleave_moe_layer_step": 3}, (False, False, True, False)),
        ({"moe_layers": [0, 3], "interleave_moe_layer_step": 2}, (True, False, False, True)),
        ({"moe_layers": []}, None),
    ],
)
def test_which_layers_have_experts(fields: dict[str, Any], moe_layers: tuple[bool, ...] | None) -> None:
    moe = config_from_hf({**SMALL4, **fields}).moe
    assert (None if moe is None else moe.moe_layers) == moe_layers


def test_layer_types_with_full_attention_everywhere_mean_no_chunks() -> None:
    config = config_from_hf({**SMALL4, "layer_types": ["full_attention"] * 4})
    assert config.attention_chunk_size is None
    assert source(config, "attention_chunk_size") == "config.json: layer_types"


@pytest.mark.parametrize(("written", "meant"), [(4, True), (True, True), (False, False), (0, False)])
def test_attention_temperature_was_a_number_once(written: Any, meant: bool) -> None:
    assert config_from_hf({**SMALL4, "attn_temperature_tuning": written}).attn_temperature_tuning is meant


@pytest.mark.parametrize(("written", "meant"), [(5, (5,)), ([5, 6], (5, 6)), (None, ()), ([], ())])
def test_end_tokens(written: Any, meant: tuple[int, ...]) -> None:
    assert config_from_hf({**LLAMA, "eos_token_id": written}).eos_token_ids == meant


def test_end_tokens_are_those_of_every_file_and_section_that_names_some() -> None:
    config = config_from_hf({**LLAMA, "eos_token_id": 1}, {"eos_token_id": [1, 4]})
    assert config.eos_token_ids == (1, 4)
    assert source(config, "eos_token_ids") == "config.json: eos_token_id, generation_config.json: eos_token_id"
    # The default of the format's class is meant only where no file says anything.
    assert config_from_hf(LLAMA, {"eos_token_id": 9}).eos_token_ids == (9,)
    assert config_from_hf(LLAMA, {"eos_token_id": None}).eos_token_ids == (2,)
    assert config_from_hf({**WRAPPER, "eos_token_id": 5, "text_config": {"eos_token_id": [6]}}, {"eos_token_id": 7}).eos_token_ids == (
        6,
        5,
        7,
    )
    with pytest.raises(ConfigError, match=r'generation_config.json: eos_token_id is "x"; expected an integer'):
        config_from_hf(LLAMA, {"eos_token_id": ["x"]})


def test_an_original_length_outside_the_scaling_comes_first() -> None:
    config = config_from_hf({**LLAMA, "rope_scaling": {"rope_type": "llama3", **SCALING}, "original_max_position_embeddings": 32})
    assert config.rope_scaling.original_max_position_embeddings == 32
    assert source(config, "rope_scaling.original_max_position_embeddings") == "config.json: original_max_position_embeddings"


def test_no_chunk_size_means_full_attention() -> None:
    assert config_from_hf({**SMALL4, "attention_chunk_size": None}).attention_chunk_size is None


def test_padding_of_minus_one_is_none() -> None:
    assert config_from_hf({**LLAMA, "pad_token_id": -1}).pad_token_id is None


def test_the_model_type_will_do_for_an_architecture() -> None:
    assert config_from_hf({"model_type": "llama4_text"}).architecture == "llama4"
    assert config_from_hf({"model_type": "llama"}).architecture == "llama"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "names no architecture"),
        ({"architectures": ["MistralForCausalLM"]}, 'the architecture "MistralForCausalLM" is not supported; expected LlamaForCausalLM'),
        ({"model_type": "qwen3"}, 'the model_type "qwen3" is not supported'),
        ({**LLAMA, "model_type": "llama4"}, "but LlamaForCausalLM goes with 'llama'"),
        ({"architectures": ["LlamaForCausalLM", "Llama4ForCausalLM"]}, "expected a list with one name"),
        ({**LLAMA, "attention_bias": True}, "attention_bias is true, which is not supported; expected false"),
        ({**LLAMA, "mlp_bias": True}, "mlp_bias is true"),
        ({**LLAMA, "hidden_act": "gelu"}, 'hidden_act is "gelu", which is not supported; expected "silu"'),
        ({**LLAMA, "sliding_window": 4096}, "sliding_window is 4096"),
        ({**LLAMA, "partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({**LLAMA, "quantization_config": {"quant_method": "fp8"}}, "quantization_config is"),
        ({**WRAPPER, "quantization_config": {"quant_method": "compressed-tensors"}}, "quantization_config is"),
        ({**LLAMA4, "num_experts_per_tok": 2}, "num_experts_per_tok is 2"),
        (
            {**LLAMA, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
            "rope_scaling.rope_type is \"yarn\", which is not supported; expected 'default' or 'llama3'",
        ),
        ({**LLAMA, "rope_scaling": {"type": "linear", "factor": 4.0}}, 'rope_scaling.type is "linear"'),
        ({**LLAMA, "rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "rope_scaling.low_freq_factor is missing"),
        ({**LLAMA, "rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "expected one object for all layers"),
        ({**LLAMA, "rope_parameters": {"rope_theta": 1.0, "partial_rotary_factor": 0.25}}, "partial_rotary_factor is 0.25"),
        ({**LLAMA, "hidden_size": "wide"}, 'hidden_size is "wide"; expected an integer'),
        ({**LLAMA, "hidden_size": None}, "hidden_size is null; expected an integer"),
        ({**LLAMA, "hidden_size": 4096.5}, "hidden_size is 4096.5; expected an integer"),
        ({**LLAMA, "tie_word_embeddings": "no"}, 'tie_word_embeddings is "no"; expected true or false'),
        ({**LLAMA, "hidden_size": 100}, "width 100 is not a multiple of 32 heads"),
        ({**LLAMA, "num_key_value_heads": 5}, "num_heads is 32; expected a multiple of num_kv_heads, which is 5"),
        ({**LLAMA, "eos_token_id": 32000}, "outside the vocabulary"),
        ({**SMALL4, "no_rope_layers": [1, 0]}, "expected a list of 4 times 0 or 1"),
        ({**SMALL4, "no_rope_layers": [1, 0, 2, 1]}, "expected a list of 4 times 0 or 1"),
        ({**SMALL4, "no_rope_layer_interval": 0}, "no_rope_layer_interval is 0"),
        ({**SMALL4, "interleave_moe_layer_step": 0}, "interleave_moe_layer_step is 0"),
        ({**SMALL4, "moe_layers": ["0"]}, "expected a list of layer numbers"),
        ({**SMALL4, "moe_layers": [0, 4]}, "expected numbers from 0 to 3, the model's layers"),
        ({**SMALL4, "moe_layers": [-1]}, "expected numbers from 0 to 3"),
        ({**SMALL4, "rope_scaling": {"factor": 8.0}}, "rope_scaling has factor but no rope_type; add it"),
        ({**SMALL4, "use_qk_norm": 7}, "use_qk_norm is 7; expected"),
        ({**SMALL4, "floor_scale": 2**40}, "floor_scale is 1099511627776; expected less than 2**31"),
        ({**SMALL4, "max_position_embeddings": 2**33}, "max_position_embeddings is 8589934592; expected at most 2147483648"),
        (
            {**SMALL4, "attention_chunk_size": None, "layer_types": ["chunked_attention"] * 3 + ["full_attention"]},
            "attention_chunk_size is null, but the layers are chunked_attention",
        ),
        ({**SMALL4, "layer_types": ["chunked_attention"] * 4}, "layer_types disagrees with no_rope_layers"),
        ({**SMALL4, "layer_types": ["full_attention"]}, "expected a list of 4 names"),
        ({**WRAPPER, "text_config": 3}, "text_config is 3; expected an object"),
        ({**WRAPPER, "tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}}, "disagree"),
        ({**WRAPPER, "vision_config": {"hidden_act": "relu"}}, 'vision_config.hidden_act is "relu"'),
    ],
)
def test_what_is_not_supported_is_refused_in_one_line(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        config_from_hf(config)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
