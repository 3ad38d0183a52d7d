"""GGUF files of the ``llama`` architecture, dequantised."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, dequantize

from l4jax.checkpoints.recipes import Wanted, fuse_qkv, stack_gate_up
from l4jax.checkpoints.source import CheckpointError, Recipe, TensorInfo
from l4jax.config import ModelConfig
from l4jax.config_formats import config_from_gguf
from l4jax.text.gguf_tokenizer import write_gguf_tokenizer

_PLAIN = {
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F16: np.dtype(np.float16),
    GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}
_ROPE_FREQS = "rope_freqs.weight"  # the configuration is read from it
_QUANTIZED = {getattr(GGMLQuantizationType, name) for name in ("Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")}
_KNOWN = "one of " + ", ".join(sorted(kind.name for kind in (*_PLAIN, *_QUANTIZED)))


class GGUFSource:
    """An opened GGUF file (see :class:`l4jax.checkpoints.source.Source`). Quantised tensors are read as float32."""

    format = "gguf"

    def __init__(self, path: Path) -> None:
        try:
            reader = GGUFReader(path)
        except (ValueError, IndexError, KeyError) as error:
            unknown = re.search(r"(\d+)\)? is not a valid GGMLQuantizationType", str(error))
            if unknown:
                raise CheckpointError(f"{path}: a tensor is quantised as type {unknown[1]}, which is unknown; expected {_KNOWN}") from error
            raise CheckpointError(f"{path} is truncated or no GGUF file ({error}); fetch it again") from error
        self._metadata: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        for name, tensor in self._tensors.items():
            if tensor.tensor_type not in _PLAIN and tensor.tensor_type not in _QUANTIZED:
                raise CheckpointError(f"{path}: tensor {name} is quantised as {tensor.tensor_type.name}; expected {_KNOWN}")
        self.fingerprint: Mapping[str, list[int]] = {path.name: [path.stat().st_size, path.stat().st_mtime_ns]}
        self.tensors: Mapping[str, TensorInfo] = {
            name: TensorInfo(tuple(int(n) for n in reversed(tensor.shape)), _PLAIN.get(tensor.tensor_type, np.dtype(np.float32)))
            for name, tensor in self._tensors.items()
        }
        self.ignored = frozenset({_ROPE_FREQS} & self.tensors.keys())
        if "token_embd.weight" not in self.tensors:
            raise CheckpointError(f"{path} has no tensor token_embd.weight; expected a language model")
        self.config: ModelConfig = config_from_gguf(
            self._metadata,
            vocab_size=self.tensors["token_embd.weight"].shape[0],
            tie_word_embeddings="output.weight" not in self.tensors,
            rope_freqs=self.read(_ROPE_FREQS) if _ROPE_FREQS in self.tensors else None,
        )
        self.recipes: Mapping[str, Recipe] = _recipes(self.config, self.tensors)

    def read(self, key: str) -> np.ndarray:
        """The tensor: memory-mapped if it is stored plainly, else dequantised to float32."""
        tensor, info = self._tensors[key], self.tensors[key]
        if tensor.tensor_type in _PLAIN:
            return tensor.data.view(info.dtype).reshape(info.shape)
        return dequantize(tensor.data, tensor.tensor_type).reshape(info.shape)

    def write_text_files(self, directory: Path) -> list[str]:
        """Derive ``tokenizer.json`` and the chat template from the metadata."""
        return write_gguf_tokenizer(self._metadata, directory)


def _recipes(config: ModelConfig, tensors: Mapping[str, TensorInfo]) -> dict[str, Recipe]:
    """GGUF stores Llama's query and key rows for interleaved RoPE pairs, as we compute it."""
    K, h, D, V, F, H = (
        config.num_kv_heads,
        config.head_dim,
        config.hidden_size,
        config.vocab_size,
        config.intermediate_size,
        config.num_heads,
    )
    wanted = Wanted(tensors)
    wanted.same("embed", "token_embd.weight", (V, D))
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}.", f"blk.{i}."
        wanted.same(f"{ours}attention_norm.scale", f"{theirs}attn_norm.weight", (D,))
        wanted.add(
            f"{ours}attention.qkv",
            [(f"{theirs}attn_{x}.weight", (n * h, D)) for x, n in (("q", H), ("k", K), ("v", K))],
            lambda parts: fuse_qkv(parts, K, h, halves=False),
            "q, k, v grouped by KV head",
        )
        wanted.reshaped(f"{ours}attention.out", f"{theirs}attn_output.weight", (D, H * h), (D, K, H // K, h))
        wanted.same(f"{ours}feed_forward_norm.scale", f"{theirs}ffn_norm.weight", (D,))
        wanted.add(
            f"{ours}feed_forward.gate_up",
            [(f"{theirs}ffn_{x}.weight", (F, D)) for x in ("gate", "up")],
            stack_gate_up,
            "gate, up stacked",
        )
        wanted.same(f"{ours}feed_forward.down", f"{theirs}ffn_down.weight", (D, F))
    wanted.same("norm.scale", "output_norm.weight", (D,))
    if not config.tie_word_embeddings:
        wanted.same("head", "output.weight", (V, D))
    return wanted.recipes
