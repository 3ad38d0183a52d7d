"""Export: a checkpoint back to Hugging Face safetensors, bit for bit what a Hugging Face source had."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from l4jax.checkpoints.partial import LOCK, check_destination, unfinished
from l4jax.checkpoints.recipes import halve
from l4jax.checkpoints.store import DTYPES, SOURCE_CONFIG, Checkpoint, is_vision, load_verified, open_checkpoint
from l4jax.config import ModelConfig
from l4jax.config_formats import config_to_hf

_SHARD_BYTES = 5_000_000_000
_SAFETENSORS_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


@dataclasses.dataclass(frozen=True)
class Export:
    """A Hugging Face tensor: its shape, and how it is cut out of one of our weights."""

    weight: str
    shape: tuple[int, ...]
    cut: Callable[[np.ndarray], np.ndarray]


def export(checkpoint_path: str | os.PathLike[str], destination: str | os.PathLike[str]) -> None:
    """Write a checkpoint as a Hugging Face folder: safetensors in shards of 5 GB, ``config.json``, tokenizer files.

    Made in ``DEST.partial`` and renamed at the end. Raises :class:`CheckpointError` if the destination exists, the checkpoint
    is damaged or the disk is full.
    """
    checkpoint, target = open_checkpoint(checkpoint_path), check_destination(destination)
    with unfinished(target, "export") as partial:
        for entry in partial.iterdir():
            if entry.name != LOCK:
                entry.unlink()
        _write_shards(checkpoint, hf_exports(checkpoint), partial)
        for name in checkpoint.text_files:
            if name != SOURCE_CONFIG:
                shutil.copyfile(checkpoint.directory / name, partial / name)
        (partial / "config.json").write_bytes(_config(checkpoint))
        partial.replace(target)
        (target / LOCK).unlink()


def _config(checkpoint: Checkpoint) -> bytes:
    """``config.json``: a Hugging Face source's own to the byte, unless the weights have another dtype than it says."""
    if SOURCE_CONFIG not in checkpoint.text_files:
        return json.dumps(config_to_hf(checkpoint.config, checkpoint.dtype), indent=2).encode() + b"\n"
    original = (checkpoint.directory / SOURCE_CONFIG).read_bytes()
    values = json.loads(original)
    said = [
        (section, key)
        for section in (values, values.get("text_config"), values.get("vision_config"))
        if isinstance(section, dict)
        for key in ("dtype", "torch_dtype")
        if section.get(key) not in (None, checkpoint.dtype)
    ]
    for section, key in said:
        section[key] = checkpoint.dtype
    return json.dumps(values, indent=2).encode() + b"\n" if said else original


def hf_exports(checkpoint: Checkpoint) -> dict[str, Export]:
    """Every tensor of the Hugging Face folder, by its name there; the inverse of ``hf.hf_recipes``."""
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


def _layer(config: ModelConfig, ours: str, theirs: str, layer: int) -> dict[str, Export]:
    D, h, H, K = config.hidden_size, config.head_dim, config.num_heads, config.num_kv_heads
    halves = config.architecture == "llama"
    qkv, moe = f"{ours}attention.qkv", config.moe

    def rows(part: slice) -> Callable[[np.ndarray], np.ndarray]:
        turned = halves and part != slice(-1, None)  # values are not rotated
        return lambda fused: (halve(fused[:, part]) if turned else fused[:, part]).reshape(-1, D)

    exports = {
        f"{theirs}input_layernorm.weight": Export(f"{ours}attention_norm.scale", (D,), _same),
        f"{theirs}self_attn.q_proj.weight": Export(qkv, (H * h, D), rows(slice(None, -2))),
        f"{theirs}self_attn.k_proj.weight": Export(qkv, (K * h, D), rows(slice(-2, -1))),
        f"{theirs}self_attn.v_proj.weight": Export(qkv, (K * h, D), rows(slice(-1, None))),
        f"{theirs}self_attn.o_proj.weight": Export(f"{ours}attention.out", (D, H * h), lambda out: out.reshape(D, -1)),
        f"{theirs}post_attention_layernorm.weight": Export(f"{ours}feed_forward_norm.scale", (D,), _same),
    }
    ours, theirs = f"{ours}feed_forward.", f"{theirs}{'mlp' if halves else 'feed_forward'}."
    if moe is None or not moe.moe_layers[layer]:
        return exports | _swiglu(ours, theirs, D, config.intermediate_size)
    E, F = moe.num_experts, moe.intermediate_size
    return (
        exports
        | _swiglu(f"{ours}shared.", f"{theirs}shared_expert.", D, F)
        | {
            f"{theirs}router.weight": Export(f"{ours}router", (E, D), _same),
            f"{theirs}experts.gate_up_proj": Export(f"{ours}experts_gate_up", (E, D, 2 * F), lambda w: w.reshape(E, D, 2 * F)),
            f"{theirs}experts.down_proj": Export(f"{ours}experts_down", (E, F, D), _same),
        }
    )


def _swiglu(ours: str, theirs: str, D: int, F: int) -> dict[str, Export]:
    return {
        f"{theirs}gate_proj.weight": Export(f"{ours}gate_up", (F, D), lambda w: w[0]),
        f"{theirs}up_proj.weight": Export(f"{ours}gate_up", (F, D), lambda w: w[1]),
        f"{theirs}down_proj.weight": Export(f"{ours}down", (D, F), _same),
    }


def _same(weight: np.ndarray) -> np.ndarray:
    return weight


def _write_shards(checkpoint: Checkpoint, exports: Mapping[str, Export], directory: Path) -> None:
    """One file if all fits into one shard, else shards and an index. Holds one group of weights at a time."""

    def nbytes(key: str) -> int:
        stored = checkpoint.weights[exports[key].weight]
        return int(np.prod(exports[key].shape, dtype=np.int64)) * DTYPES[stored.dtype].itemsize

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
            dtype = _SAFETENSORS_NAMES[checkpoint.weights[exports[key].weight].dtype]
            described[key] = {"dtype": dtype, "shape": list(exports[key].shape), "data_offsets": [offset, offset + nbytes(key)]}
            offset += nbytes(key)
        header = json.dumps({"__metadata__": {"format": "pt"}, **described}).encode()
        header += b" " * (-len(header) % 8)  # the data begins aligned
        with (directory / name).open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            for key in keys:
                file.write(np.ascontiguousarray(exports[key].cut(arrays[exports[key].weight])).view(np.uint8).data)
    if len(shards) > 1:
        weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        index = {"metadata": {"total_size": sum(map(nbytes, exports))}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


class _Groups:
    """Weights by name; the group last asked for is in memory."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._group = ""
        self._arrays: dict[str, Any] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        group = self._checkpoint.weights[name].group
        if group != self._group:
            self._arrays = {}
            weights = {n: w for n, w in self._checkpoint.weights.items() if w.group == group}
            self._arrays, self._group = load_verified(self._checkpoint.directory / "weights" / group, weights), group
        array: np.ndarray = self._arrays[name]
        return array
