"""ModelConfig from Meta's ``params.json``, of Llama 3 and Llama 4."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from l4jax.config import ConfigError, ModelConfig, MoEConfig, RopeScaling, VisionConfig
from l4jax.config_formats.fields import Section, head_dim, plain_attention, presence, shorten

# Defaults of ModelArgs in llama_models/llama3/args.py; the scaling's numbers are constants in its model.py. rope_theta is not
# among them: Llama 2, whose params.json looks the same, has another default.
_LLAMA3: Mapping[str, Any] = {
    "n_kv_heads": None,
    "multiple_of": 256,
    "ffn_dim_multiplier": None,
    "norm_eps": 1e-5,
    "use_scaled_rope": False,
    "rope_scaling_factor": 8.0,
    "rope_high_freq_factor": 4.0,
}
_LLAMA31_WIDTHS = (4096, 8192, 16384)
# Defaults of ModelArgs in llama_models/llama4/args.py.
_LLAMA4: Mapping[str, Any] = {
    **_LLAMA3,
    "head_dim": None,
    "ffn_exp": None,
    "rope_theta": 500000.0,
    "rope_scaling_factor": 16.0,
    "rope_high_freq_factor": 1.0,
    "attention_chunk_size": None,
    "nope_layer_interval": None,
    "use_qk_norm": False,
    "attn_temperature_tuning": False,
    "floor_scale": 8192,
    "attn_scale": 0.1,
}
_MOE: Mapping[str, Any] = {"capacity_factor": 1.0, "auto_scale_F": True, "interleave_moe_layer_step": 1}
_LLAMA4_KEYS = ("moe_args", "nope_layer_interval", "use_qk_norm", "attention_chunk_size", "ffn_exp", "vision_args")
_SUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "quantization_args": (None,),
    "lora_args": (None,),
    "vision_chunk_size": (-1, None),
    "vision_num_cross_attention_layers": (-1, None),
    "vision_model": (None,),
}

# The special tokens of Meta's tokenizers, by the size of the vocabulary: begin, ends, padding.
_SPECIAL_TOKENS = {
    128256: (128000, (128001, 128008, 128009), 128004),
    202048: (200000, (200001, 200007, 200008), 200018),
}


def config_from_meta(params: Mapping[str, Any], *, vocab_size: int, tie_word_embeddings: bool = False) -> ModelConfig:
    """Read Meta's ``params.json``.

    ``vocab_size`` is the number of rows of ``tok_embeddings.weight`` over all shards (params.json may say -1), and
    ``tie_word_embeddings`` is True if there is no ``output.weight``. params.json does not give the context's length and the
    special tokens: they are what Meta states for the model family. Raises :class:`ConfigError`.
    """
    sources = {"architecture": "params.json: its fields"}
    if params.get("rope_scaling_factor", 0) is None:  # Meta's ModelArgs takes null for its default
        params = {key: value for key, value in params.items() if key != "rope_scaling_factor"}
    is_llama4 = any(params.get(key) is not None for key in _LLAMA4_KEYS)
    defaults, owner = (_LLAMA4, "Meta's Llama 4 ModelArgs") if is_llama4 else (_LLAMA3, "Meta's Llama 3 ModelArgs")
    section = Section(params, "params.json: ", defaults, owner, sources)
    section.refuse_other(_SUPPORTED)
    dim = section.take("hidden_size", "dim", int)
    num_layers = section.take("num_layers", "n_layers", int)
    num_heads = section.take("num_heads", "n_heads", int)
    kv_heads = section.take_optional("num_kv_heads", "n_kv_heads", int)
    scaled = section.take("rope_scaling", "use_scaled_rope", bool)
    begin, ends, padding = _SPECIAL_TOKENS.get(vocab_size, (None, (), None))
    for field in ("bos_token_id", "eos_token_ids", "pad_token_id"):
        section.derive(field, None, f"the vocabulary's size, {vocab_size}" + ("" if ends else ", which no tokenizer of Meta's has"))
    return ModelConfig(
        architecture="llama4" if is_llama4 else "llama",
        vocab_size=_vocab_size(section, vocab_size),
        hidden_size=dim,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_heads if kv_heads is None else kv_heads,
        head_dim=head_dim(section, section.take_optional("head_dim", "head_dim", int) if is_llama4 else None, dim, num_heads),
        intermediate_size=_dense_width(section, dim),
        max_position_embeddings=_context(section, is_llama4=is_llama4, scaled=scaled),
        rms_norm_eps=section.take("rms_norm_eps", "norm_eps", float),
        rope_theta=section.take("rope_theta", "rope_theta", float),
        rope_scaling=_rope_scaling(section, is_llama4=is_llama4, dim=dim) if scaled else None,
        tie_word_embeddings=section.derive(
            "tie_word_embeddings", tie_word_embeddings, presence("output.weight", there=not tie_word_embeddings)
        ),
        bos_token_id=begin,
        eos_token_ids=ends,
        pad_token_id=padding,
        **(_llama4(section, dim, num_layers) if is_llama4 else plain_attention(section, num_layers)),
        sources=tuple(sources.items()),
    )


def _vocab_size(section: Section, from_tensors: int) -> int:
    written = section.values.get("vocab_size", -1)
    if written == -1:
        return int(section.derive("vocab_size", from_tensors, "the shape of tok_embeddings.weight"))
    if written != from_tensors:
        raise ConfigError(
            f"params.json: vocab_size is {shorten(written)}, but tok_embeddings.weight has {from_tensors} rows; one is another model's"
        )
    return int(section.take("vocab_size", "vocab_size", int))


def _context(section: Section, *, is_llama4: bool, scaled: bool) -> int:
    if is_llama4:
        return int(section.derive("max_position_embeddings", 262144, "the model card: the context of the Llama 4 base models"))
    if scaled:
        return int(section.derive("max_position_embeddings", 131072, "the model card: the context of Llama 3.1, which has scaled RoPE"))
    return int(section.derive("max_position_embeddings", 8192, "the model card: the context of Llama 3"))


def _rope_scaling(section: Section, *, is_llama4: bool, dim: int) -> RopeScaling:
    # Llama 3's code has the constant 8, right for the models it was written for; Llama 3.2's small models have 32.
    if not is_llama4 and section.values.get("rope_scaling_factor") is None and dim not in _LLAMA31_WIDTHS:
        raise ConfigError(
            f"params.json has use_scaled_rope but no rope_scaling_factor, and dim {dim} is not one of Llama 3.1's; add it "
            "(8 in Llama 3.1 and 3.3, 32 in Llama 3.2's 1B and 3B)"
        )
    del section.sources["rope_scaling"]
    for field, value in (("low_freq_factor", 1.0), ("original_max_position_embeddings", 8192)):
        section.derive(f"rope_scaling.{field}", None, f"Meta's model.py, where it is the constant {value}")
    return RopeScaling(
        factor=section.take("rope_scaling.factor", "rope_scaling_factor", float),
        low_freq_factor=1.0,
        high_freq_factor=section.take("rope_scaling.high_freq_factor", "rope_high_freq_factor", float),
        original_max_position_embeddings=8192,
    )


def _dense_width(section: Section, dim: int) -> int:
    """Compute ``2/3 * 4 * dim * ffn_dim_multiplier``, rounded up to ``multiple_of``; each step truncated as Meta does."""
    multiple = section.take("intermediate_size", "multiple_of", int)
    multiplier = section.take_optional("intermediate_size", "ffn_dim_multiplier", float)
    width = int(2 * (4 * dim) / 3)
    if multiplier is not None:
        width = int(multiplier * width)
    section.derive("intermediate_size", None, f"dim {dim}, ffn_dim_multiplier {multiplier} and multiple_of {multiple}")
    return _round_up(width, multiple)


def _round_up(width: int, multiple: int) -> int:
    if multiple < 1:
        raise ConfigError(f"params.json: multiple_of is {multiple}; expected 1 or more")
    return -(-width // multiple) * multiple


def _llama4(section: Section, dim: int, num_layers: int) -> dict[str, Any]:
    interval = section.take_optional("rope_layers", "nope_layer_interval", int)
    if interval is not None and interval < 1:
        raise ConfigError(f"params.json: nope_layer_interval is {interval}; expected 1 or more")
    return {
        "rope_layers": tuple(interval is None or (i + 1) % interval != 0 for i in range(num_layers)),
        "attention_chunk_size": section.take_optional("attention_chunk_size", "attention_chunk_size", int),
        "use_qk_norm": section.take("use_qk_norm", "use_qk_norm", bool),
        "attn_temperature_tuning": section.take("attn_temperature_tuning", "attn_temperature_tuning", bool),
        "floor_scale": section.take("floor_scale", "floor_scale", int),
        "attn_scale": section.take("attn_scale", "attn_scale", float),
        "moe": _moe(section, dim, num_layers),
        "vision": _vision(section),
    }


def _moe(section: Section, dim: int, num_layers: int) -> MoEConfig | None:
    args = section.values.get("moe_args")
    if args is None:
        section.derive("moe", None, "params.json, which has no moe_args")
        return None
    moe = Section(_object(args, "moe_args"), "params.json: moe_args.", _MOE, "Meta's Llama 4 MoEArgs", section.sources)
    moe.refuse_other({"top_k": (1,)})
    step = moe.take("moe.moe_layers", "interleave_moe_layer_step", int)
    if step < 1:
        raise ConfigError(f"params.json: moe_args.interleave_moe_layer_step is {step}; expected 1 or more")
    return MoEConfig(
        num_experts=moe.take("moe.num_experts", "num_experts", int),
        intermediate_size=_expert_width(section, moe, dim),
        moe_layers=tuple((i + 1) % step == 0 for i in range(num_layers)),
    )


def _expert_width(section: Section, moe: Section, dim: int) -> int:
    """Compute as the dense width with ``ffn_exp`` for 4, divided between the experts that a token uses if ``auto_scale_F``."""
    field = "moe.intermediate_size"
    expansion = section.take_optional(field, "ffn_exp", float)
    multiplier = section.take_optional(field, "ffn_dim_multiplier", float)
    if expansion is None or multiplier is None:
        raise ConfigError("params.json has moe_args but not both ffn_exp and ffn_dim_multiplier, which say how wide an expert is; add them")
    multiple = section.take(field, "multiple_of", int)
    capacity = moe.take(field, "capacity_factor", float)
    width = int(multiplier * int(2 * int(expansion * dim) / 3))
    if moe.take(field, "auto_scale_F", bool):
        width = int(width / (capacity + 1))
    section.derive(field, None, f"dim {dim}, ffn_exp {expansion}, ffn_dim_multiplier {multiplier}, multiple_of {multiple} and moe_args")
    return _round_up(width, multiple)


def _vision(section: Section) -> VisionConfig | None:
    args = section.values.get("vision_args")
    if args is None:
        section.derive("vision", None, "params.json, which has no vision_args")
        return None
    vision = Section(_object(args, "vision_args"), "params.json: vision_args.", {}, "", section.sources)

    def side(field: str, key: str) -> int:
        size = Section(_object(vision.values.get(key), f"vision_args.{key}"), f"{vision.place}{key}.", {}, "", section.sources)
        width, height = size.take(field, "width", int), size.take(field, "height", int)
        if width != height:
            raise ConfigError(f"{vision.place}{key} is {width} x {height}; expected a square")
        return int(width)

    constants: dict[str, Any] = {"num_channels": 3, "rope_theta": 10000.0, "norm_eps": 1e-5}
    # Meta's llama4/tokenizer.py: <|patch|>, <|image_start|>, <|image_end|>.
    tokens = {"image_token_id": 200092, "begin_image_token_id": 200080, "end_image_token_id": 200081}
    for field in constants:
        vision.derive(f"vision.{field}", None, "Meta's vision encoder, where it is a constant")
    for field in tokens:
        vision.derive(f"vision.{field}", None, "Meta's Llama 4 tokenizer")
    hidden = vision.take("vision.hidden_size", "dim", int)
    ratio = vision.take("vision.intermediate_size", "mlp_ratio", float)
    return VisionConfig(
        hidden_size=hidden,
        num_layers=vision.take("vision.num_layers", "n_layers", int),
        num_heads=vision.take("vision.num_heads", "n_heads", int),
        intermediate_size=vision.derive("vision.intermediate_size", int(hidden * ratio), f"vision_args.dim {hidden} and mlp_ratio {ratio}"),
        image_size=side("vision.image_size", "image_size"),
        patch_size=side("vision.patch_size", "patch_size"),
        pixel_shuffle_ratio=vision.take("vision.pixel_shuffle_ratio", "pixel_shuffle_ratio", float),
        # Both matrices of Meta's adapter are output_dim wide.
        **{f: vision.take(f"vision.{f}", "output_dim", int) for f in ("projector_input_dim", "projector_output_dim", "vision_output_dim")},
        **constants,
        **tokens,
    )


def _object(value: Any, key: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError(f"params.json: {key} is {shorten(value)}; expected an object")
    return value
