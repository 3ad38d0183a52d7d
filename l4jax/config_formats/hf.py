"""ModelConfig from a Hugging Face ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from l4jax.config import ConfigError, ModelConfig, MoEConfig, RopeScaling, VisionConfig
from l4jax.config_formats.fields import Section, convert, head_dim, plain_attention, shorten
from sharding.words import counted

_HF_MODEL_TYPES = {"LlamaForCausalLM": "llama", "Llama4ForCausalLM": "llama4_text", "Llama4ForConditionalGeneration": "llama4"}

# What transformers' configuration classes document for an absent field.
_HF_LLAMA: Mapping[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
_HF_LLAMA4_TEXT: Mapping[str, Any] = {
    "vocab_size": 202048,
    "hidden_size": 5120,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "num_local_experts": 16,
    "moe_layers": None,
    "interleave_moe_layer_step": 1,
    "use_qk_norm": True,
    "no_rope_layers": None,
    "no_rope_layer_interval": 4,
    "attention_chunk_size": 8192,
    "layer_types": None,
    "attn_temperature_tuning": True,
    "floor_scale": 8192,
    "attn_scale": 0.1,
}
_HF_LLAMA4_VISION: Mapping[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 34,
    "num_attention_heads": 16,
    "num_channels": 3,
    "intermediate_size": 5632,
    "vision_output_dim": 7680,
    "image_size": 448,
    "patch_size": 14,
    "norm_eps": 1e-5,
    "pixel_shuffle_ratio": 0.5,
    "projector_input_dim": 4096,
    "projector_output_dim": 4096,
    "rope_theta": 10000.0,
}
_HF_LLAMA4: Mapping[str, Any] = {"image_token_index": 200092, "boi_token_index": 200080, "eoi_token_index": 200081}

# Fields that can ask for mathematics that the decoder does not have, and the values that do not.
_HF_ONLY: Mapping[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "hidden_act": ("silu",),
    "num_experts_per_tok": (1,),
    "partial_rotary_factor": (1, None),
    "sliding_window": (None,),
    "quantization_config": (None,),
}
_HF_VISION_ONLY: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu",),
    "multi_modal_projector_bias": (False,),
    "vision_feature_select_strategy": ("default",),
    "quantization_config": (None,),
}


def config_from_hf(config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None) -> ModelConfig:
    """Read a Hugging Face ``config.json`` of Llama, Llama 4 text, or the multimodal Llama 4 wrapper.

    Understands the spellings of transformers 4 (``rope_theta``, ``rope_scaling``) and 5 (``rope_parameters``). The end tokens are all
    that ``config.json`` and ``generation_config`` (the contents of ``generation_config.json``) name. Raises :class:`ConfigError` for
    another architecture and for what the decoder does not compute.
    """
    model_type = _model_type(config)
    sources = {"architecture": "config.json: " + ("architectures" if config.get("architectures") else "model_type")}
    generation = Section(generation_config or {}, "generation_config.json: ", {}, "", sources)
    if model_type == "llama":
        return _llama(Section(config, "config.json: ", _HF_LLAMA, "transformers LlamaConfig", sources), (generation,))
    if model_type == "llama4_text":
        return _llama4(Section(config, "config.json: ", _HF_LLAMA4_TEXT, "transformers Llama4TextConfig", sources), None, (generation,))
    wrapper = Section(config, "config.json: ", _HF_LLAMA4, "transformers Llama4Config", sources)
    wrapper.refuse_other({"quantization_config": (None,)})
    parts = []
    for key, defaults, name in (
        ("text_config", _HF_LLAMA4_TEXT, "transformers Llama4TextConfig"),
        ("vision_config", _HF_LLAMA4_VISION, "transformers Llama4VisionConfig"),
    ):
        values = config.get(key) or {}
        if not isinstance(values, Mapping):
            raise ConfigError(f"config.json: {key} is {shorten(values)}; expected an object")
        parts.append(Section(values, f"config.json: {key}.", defaults, name, sources))
    text, vision = parts
    tied = [v["tie_word_embeddings"] for v in (config, text.values) if "tie_word_embeddings" in v]
    if len(set(tied)) > 1:
        raise ConfigError("config.json: tie_word_embeddings and text_config.tie_word_embeddings disagree; make them equal")
    return _llama4(text, _vision(vision, wrapper), (wrapper, generation))


def _model_type(config: Mapping[str, Any]) -> str:
    known = f"expected {', '.join(_HF_MODEL_TYPES)}"
    names, model_type = config.get("architectures") or [], config.get("model_type")
    if not isinstance(names, list) or len(names) > 1:
        raise ConfigError(f"config.json: architectures is {shorten(names)}; expected a list with one name")
    for name in names:
        if name not in _HF_MODEL_TYPES:
            raise ConfigError(f"config.json: the architecture {shorten(name)} is not supported; {known}")
        if model_type not in (None, _HF_MODEL_TYPES[name]):
            raise ConfigError(f"config.json: model_type is {shorten(model_type)}, but {name} goes with {_HF_MODEL_TYPES[name]!r}")
        return _HF_MODEL_TYPES[name]
    if model_type is None:
        raise ConfigError(f"config.json names no architecture; {known} in its field architectures")
    if model_type not in _HF_MODEL_TYPES.values():
        raise ConfigError(
            f"config.json: the model_type {shorten(model_type)} is not supported; expected {', '.join(_HF_MODEL_TYPES.values())}"
        )
    return str(model_type)


def _llama(text: Section, others: Sequence[Section]) -> ModelConfig:
    text.refuse_other(_HF_ONLY)
    common = _common(text, others)
    return ModelConfig(
        architecture="llama",
        **common,
        **plain_attention(text, common["num_layers"]),
        intermediate_size=text.take("intermediate_size", "intermediate_size", int),
        sources=tuple(text.sources.items()),
    )


def _llama4(text: Section, vision: VisionConfig | None, others: Sequence[Section]) -> ModelConfig:
    text.refuse_other(_HF_ONLY)
    if vision is None:
        text.derive("vision", None, "the architecture, a text model")
    common = _common(text, others)
    rope_layers = _rope_layers(text, common["num_layers"])
    return ModelConfig(
        architecture="llama4",
        **common,
        rope_layers=rope_layers,
        attention_chunk_size=_chunk_size(text, rope_layers),
        use_qk_norm=text.take("use_qk_norm", "use_qk_norm", bool),
        attn_temperature_tuning=_temperature_tuning(text),
        floor_scale=text.take("floor_scale", "floor_scale", int),
        attn_scale=text.take("attn_scale", "attn_scale", float),
        intermediate_size=text.take("intermediate_size", "intermediate_size_mlp", int),
        moe=_moe(text, common["num_layers"]),
        vision=vision,
        sources=tuple(text.sources.items()),
    )


def _common(text: Section, others: Sequence[Section]) -> dict[str, Any]:
    """Return the fields that Llama 3 and Llama 4 share, as arguments of ModelConfig. ``others``: what else may name end tokens."""
    hidden = text.take("hidden_size", "hidden_size", int)
    heads = text.take("num_heads", "num_attention_heads", int)
    kv_heads = text.take_optional("num_kv_heads", "num_key_value_heads", int)
    if kv_heads is None:
        kv_heads = text.derive("num_kv_heads", heads, f"{text.place}num_attention_heads")
    context = text.take("max_position_embeddings", "max_position_embeddings", int)
    theta, scaling = _rope(text, context)
    return {
        "vocab_size": text.take("vocab_size", "vocab_size", int),
        "hidden_size": hidden,
        "num_layers": text.take("num_layers", "num_hidden_layers", int),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim(text, text.take_optional("head_dim", "head_dim", int), hidden, heads),
        "max_position_embeddings": context,
        "rms_norm_eps": text.take("rms_norm_eps", "rms_norm_eps", float),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": text.take("tie_word_embeddings", "tie_word_embeddings", bool),
        "bos_token_id": text.take_optional("bos_token_id", "bos_token_id", int),
        "eos_token_ids": _end_tokens(text, others),
        "pad_token_id": _pad_token_id(text),
    }


def _end_tokens(text: Section, others: Sequence[Section]) -> tuple[int, ...]:
    """Return every end token that one of the sections names, or the format's default where none does."""
    field, key = "eos_token_ids", "eos_token_id"
    stated = [section for section in (text, *others) if section.values.get(key) is not None]
    if not stated:
        token = text.take_optional(field, key, int)
        return () if token is None else (token,)
    ends: dict[int, None] = {}
    for section in stated:
        value = section.values[key]
        ends |= dict.fromkeys(convert(token, int, section.place + key) for token in (value if isinstance(value, list) else [value]))
    text.sources[field] = ", ".join(section.place + key for section in stated)
    return tuple(ends)


def _pad_token_id(text: Section) -> int | None:
    pad = text.take_optional("pad_token_id", "pad_token_id", int)
    # Early Llama configurations write -1 for none.
    return None if pad == -1 else pad


def _rope(text: Section, context: int) -> tuple[float, RopeScaling | None]:
    """Return base and scaling, from ``rope_scaling`` where it is not empty, else from ``rope_parameters``, as transformers does."""
    key = "rope_scaling" if text.values.get("rope_scaling") else "rope_parameters"
    values = text.values.get(key) or {}
    if not isinstance(values, Mapping) or any(isinstance(v, Mapping) for v in values.values()):
        raise ConfigError(f"{text.place}{key} is {shorten(values)}; expected one object for all layers")
    place = f"{text.place}{key}."
    original = "original_max_position_embeddings"
    rope = Section(values, place, {original: context}, "transformers: max_position_embeddings", text.sources)
    rope.refuse_other({"partial_rotary_factor": (1, None)})
    theta = (rope if "rope_theta" in values else text).take("rope_theta", "rope_theta", float)
    type_key = "type" if "type" in values and "rope_type" not in values else "rope_type"
    kind = values.get(type_key, "default")
    if kind == "default":
        factors = sorted(values.keys() & {"factor", "low_freq_factor", "high_freq_factor"})
        if type_key not in values and factors:
            raise ConfigError(f"{place[:-1]} has {', '.join(factors)} but no rope_type; add it: 'llama3' or 'default'")
        written = place + type_key if type_key in values else f"{text.place}rope_scaling"
        absent = "default of transformers: null"
        text.sources["rope_scaling"] = written if type_key in values or "rope_scaling" in text.values else absent
        return theta, None
    if kind != "llama3":
        raise ConfigError(f"{place}{type_key} is {shorten(kind)}, which is not supported; expected 'default' or 'llama3'")
    return theta, RopeScaling(
        factor=rope.take("rope_scaling.factor", "factor", float),
        low_freq_factor=rope.take("rope_scaling.low_freq_factor", "low_freq_factor", float),
        high_freq_factor=rope.take("rope_scaling.high_freq_factor", "high_freq_factor", float),
        # One outside the object comes first in transformers.
        original_max_position_embeddings=(text if original in text.values else rope).take(f"rope_scaling.{original}", original, int),
    )


def _temperature_tuning(text: Section) -> bool:
    """Read a truth value; Scout's configuration has 4 for true."""
    name = "attn_temperature_tuning"
    return bool(text.take(name, name, int if type(text.values.get(name)) is int else bool))


def _rope_layers(text: Section, layers: int) -> tuple[bool, ...]:
    """``no_rope_layers`` has a 1 where a layer *does* use RoPE. Empty and null mean the interval, as in transformers."""
    given = text.values.get("no_rope_layers")
    if given:
        if not isinstance(given, list) or len(given) < layers or any(flag not in (0, 1) for flag in given):
            raise ConfigError(f"{text.place}no_rope_layers is {shorten(given)}; expected a list of {layers} times 0 or 1")
        text.sources["rope_layers"] = f"{text.place}no_rope_layers"
        return tuple(flag == 1 for flag in given[:layers])
    interval = text.take("rope_layers", "no_rope_layer_interval", int)
    if interval < 1:
        raise ConfigError(f"{text.place}no_rope_layer_interval is {interval}; expected 1 or more")
    text.derive("rope_layers", None, f"no_rope_layer_interval {interval} ({text.sources['rope_layers']})")
    return tuple((i + 1) % interval != 0 for i in range(layers))


def _chunk_size(text: Section, rope_layers: tuple[bool, ...]) -> int | None:
    """Return the attention chunk of the RoPE layers; None where it is null, or ``layer_types`` has full attention in all of them."""
    chunk: int | None = text.take_optional("attention_chunk_size", "attention_chunk_size", int)
    chunked = tuple("chunked_attention" if rope else "full_attention" for rope in rope_layers)
    layer_types = text.values.get("layer_types")
    if layer_types is None:
        return chunk
    place = f"{text.place}layer_types"
    if not isinstance(layer_types, list | tuple) or len(layer_types) < len(rope_layers):
        raise ConfigError(f"{place} is {shorten(layer_types)}; expected a list of {counted(len(rope_layers), 'name')}")
    if tuple(layer_types[: len(rope_layers)]) == chunked:
        if chunk is None and any(rope_layers):
            raise ConfigError(f"{text.place}attention_chunk_size is null, but the layers are chunked_attention; give the size of a chunk")
        return chunk
    if any(kind != "full_attention" for kind in layer_types):
        raise ConfigError(
            f"{place} disagrees with no_rope_layers; expected chunked_attention in the RoPE layers and full_attention in the others"
        )
    text.sources["attention_chunk_size"] = place
    return None


def _moe(text: Section, layers: int) -> MoEConfig | None:
    indices = text.values.get("moe_layers")
    if indices is None:
        step = text.take("moe.moe_layers", "interleave_moe_layer_step", int)
        if step < 1:
            raise ConfigError(f"{text.place}interleave_moe_layer_step is {step}; expected 1 or more")
        text.derive("moe.moe_layers", None, f"interleave_moe_layer_step {step} ({text.sources['moe.moe_layers']})")
        moe_layers = tuple((i + 1) % step == 0 for i in range(layers))
    else:
        if not isinstance(indices, list) or any(type(i) is not int for i in indices):
            raise ConfigError(f"{text.place}moe_layers is {shorten(indices)}; expected a list of layer numbers")
        if any(not 0 <= i < layers for i in indices):
            raise ConfigError(f"{text.place}moe_layers is {shorten(indices)}; expected numbers from 0 to {layers - 1}, the model's layers")
        text.sources["moe.moe_layers"] = f"{text.place}moe_layers"
        moe_layers = tuple(i in indices for i in range(layers))
    if not any(moe_layers):
        text.sources["moe"] = text.sources.pop("moe.moe_layers")
        return None
    return MoEConfig(
        num_experts=text.take("moe.num_experts", "num_local_experts", int),
        intermediate_size=text.take("moe.intermediate_size", "intermediate_size", int),
        moe_layers=moe_layers,
    )


def _vision(vision: Section, wrapper: Section) -> VisionConfig:
    vision.refuse_other(_HF_VISION_ONLY)
    rope = vision.values.get("rope_parameters") or {}
    rope_section = Section(rope, f"{vision.place}rope_parameters.", {}, "", vision.sources)
    rope_section.refuse_other({"rope_type": ("default",)})

    def token(field: str, keys: tuple[str, str]) -> int:
        """transformers 5 reads either spelling."""
        key = next((k for k in keys if k in wrapper.values), keys[0])
        return int(wrapper.take(f"vision.{field}", key, int))

    integers = {
        "hidden_size": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "intermediate_size": "intermediate_size",
        "image_size": "image_size",
        "patch_size": "patch_size",
        "num_channels": "num_channels",
        "projector_input_dim": "projector_input_dim",
        "projector_output_dim": "projector_output_dim",
        "vision_output_dim": "vision_output_dim",
    }
    return VisionConfig(
        **{field: vision.take(f"vision.{field}", key, int) for field, key in integers.items()},
        rope_theta=(rope_section if "rope_theta" in rope else vision).take("vision.rope_theta", "rope_theta", float),
        norm_eps=vision.take("vision.norm_eps", "norm_eps", float),
        pixel_shuffle_ratio=vision.take("vision.pixel_shuffle_ratio", "pixel_shuffle_ratio", float),
        image_token_id=token("image_token_id", ("image_token_index", "image_token_id")),
        begin_image_token_id=token("begin_image_token_id", ("boi_token_index", "boi_token_id")),
        end_image_token_id=token("end_image_token_id", ("eoi_token_index", "eoi_token_id")),
    )
