"""Writes small GGUF files: a golden model's weights under llama.cpp's names."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFEndian, GGUFWriter, quantize

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(key: str) -> str:
    """What llama.cpp calls a tensor of a Hugging Face folder."""
    if key.startswith("model.layers."):
        _, _, layer, name = key.removesuffix(".weight").split(".", 3)
        return f"blk.{layer}.{_NAMES[name]}.weight"
    return {"model.embed_tokens.weight": "token_embd", "model.norm.weight": "output_norm", "lm_head.weight": "output"}[key] + ".weight"


def _pairs(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows from Hugging Face's half-split RoPE order to pairs, one head after another."""
    return rows.reshape(-1, 2, head_dim // 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(
    path: Path,
    config: Mapping[str, int],
    tensors: Mapping[str, np.ndarray],
    *,
    endian: GGUFEndian = GGUFEndian.LITTLE,
    kind: GGMLQuantizationType | None = None,
    only: Collection[str] | None = None,
    described: bool = True,
    extra: Callable[[GGUFWriter], None] = lambda _: None,
) -> Path:
    """Write a model of a ``config.json``.

    ``kind``: how matrices of whole blocks are stored; ``only``: the Hugging Face names that go into this part; without ``described`` the
    file does not describe the model, as the second part of a split file.
    """
    writer = GGUFWriter(path, "llama", endianess=endian)
    if described:
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count(config["num_attention_heads"])
        writer.add_head_count_kv(config["num_key_value_heads"])
        writer.add_key_length(config["head_dim"])
        writer.add_value_length(config["head_dim"])
        writer.add_rope_dimension_count(config["head_dim"])
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_rope_freq_base(500000.0)
    else:
        writer.kv_data[0].clear()
    extra(writer)
    for key, array in tensors.items():
        if only is not None and key not in only:
            continue
        stored = _pairs(array, config["head_dim"]) if "q_proj" in key or "k_proj" in key else array
        if kind is not None and stored.ndim == 2 and stored.shape[1] % GGML_QUANT_SIZES[kind][0] == 0:
            writer.add_tensor(gguf_name(key), quantize(stored, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name(key), stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
