"""GGUF files of the ``llama`` architecture, dequantised."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from l4jax.checkpoints.gguf_files import GGUFFiles
from l4jax.checkpoints.recipes import Wanted, fuse_qkv, stack_gate_up
from l4jax.checkpoints.source import CheckpointError, Recipe, TensorInfo
from l4jax.config import ModelConfig
from l4jax.config_formats import config_from_gguf
from l4jax.text.gguf_tokenizer import write_gguf_tokenizer

_ROPE_FREQS = "rope_freqs.weight"  # the configuration is read from it


class GGUFSource:
    """An opened GGUF file (see :class:`l4jax.checkpoints.source.Source`), given by any of its parts if it is split."""

    format = "gguf"

    def __init__(self, path: Path) -> None:
        self._files = GGUFFiles(path)
        self.fingerprint: Mapping[str, list[int]] = self._files.fingerprint
        self.tensors: Mapping[str, TensorInfo] = self._files.tensors
        self.notes: tuple[str, ...] = ()
        self.ignored = frozenset({_ROPE_FREQS} & self.tensors.keys())
        kind = self._files.metadata.get("general.type", "model")
        if kind != "model":
            lora = "; merge it into its model (llama-export-lora) and convert the result" if kind == "adapter" else ""
            raise CheckpointError(f"{path} is a GGUF file of type {kind}; expected a whole model{lora}")
        if "token_embd.weight" not in self.tensors:
            raise CheckpointError(f"{path} has no tensor token_embd.weight; expected a language model")
        self.config: ModelConfig = config_from_gguf(
            self._files.metadata,
            vocab_size=self.tensors["token_embd.weight"].shape[0],
            tie_word_embeddings="output.weight" not in self.tensors,
            rope_freqs=self.read(_ROPE_FREQS) if _ROPE_FREQS in self.tensors else None,
        )
        self.recipes: Mapping[str, Recipe] = _recipes(self.config, self.tensors)

    def read(self, key: str) -> np.ndarray:
        """Return the tensor, dequantised to float32 unless it is stored plainly."""
        return self._files.read(key)

    def write_tokenizer(self, directory: Path) -> list[str]:
        """Derive ``tokenizer.json`` and the chat template from the metadata."""
        return write_gguf_tokenizer(self._files.metadata, directory)

    def write_other_files(self, directory: Path) -> list[str]:
        """Write nothing: a GGUF file is all that there is."""
        return []


def _recipes(config: ModelConfig, tensors: Mapping[str, TensorInfo]) -> dict[str, Recipe]:
    """Return how our weights are made. GGUF stores query and key rows for interleaved RoPE pairs, as we compute it."""
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
