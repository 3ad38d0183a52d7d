"""Hugging Face folders: ``config.json`` and safetensors, in one file or in shards with an index."""

from __future__ import annotations

import json
import math
import operator
import shutil
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from l4jax.checkpoints.recipes import Wanted, fuse_qkv, stack_gate_up
from l4jax.checkpoints.source import LICENCES, CheckpointError, Recipe, TensorInfo, copy_files, read_json
from l4jax.checkpoints.store import SOURCE_CONFIG
from l4jax.checkpoints.vision import vision_shapes
from l4jax.config import ModelConfig
from l4jax.config_formats import config_from_hf

_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_TABLES = {"I64": np.dtype(np.int64), "I32": np.dtype(np.int32), "BOOL": np.dtype(np.bool_)}  # of a drafter's vocabulary
_COPIED = (
    *("tokenizer*", "special_tokens_map.json", "chat_template*", "generation_config.json"),
    *("preprocessor_config.json", "processor_config.json"),
    *LICENCES,
)


class HFSource:
    """An opened Hugging Face folder (see :class:`l4jax.checkpoints.source.Source`)."""

    format = "hf"

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        generation = directory / "generation_config.json"
        self.config: ModelConfig = config_from_hf(
            read_json(directory / "config.json"), read_json(generation) if generation.exists() else None
        )
        self._files = SafetensorsFiles(directory)
        self.fingerprint: Mapping[str, list[int]] = self._files.fingerprint
        self.tensors: Mapping[str, TensorInfo] = self._files.tensors
        self.ignored = frozenset(key for key in self.tensors if key.endswith("rotary_emb.inv_freq"))
        if self.config.tie_word_embeddings:
            # Some writers store the tied head a second time.
            self.ignored |= {key for key in self.tensors if key.endswith("lm_head.weight")}
        self.recipes: Mapping[str, Recipe] = hf_recipes(self.config, self.tensors)

    def read(self, key: str) -> np.ndarray:
        """The tensor, memory-mapped."""
        return self._files.read(key)

    def write_text_files(self, directory: Path) -> list[str]:
        """Copy tokenizer, chat template, generation defaults and licence files."""
        names = copy_files(self._directory, _COPIED, directory)
        templates = "additional_chat_templates"
        if (self._directory / templates).is_dir():
            (directory / templates).mkdir()
            names += [f"{templates}/{name}" for name in copy_files(self._directory / templates, ("*.jinja",), directory / templates)]
        shutil.copyfile(self._directory / "config.json", directory / SOURCE_CONFIG)
        return [*names, SOURCE_CONFIG]


class SafetensorsFiles:
    """The tensors of a folder's safetensors files."""

    def __init__(self, directory: Path) -> None:
        self._entries: dict[str, _Entry] = {}
        files = _weight_files(directory)
        for file, expected in files.items():
            entries = _read_header(file)
            if expected is not None and expected != entries.keys():
                key = min(expected ^ entries.keys())
                said = "lacks" if key in expected else "also has"
                where = "puts there" if key in expected else "does not put there"
                raise CheckpointError(f"{file} {said} tensor {key}, which the index {where}; fetch the index and the shard again")
            self._entries |= entries
        self.fingerprint: Mapping[str, list[int]] = {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}
        self.tensors: Mapping[str, TensorInfo] = {key: entry.info for key, entry in self._entries.items()}

    def read(self, key: str) -> np.ndarray:
        """The tensor, memory-mapped."""
        return self._entries[key].map()


class _Entry:
    """Where a tensor's bytes lie."""

    def __init__(self, file: Path, offset: int, info: TensorInfo) -> None:
        self._file = file
        self._offset = offset
        self.info = info

    @property
    def end(self) -> int:
        """Where the tensor's bytes end in the file."""
        return self._offset + math.prod(self.info.shape) * self.info.dtype.itemsize

    def map(self) -> np.ndarray:
        return np.memmap(self._file, self.info.dtype, "r", self._offset, self.info.shape or (1,)).reshape(self.info.shape)


def hf_recipes(config: ModelConfig, tensors: Mapping[str, TensorInfo]) -> dict[str, Recipe]:
    """How each of our weights is made of the folder's tensors.

    Hugging Face stores Llama 3's query and key rows for half-split RoPE, Llama 4's for interleaved pairs as we compute it.
    Raises :class:`CheckpointError` where a tensor's shape is not what the configuration says.
    """
    prefix = "language_model." if any(key.startswith("language_model.") for key in tensors) else ""
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
    """How a decoder layer is made; ``attention_normed``: there is a norm before its attention."""
    D = config.hidden_size
    if attention_normed:
        wanted.same(f"{ours}attention_norm.scale", f"{theirs}input_layernorm.weight", (D,))
    attention_recipes(wanted, config, f"{ours}attention.", f"{theirs}self_attn.", input_size=D)
    wanted.same(f"{ours}feed_forward_norm.scale", f"{theirs}post_attention_layernorm.weight", (D,))
    _feed_forward(wanted, config, layer, f"{ours}feed_forward.", f"{theirs}{'mlp' if config.architecture == 'llama' else 'feed_forward'}.")


def attention_recipes(wanted: Wanted, config: ModelConfig, ours: str, theirs: str, *, input_size: int) -> None:
    """How a layer's attention is made, that projects from this width."""
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
        wanted.reshaped(f"{ours}experts_gate_up", f"{theirs}experts.gate_up_proj", (E, D, 2 * F), (E, D, 2, F))
        wanted.same(f"{ours}experts_down", f"{theirs}experts.down_proj", (E, F, D))
        return
    # Packaged for offline quantisation: one matrix an expert, [out, in].
    wanted.add(
        f"{ours}experts_gate_up",
        [(f"{theirs}experts.{e}.{x}_proj.weight", (F, D)) for e in range(E) for x in ("gate", "up")],
        _stack_transposed_gate_up,
        "experts stacked, transposed to [in, out]",
    )
    wanted.add(
        f"{ours}experts_down",
        [(f"{theirs}experts.{e}.down_proj.weight", (D, F)) for e in range(E)],
        lambda parts: np.stack([part.T for part in parts]),
        "experts stacked, transposed to [in, out]",
    )


def swiglu_recipes(wanted: Wanted, ours: str, theirs: str, D: int, F: int) -> None:
    """How a dense feed-forward block of width ``F`` is made."""
    wanted.add(f"{ours}gate_up", [(f"{theirs}{x}_proj.weight", (F, D)) for x in ("gate", "up")], stack_gate_up, "gate, up stacked")
    wanted.same(f"{ours}down", f"{theirs}down_proj.weight", (D, F))


def _stack_transposed_gate_up(parts: Sequence[np.ndarray]) -> np.ndarray:
    """[E, D, 2, F] of gate and up [F, D] of each expert in turn."""
    F, D = parts[0].shape
    stacked = np.empty((len(parts) // 2, D, 2, F), np.result_type(*parts))
    for i, part in enumerate(parts):
        stacked[i // 2, :, i % 2] = part.T
    return stacked


def _weight_files(directory: Path) -> dict[Path, set[str] | None]:
    """The safetensors files of a folder, and the tensors that the index puts in each (None without an index)."""
    index, single = directory / "model.safetensors.index.json", directory / "model.safetensors"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(f"{index} has no weight_map from tensors to files; fetch it again")
        files: dict[Path, set[str]] = {}
        for key, name in weight_map.items():
            files.setdefault(directory / name, set()).add(key)
        absent = sorted(file.name for file in files if not file.exists())
        if absent or not files:
            raise CheckpointError(
                f"{directory} lacks {absent[0] if absent else 'shards'}, which {index.name} names; fetch the missing shard"
            )
        return {**files}
    if single.exists():
        return {single: None}
    raise CheckpointError(f"{directory} has no model.safetensors and no {index.name}; expected one of them beside config.json")


def _read_header(file: Path) -> dict[str, _Entry]:
    """Every tensor of a safetensors file; the values are not read."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        header = stream.read(length) if 8 + length <= size else b""
    try:
        described: dict[str, dict[str, Any]] = json.loads(header)
        entries = {key: _entry(file, 8 + length, key, tensor) for key, tensor in described.items() if key != "__metadata__"}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file} is truncated or no safetensors file: its header cannot be read; fetch it again") from error
    end = max((entry.end for entry in entries.values()), default=0)
    if end > size:
        raise CheckpointError(f"{file} is truncated: it has {size} bytes and its tensors end at {end}; fetch it again")
    return entries


def _entry(file: Path, data: int, key: str, tensor: Mapping[str, Any]) -> _Entry:
    """A tensor as the header describes it; ``data`` is where the values begin."""
    name, shape, (begin, end) = tensor["dtype"], tuple(map(operator.index, tensor["shape"])), tensor["data_offsets"]
    known = {**_DTYPES, **_TABLES}
    if name not in known:
        raise CheckpointError(f"{file.name}: tensor {key} has dtype {name}; expected {', '.join(_DTYPES)}")
    if min((begin, *shape)) < 0 or end - begin != math.prod(shape) * known[name].itemsize:
        raise CheckpointError(
            f"{file.name}: tensor {key} has {end - begin} bytes; its shape and dtype need another number; fetch the file again"
        )
    return _Entry(file, data + begin, TensorInfo(shape, known[name]))
