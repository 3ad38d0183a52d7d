"""Hugging Face folders: ``config.json`` and safetensors, in one file or in shards with an index."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from l4jax.checkpoints.files import LICENCES, copy_files
from l4jax.checkpoints.recipes import Wanted, fuse_qkv, stack_gate_up, transposed
from l4jax.checkpoints.safetensors import SafetensorsFiles
from l4jax.checkpoints.source import CheckpointError, Recipe, TensorInfo
from l4jax.checkpoints.store import SOURCE_CONFIG
from l4jax.checkpoints.vision import vision_shapes
from l4jax.config import ModelConfig
from l4jax.config_formats import config_from_hf
from l4jax.files import read_bytes, read_json, read_json_if_there

# A processor's configuration may hold the chat template.
_TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "processor_config.json")
_COPIED = ("generation_config.json", "preprocessor_config.json", *LICENCES)


class HFSource:
    """An opened Hugging Face folder (see :class:`l4jax.checkpoints.source.Source`)."""

    format = "hf"

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        values = read_json(directory / "config.json")
        _refuse_quantised(values, directory)
        config = config_from_hf(values, read_json_if_there(directory / "generation_config.json"))
        self._files = SafetensorsFiles(directory)
        self.fingerprint: Mapping[str, list[int]] = self._files.fingerprint
        self.tensors: Mapping[str, TensorInfo] = self._files.tensors
        self.notes = self._files.notes
        # Computed from the configuration; transformers ignores these too.
        self.ignored = frozenset(key for key in self.tensors if key.endswith("rotary_emb.inv_freq"))
        prefix = _prefix(self.tensors)
        head, embedding = f"{prefix}lm_head.weight", f"{prefix}model.embed_tokens.weight"
        if config.tie_word_embeddings and self.tensors.keys() >= {head, embedding}:
            if self._files.same_values(head, embedding):
                # Some writers store the tied head a second time.
                self.ignored |= {head}
            else:
                # transformers 5 decides the same: a head that is stored and differs from the embedding was trained.
                config = _untied(config, head)
                self.notes += (
                    f"config.json ties {head} to the embedding, but the one in the files differs: it is kept, as transformers 5 does",
                )
        self.config: ModelConfig = config
        self.recipes: Mapping[str, Recipe] = hf_recipes(self.config, self.tensors)

    def read(self, key: str) -> np.ndarray:
        """Return the tensor."""
        return self._files.read(key)

    def write_tokenizer(self, directory: Path) -> list[str]:
        """Copy tokenizer and chat templates."""
        names = copy_files(self._directory, _TOKENIZER, directory)
        templates = "additional_chat_templates"
        if (self._directory / templates).is_dir():
            (directory / templates).mkdir()
            names += [f"{templates}/{name}" for name in copy_files(self._directory / templates, ("*.jinja",), directory / templates)]
        return names

    def write_other_files(self, directory: Path) -> list[str]:
        """Copy configuration, generation defaults and licence files."""
        (directory / SOURCE_CONFIG).write_bytes(read_bytes(self._directory / "config.json"))
        return [*copy_files(self._directory, _COPIED, directory), SOURCE_CONFIG]


def _refuse_quantised(values: Mapping[str, Any], directory: Path) -> None:
    for section in (values, values.get("text_config")):
        said = section.get("quantization_config") or section.get("quantization") if isinstance(section, Mapping) else None
        if said:
            # mlx-lm names no method.
            method = said.get("quant_method", "MLX" if "group_size" in said else "unknown") if isinstance(said, Mapping) else said
            raise CheckpointError(
                f"{directory} holds quantised weights ({method}), which are not supported; fetch the model in bfloat16, or as a GGUF file"
            )


def _untied(config: ModelConfig, head: str) -> ModelConfig:
    sources = {**dict(config.sources), "tie_word_embeddings": f"{head}, which differs from the embedding, against config.json"}
    return dataclasses.replace(config, tie_word_embeddings=False, sources=tuple(sources.items()))


def _prefix(tensors: Mapping[str, TensorInfo]) -> str:
    """Return the prefix of the names of the decoder's tensors."""
    return "language_model." if any(key.startswith("language_model.") for key in tensors) else ""


def hf_recipes(config: ModelConfig, tensors: Mapping[str, TensorInfo]) -> dict[str, Recipe]:
    """Return how each of our weights is made of the folder's tensors.

    Hugging Face stores Llama 3's query and key rows for half-split RoPE, Llama 4's for interleaved pairs as we compute it.
    Raises :class:`CheckpointError` where a tensor's shape is not what the configuration says.
    """
    prefix = _prefix(tensors)
    D, V = config.hidden_size, config.vocab_size
    wanted = Wanted(tensors)
    wanted.same("embed", f"{prefix}model.embed_tokens.weight", (V, D))
    for i in range(config.num_layers):
        layer_recipes(wanted, config, i, f"layers.{i}.", f"{prefix}model.layers.{i}.")
    wanted.same("norm.scale", f"{prefix}model.norm.weight", (D,))
    if not config.tie_word_embeddings:
        wanted.same("head", f"{prefix}lm_head.weight", (V, D))
    if config.vision is not None:
        for key, shape in vision_shapes(config.vision, D).items():
            wanted.same(f"vision.{key}", key, shape)
    return wanted.recipes


def layer_recipes(wanted: Wanted, config: ModelConfig, layer: int, ours: str, theirs: str, *, attention_normed: bool = True) -> None:
    """Add the recipes of a decoder layer's weights; ``attention_normed``: whether it has a norm before its attention."""
    D = config.hidden_size
    if attention_normed:
        wanted.same(f"{ours}attention_norm.scale", f"{theirs}input_layernorm.weight", (D,))
    attention_recipes(wanted, config, f"{ours}attention.", f"{theirs}self_attn.", input_size=D)
    wanted.same(f"{ours}feed_forward_norm.scale", f"{theirs}post_attention_layernorm.weight", (D,))
    _feed_forward(wanted, config, layer, f"{ours}feed_forward.", f"{theirs}{'mlp' if config.architecture == 'llama' else 'feed_forward'}.")


def attention_recipes(wanted: Wanted, config: ModelConfig, ours: str, theirs: str, *, input_size: int) -> None:
    """Add the recipes of the weights of a layer's attention, whose inputs have width ``input_size``."""
    K, h, H, D = config.num_kv_heads, config.head_dim, config.num_heads, config.hidden_size
    halves = config.architecture == "llama"
    wanted.add(
        f"{ours}qkv",
        [(f"{theirs}{x}_proj.weight", (n * h, input_size)) for x, n in (("q", H), ("k", K), ("v", K))],
        lambda parts: fuse_qkv(parts, K, h, halves=halves),
        "q, k, v grouped by KV head" + ("; q, k rows from half-split to interleaved pairs" if halves else ""),
    )
    wanted.reshaped(f"{ours}out", f"{theirs}o_proj.weight", (D, H * h), (D, K, H // K, h))


def _feed_forward(wanted: Wanted, config: ModelConfig, layer: int, ours: str, theirs: str) -> None:
    D, moe = config.hidden_size, config.moe
    if moe is None or not moe.moe_layers[layer]:
        swiglu_recipes(wanted, ours, theirs, D, config.intermediate_size)
        return
    E, F = moe.num_experts, moe.intermediate_size
    wanted.same(f"{ours}router", f"{theirs}router.weight", (E, D))
    swiglu_recipes(wanted, f"{ours}shared.", f"{theirs}shared_expert.", D, F)
    if wanted.has(f"{theirs}experts.gate_up_proj"):
        gate_up, down = f"{theirs}experts.gate_up_proj", f"{theirs}experts.down_proj"
        said = "transposed to [out, in]"
        wanted.add(f"{ours}experts_gate_up", [(gate_up, (E, D, 2 * F))], lambda parts: transposed(parts[0]).reshape(E, 2, F, D), said)
        wanted.add(f"{ours}experts_down", [(down, (E, F, D))], lambda parts: transposed(parts[0]), said)
        return
    # As stored for offline quantisation: one matrix for each expert, [out, in].
    wanted.add(
        f"{ours}experts_gate_up",
        [(f"{theirs}experts.{e}.{x}_proj.weight", (F, D)) for e in range(E) for x in ("gate", "up")],
        lambda parts: np.stack(parts).reshape(E, 2, F, D),
        "experts stacked",
    )
    wanted.add(
        f"{ours}experts_down",
        [(f"{theirs}experts.{e}.down_proj.weight", (D, F)) for e in range(E)],
        np.stack,
        "experts stacked",
    )


def swiglu_recipes(wanted: Wanted, ours: str, theirs: str, D: int, F: int) -> None:
    """Add the recipes of the weights of a dense feed-forward block of width ``F``."""
    wanted.add(f"{ours}gate_up", [(f"{theirs}{x}_proj.weight", (F, D)) for x in ("gate", "up")], stack_gate_up, "gate, up stacked")
    wanted.same(f"{ours}down", f"{theirs}down_proj.weight", (D, F))
