"""A Hugging Face ``config.json`` from a ModelConfig: for checkpoints that came in another format."""

from __future__ import annotations

import dataclasses
from typing import Any

from l4jax.config import ModelConfig, MoEConfig


def config_to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """Return the ``config.json`` that :func:`config_from_hf` reads back as an equal configuration. ``dtype`` is the weights'."""
    scaling = config.rope_scaling
    rope = {"rope_theta": config.rope_theta, "rope_type": "default"}
    if scaling is not None:
        rope |= {"rope_type": "llama3", **dataclasses.asdict(scaling)}
    common = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": rope,
        "tie_word_embeddings": config.tie_word_embeddings,
        "hidden_act": "silu",
        "attention_bias": False,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids) or None,
        "pad_token_id": config.pad_token_id,
        "dtype": dtype,
    }
    if config.architecture == "llama":
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            **common,
            "intermediate_size": config.intermediate_size,
            "mlp_bias": False,
        }
    moe = config.moe or MoEConfig(num_experts=1, intermediate_size=config.intermediate_size, moe_layers=(False,) * config.num_layers)
    text = {
        **common,
        "model_type": "llama4_text",
        "intermediate_size": moe.intermediate_size,
        "intermediate_size_mlp": config.intermediate_size,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": 1,
        "moe_layers": [i for i, has_experts in enumerate(moe.moe_layers) if has_experts],
        "no_rope_layers": [int(uses_rope) for uses_rope in config.rope_layers],
        "layer_types": ["chunked_attention" if rope and config.attention_chunk_size else "full_attention" for rope in config.rope_layers],
        "attention_chunk_size": config.attention_chunk_size,
        "use_qk_norm": config.use_qk_norm,
        "attn_temperature_tuning": config.attn_temperature_tuning,
        "floor_scale": config.floor_scale,
        "attn_scale": config.attn_scale,
    }
    vision = config.vision
    if vision is None:
        return {"architectures": ["Llama4ForCausalLM"], **text}
    return {
        "architectures": ["Llama4ForConditionalGeneration"],
        "model_type": "llama4",
        "dtype": dtype,
        "tie_word_embeddings": config.tie_word_embeddings,
        "boi_token_index": vision.begin_image_token_id,
        "eoi_token_index": vision.end_image_token_id,
        "image_token_index": vision.image_token_id,
        "text_config": text,
        "vision_config": {
            "model_type": "llama4_vision_model",
            "hidden_size": vision.hidden_size,
            "num_hidden_layers": vision.num_layers,
            "num_attention_heads": vision.num_heads,
            "intermediate_size": vision.intermediate_size,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "num_channels": vision.num_channels,
            "norm_eps": vision.norm_eps,
            "rope_theta": vision.rope_theta,
            "pixel_shuffle_ratio": vision.pixel_shuffle_ratio,
            "projector_input_dim": vision.projector_input_dim,
            "projector_output_dim": vision.projector_output_dim,
            "vision_output_dim": vision.vision_output_dim,
        },
    }
