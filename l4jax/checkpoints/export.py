"""Export: a checkpoint back to Hugging Face safetensors, bit for bit as a Hugging Face source had it; drafters as published heads."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from l4jax.checkpoints.manifest import MAKE_AGAIN
from l4jax.checkpoints.partial import LOCK, check_destination, unfinished
from l4jax.checkpoints.recipes import halve, transposed
from l4jax.checkpoints.source import CheckpointError
from l4jax.checkpoints.store import (
    SOURCE_CONFIG,
    Checkpoint,
    DrafterCheckpoint,
    Stored,
    is_vision,
    open_checkpoint,
    open_drafter,
)
from l4jax.config import Eagle1Config, ModelConfig
from l4jax.config_formats import config_to_hf
from l4jax.config_formats.eagle_write import config_to_eagle
from l4jax.files import read_bytes, read_json
from l4jax.interrupts import kept_interrupts

Format = Literal["hf", "eagle", "speculators"]

_SHARD_BYTES = 5_000_000_000
_SAFETENSORS_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_SAFETENSORS_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "I64": 8, "BOOL": 1}


@dataclasses.dataclass(frozen=True)
class Export:
    """A Hugging Face tensor: its shape, how to cut it out of one of our weights, and its dtype in the file if that differs."""

    weight: str
    shape: tuple[int, ...]
    cut: Callable[[np.ndarray], np.ndarray]
    dtype: str | None = None


def export(
    checkpoint_path: str | os.PathLike[str], destination: str | os.PathLike[str], *, to: Format = "hf", without_head: bool = False
) -> None:
    """Write a checkpoint as a Hugging Face folder: safetensors in shards of 5 GB, ``config.json``, tokenizer files.

    ``to``: "hf" for a model; for a drafter "eagle", as SafeAILab's code reads it, or "speculators". ``without_head``: leave out a
    drafter's output head that is its target's; ``convert`` fills it in, other readers need it. Written to ``DEST.partial`` and renamed at
    the end. Raises :class:`CheckpointError` if the destination exists or cannot be written, the checkpoint is damaged or the disk is full;
    KeyboardInterrupt for every Ctrl-C.
    """
    checkpoint = open_checkpoint(checkpoint_path) if to == "hf" else open_drafter(checkpoint_path)
    if without_head and not (isinstance(checkpoint, DrafterCheckpoint) and checkpoint.config.target_head):
        raise CheckpointError(
            f"{checkpoint.directory} is not a drafter with its target's output head (train-drafter --target-head makes those); "
            "leave out --without-head"
        )
    target = check_destination(destination)
    if isinstance(checkpoint, DrafterCheckpoint):
        config = json.dumps(config_to_eagle(checkpoint.config, checkpoint.dtype, to), indent=2).encode() + b"\n"
        exports = eagle_exports(checkpoint, to)
        if without_head:
            del exports["lm_head.weight"]
    else:
        config, exports = _config(checkpoint), hf_exports(checkpoint)
    texts = {name: read_bytes(checkpoint.directory / name, MAKE_AGAIN) for name in checkpoint.text_files if name != SOURCE_CONFIG}
    texts["config.json"] = config
    with unfinished(target, "export") as partial, kept_interrupts() as check_interrupts:
        for entry in partial.iterdir():
            if entry.name != LOCK:
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        _write_shards(checkpoint, exports, partial, check_interrupts)
        for name, content in texts.items():
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).write_bytes(content)
        check_interrupts()
        partial.replace(target)
        (target / LOCK).unlink()


def _config(checkpoint: Checkpoint) -> bytes:
    """``config.json``: a Hugging Face source's own to the byte, unless the weights have another dtype or head than it says."""
    if SOURCE_CONFIG not in checkpoint.text_files:
        return json.dumps(config_to_hf(checkpoint.config, checkpoint.dtype), indent=2).encode() + b"\n"
    path = checkpoint.directory / SOURCE_CONFIG
    values, as_written = read_json(path, MAKE_AGAIN), read_json(path, MAKE_AGAIN)
    for section in (values, values.get("text_config"), values.get("vision_config")):
        if not isinstance(section, dict):
            continue
        for key in ("dtype", "torch_dtype"):
            if section.get(key) is not None:
                section[key] = checkpoint.dtype
        if "tie_word_embeddings" in section:
            section["tie_word_embeddings"] = checkpoint.config.tie_word_embeddings
    return read_bytes(path, MAKE_AGAIN) if values == as_written else json.dumps(values, indent=2).encode() + b"\n"


def hf_exports(checkpoint: Checkpoint) -> dict[str, Export]:
    """Return every tensor of the Hugging Face folder, by its name there; the inverse of ``hf.hf_recipes``."""
    config = checkpoint.config
    prefix = "" if config.vision is None else "language_model."
    D, V = config.hidden_size, config.vocab_size
    exports = {f"{prefix}model.embed_tokens.weight": Export("embed", (V, D), _same)}
    for i in range(config.num_layers):
        exports |= _layer(config, f"layers.{i}.", f"{prefix}model.layers.{i}.", i)
    exports[f"{prefix}model.norm.weight"] = Export("norm.scale", (D,), _same)
    if not config.tie_word_embeddings:
        exports[f"{prefix}lm_head.weight"] = Export("head", (V, D), _same)
    vision = {name: weight for name, weight in checkpoint.weights.items() if is_vision(name)}
    return exports | {name.removeprefix("vision."): Export(name, weight.shape, _same) for name, weight in vision.items()}


def _layer(config: ModelConfig, ours: str, theirs: str, layer: int, *, attention_normed: bool = True) -> dict[str, Export]:
    D, moe = config.hidden_size, config.moe
    exports = {f"{theirs}input_layernorm.weight": Export(f"{ours}attention_norm.scale", (D,), _same)} if attention_normed else {}
    exports |= _attention(config, f"{ours}attention.", f"{theirs}self_attn.", D)
    exports[f"{theirs}post_attention_layernorm.weight"] = Export(f"{ours}feed_forward_norm.scale", (D,), _same)
    ours, theirs = f"{ours}feed_forward.", f"{theirs}{'mlp' if config.architecture == 'llama' else 'feed_forward'}."
    if moe is None or not moe.moe_layers[layer]:
        return exports | _swiglu(ours, theirs, D, config.intermediate_size)
    E, F = moe.num_experts, moe.intermediate_size
    return (
        exports
        | _swiglu(f"{ours}shared.", f"{theirs}shared_expert.", D, F)
        | {
            f"{theirs}router.weight": Export(f"{ours}router", (E, D), _same),
            f"{theirs}experts.gate_up_proj": Export(f"{ours}experts_gate_up", (E, D, 2 * F), lambda w: transposed(w.reshape(E, 2 * F, D))),
            f"{theirs}experts.down_proj": Export(f"{ours}experts_down", (E, F, D), transposed),
        }
    )


def _attention(config: ModelConfig, ours: str, theirs: str, input_size: int) -> dict[str, Export]:
    D, h, H, K = config.hidden_size, config.head_dim, config.num_heads, config.num_kv_heads
    halves = config.architecture == "llama"

    def rows(part: slice) -> Callable[[np.ndarray], np.ndarray]:
        halved = halves and part != slice(-1, None)  # RoPE does not rotate values
        return lambda fused: (halve(fused[:, part]) if halved else fused[:, part]).reshape(-1, input_size)

    return {
        f"{theirs}q_proj.weight": Export(f"{ours}qkv", (H * h, input_size), rows(slice(None, -2))),
        f"{theirs}k_proj.weight": Export(f"{ours}qkv", (K * h, input_size), rows(slice(-2, -1))),
        f"{theirs}v_proj.weight": Export(f"{ours}qkv", (K * h, input_size), rows(slice(-1, None))),
        f"{theirs}o_proj.weight": Export(f"{ours}out", (D, H * h), lambda out: out.reshape(D, -1)),
    }


def _swiglu(ours: str, theirs: str, D: int, F: int) -> dict[str, Export]:
    return {
        f"{theirs}gate_proj.weight": Export(f"{ours}gate_up", (F, D), lambda w: w[0]),
        f"{theirs}up_proj.weight": Export(f"{ours}gate_up", (F, D), lambda w: w[1]),
        f"{theirs}down_proj.weight": Export(f"{ours}down", (D, F), _same),
    }


def eagle_exports(checkpoint: DrafterCheckpoint, to: Format) -> dict[str, Export]:
    """Return every tensor of a published head, by its name there; the inverse of ``eagle.EagleSource``."""
    config, speculators = checkpoint.config, to == "speculators"
    decoder = config.decoder
    D, V, width = decoder.hidden_size, config.draft_vocab_size, config.target_hidden_size
    exports: dict[str, Export] = {}

    def same(key: str, weight: str) -> None:
        exports[key] = Export(weight, checkpoint.weights[weight].shape, _same)

    if config.own_embedding:
        same("embed_tokens.weight", "embed")
    if isinstance(config, Eagle1Config):
        fuse = "fusion_fc" if speculators else "fc"
        same(f"{fuse}.weight", "fuse")
        if config.fuse_bias:
            same(f"{fuse}.bias", "fuse_bias")
        for i in range(decoder.num_layers):
            theirs = "transformer." if speculators else f"layers.{i}."
            exports |= _layer(decoder, f"layers.{i}.", theirs, i, attention_normed=i > 0 or config.first_layer_normed)
        if config.final_normed:
            same("norm.weight", "norm.scale")
        return exports
    theirs = "layers.0." if speculators else "midlayer."
    same("fc.weight", "fuse")
    if config.norm_before_fuse:
        same("input_norm.weight", "fuse_norm.scale")
    for i in range(len(config.aux_layers) if config.norm_each_aux else 0):
        exports[f"fc_norm.{i}.weight"] = Export(f"aux_norms.{i}.scale", (width,), _same)
    same(f"{theirs}input_layernorm.weight", "layer.embedding_norm.scale")
    same(f"{theirs}hidden_norm.weight", "layer.hidden_norm.scale")
    exports |= _attention(decoder, "layer.attention.", f"{theirs}self_attn.", 2 * D)
    same(f"{theirs}post_attention_layernorm.weight", "layer.feed_forward_norm.scale")
    exports |= _swiglu("layer.feed_forward.", f"{theirs}mlp.", D, decoder.intermediate_size)
    same("norm.weight", "norm.scale")
    same("lm_head.weight", "head")
    exports["d2t"] = Export("token_ids", (V,), lambda ids: ids.astype(np.int64) - np.arange(V), "I64")
    exports["t2d"] = Export("token_ids", (decoder.vocab_size,), lambda ids: np.isin(np.arange(decoder.vocab_size), ids), "BOOL")
    return exports


def _same(weight: np.ndarray) -> np.ndarray:
    return weight


def _write_shards(checkpoint: Stored, exports: Mapping[str, Export], directory: Path, check_interrupts: Callable[[], None]) -> None:
    """Write one file if everything fits into one shard, else shards and an index. Holds one group of weights at a time."""

    def dtype(key: str) -> str:
        return exports[key].dtype or _SAFETENSORS_NAMES[checkpoint.weights[exports[key].weight].dtype]

    def nbytes(key: str) -> int:
        return math.prod(exports[key].shape) * _SAFETENSORS_BYTES[dtype(key)]

    shards: list[list[str]] = [[]]
    size = 0
    order = {name: position for position, name in enumerate(checkpoint.weights)}
    for key in sorted(exports, key=lambda key: order[exports[key].weight]):
        if shards[-1] and size + nbytes(key) > _SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += nbytes(key)
    names = ["model.safetensors"] if len(shards) == 1 else [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    arrays = _Groups(checkpoint)
    for name, keys in zip(names, shards, strict=True):
        described, offset = {}, 0
        for key in keys:
            described[key] = {"dtype": dtype(key), "shape": list(exports[key].shape), "data_offsets": [offset, offset + nbytes(key)]}
            offset += nbytes(key)
        header = json.dumps({"__metadata__": {"format": "pt"}, **described}).encode()
        header += b" " * (-len(header) % 8)  # aligns the data
        with (directory / name).open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            for key in keys:
                check_interrupts()
                file.write(np.ascontiguousarray(exports[key].cut(arrays[exports[key].weight])).view(np.uint8).data)
    if len(shards) > 1:
        weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        index = {"metadata": {"total_size": sum(map(nbytes, exports))}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


class _Groups:
    """Weights by name. Keeps the group of the last one in memory."""

    def __init__(self, checkpoint: Stored) -> None:
        self._checkpoint = checkpoint
        self._group = ""
        self._arrays: dict[str, Any] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        group = self._checkpoint.weights[name].group
        if group != self._group:
            self._arrays = {}
            self._arrays, self._group = self._checkpoint.read_group(group), group
        array: np.ndarray = self._arrays[name]
        return array
