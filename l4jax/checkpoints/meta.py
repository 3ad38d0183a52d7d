"""Meta's own folders: ``params.json`` and ``consolidated.*.pth``, one file for each model-parallel shard.

Shards are joined by shape: a tensor that is whole in every shard is replicated (and must be the same in all), a tensor that is
smaller in one dimension is cut along it. Three kinds need more: Llama 4's query-key-value matrix and its gate-up matrix are
fused within each shard, and in the experts' output matrices one dimension holds both the experts and the dimension that is cut.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from l4jax.checkpoints.files import LICENCES, copy_files, not_read
from l4jax.checkpoints.recipes import fuse_qkv
from l4jax.checkpoints.source import CheckpointError, Recipe, TensorInfo
from l4jax.checkpoints.torch_zip import TorchFile
from l4jax.checkpoints.vision import meta_name, vision_shapes
from l4jax.config import ModelConfig
from l4jax.config_formats import config_from_meta
from l4jax.files import read_json
from sharding.words import counted

_IGNORED = re.compile(r".*(_extra_state|rope\.freqs|global_gate_stats_3E|running_gate_stats_3E|expert_activation_DE)")


class MetaSource:
    """An opened Meta folder (see :class:`l4jax.checkpoints.source.Source`). Tensors are named ``SHARD:KEY``."""

    format = "meta"

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        paths = sorted(directory.glob("consolidated.*.pth"))
        numbers = [path.name.split(".")[1] for path in paths]
        if numbers != [f"{i:02}" for i in range(len(paths))]:
            raise CheckpointError(
                f"{directory} has the shards {', '.join(numbers)}; expected 00 to the last without a gap: fetch what is missing"
            )
        self._files = [TorchFile(path) for path in paths]
        self.fingerprint: Mapping[str, list[int]] = {file.path.name: file.fingerprint for file in self._files}
        self.notes = not_read(directory, self.fingerprint)
        self.tensors: Mapping[str, TensorInfo] = {
            f"{shard}:{key}": tensor.info for shard, file in enumerate(self._files) for key, tensor in file.tensors.items()
        }
        self.ignored = frozenset(key for key in self.tensors if _IGNORED.fullmatch(key))
        for file in self._files:
            strange = sorted(key for key in file.others if not _IGNORED.fullmatch(key))
            if strange:
                raise CheckpointError(f"{file.path}: {strange[0]} is not a tensor; expected a dictionary of tensors")
        self.config: ModelConfig = self._read_config()
        self.recipes: Mapping[str, Recipe] = _Recipes(self.config, self.tensors, len(self._files)).recipes

    def read(self, key: str) -> np.ndarray:
        """Return the tensor."""
        shard, _, name = key.partition(":")
        return self._files[int(shard)].read(name)

    def write_tokenizer(self, directory: Path) -> list[str]:
        """Copy the tokenizer."""
        return copy_files(self._directory, ("tokenizer.model",), directory)

    def write_other_files(self, directory: Path) -> list[str]:
        """Copy the licence files."""
        return copy_files(self._directory, LICENCES, directory)

    def _read_config(self) -> ModelConfig:
        path = self._directory / "params.json"
        if not path.exists():
            raise CheckpointError(f"{self._directory} has no params.json; expected it beside the consolidated.*.pth files")
        params = read_json(path)
        shapes = [
            self.tensors[f"{i}:tok_embeddings.weight"].shape
            for i in range(len(self._files))
            if f"{i}:tok_embeddings.weight" in self.tensors
        ]
        if len(shapes) != len(self._files) or any(len(shape) != 2 for shape in shapes):
            raise CheckpointError(f"{self._directory} lacks tok_embeddings.weight in a shard; expected a language model")
        # Llama 3 and 4 cut the table by rows; a table cut by columns has all rows in each shard.
        by_columns = shapes[0][1] != params.get("dim")
        rows = shapes[0][0] if by_columns else sum(shape[0] for shape in shapes)
        return config_from_meta(params, vocab_size=rows, tie_word_embeddings="0:output.weight" not in self.tensors)


class _Recipes:
    """Builds the recipes of one folder."""

    def __init__(self, config: ModelConfig, tensors: Mapping[str, TensorInfo], shards: int) -> None:
        self._tensors = tensors
        self._shards = shards
        self.recipes: dict[str, Recipe] = {}
        V, D = config.vocab_size, config.hidden_size
        self._whole("embed", "tok_embeddings.weight", (V, D))
        for i in range(config.num_layers):
            self._layer(config, i, f"layers.{i}.")
        self._whole("norm.scale", "norm.weight", (D,))
        if not config.tie_word_embeddings:
            self._whole("head", "output.weight", (V, D))
        if config.vision is not None:
            for name, shape in vision_shapes(config.vision, D).items():
                self._whole(f"vision.{name}", meta_name(name), shape)

    def _layer(self, config: ModelConfig, layer: int, at: str) -> None:
        D, F, h, H, K = config.hidden_size, config.intermediate_size, config.head_dim, config.num_heads, config.num_kv_heads
        self._whole(f"{at}attention.out", f"{at}attention.wo.weight", (D, H * h), (D, K, H // K, h))
        moe = config.moe
        if moe is not None and moe.moe_layers[layer]:
            self._experts(f"{at}feed_forward.", D, moe.num_experts, moe.intermediate_size)
        elif config.architecture == "llama4":
            self._fused_gate_up(f"{at}feed_forward.gate_up", f"{at}feed_forward.mlp.fc1_weight", F, D)
            self._whole(f"{at}feed_forward.down", f"{at}feed_forward.mlp.fc2_weight", (D, F))
        else:
            self._gate_up(f"{at}feed_forward.gate_up", f"{at}feed_forward.w1.weight", f"{at}feed_forward.w3.weight", F, D)
            self._whole(f"{at}feed_forward.down", f"{at}feed_forward.w2.weight", (D, F))
        if config.architecture == "llama4":
            self._fused_qkv(f"{at}attention.qkv", f"{at}attention.wqkv.weight", config)
            norms = [f"{at}feed_forward.norm.weight", f"{at}feed_forward.mlp.layer_norm_weight"]
            present = [key for key in norms if f"0:{key}" in self._tensors] or norms
            self._whole(f"{at}attention_norm.scale", f"{at}attention.wqkv.layer_norm_weight", (D,))
            self._whole(f"{at}feed_forward_norm.scale", present[0], (D,))
        else:
            self._qkv(f"{at}attention.qkv", [f"{at}attention.{x}.weight" for x in ("wq", "wk", "wv")], config)
            self._whole(f"{at}attention_norm.scale", f"{at}attention_norm.weight", (D,))
            self._whole(f"{at}feed_forward_norm.scale", f"{at}ffn_norm.weight", (D,))

    def _experts(self, at: str, D: int, E: int, F: int) -> None:
        gate, up, out = (f"{at}experts.moe_{x}" for x in ("w_in_eD_F", "w_swiglu_eD_F", "w_out_eF_D"))
        self._whole(f"{at}router", f"{at}router_DE", (D, E), turn=lambda w: w.T, said="transposed")
        self._gate_up(f"{at}shared.gate_up", f"{at}w_in_shared_FD.weight", f"{at}w_swiglu_FD.weight", F, D)
        self._whole(f"{at}shared.down", f"{at}w_out_shared_DF.weight", (D, F))

        def assemble_gate_up(parts: Sequence[np.ndarray]) -> np.ndarray:
            n = self._shards
            joined = np.empty((E, 2, F, D), np.result_type(*parts))
            for which in range(2):
                shares = [part.reshape(E, D, -1).swapaxes(1, 2) for part in parts[which * n : (which + 1) * n]]
                np.concatenate(shares, axis=1, out=joined[:, which])
            return joined

        self._add(
            f"{at}experts_gate_up",
            [(gate, (E * D, F // self._shards)), (up, (E * D, F // self._shards))],
            assemble_gate_up,
            "gate, up stacked, transposed to [out, in]",
        )
        self._add(
            f"{at}experts_down",
            [(out, (E * F // self._shards, D))],
            lambda parts: np.concatenate([part.reshape(E, -1, D).swapaxes(1, 2) for part in parts], axis=2),
            "each expert's columns joined, transposed to [out, in]",
        )

    def _fused_qkv(self, name: str, key: str, config: ModelConfig) -> None:
        """Add a matrix with rows [q | k | v] in each shard. Where there are more shards than KV heads, neighbours share one."""
        n, D, h, H, K = self._shards, config.hidden_size, config.head_dim, config.num_heads, config.num_kv_heads
        q, kv = H // n * h, max(K // n, 1) * h

        def assemble(parts: Sequence[np.ndarray]) -> np.ndarray:
            cuts = [np.split(part, [q, q + kv]) for part in parts]
            return fuse_qkv(
                [_joined_heads([cut[i] for cut in cuts], rows, key) for i, rows in enumerate((H * h, K * h, K * h))], K, h, halves=False
            )

        self._add(name, [(key, (q + 2 * kv, D))], assemble, "q, k, v grouped by KV head")

    def _qkv(self, name: str, keys: Sequence[str], config: ModelConfig) -> None:
        n, D, h, H, K = self._shards, config.hidden_size, config.head_dim, config.num_heads, config.num_kv_heads
        rows = (H * h, K * h, K * h)

        def assemble(parts: Sequence[np.ndarray]) -> np.ndarray:
            return fuse_qkv([_joined_heads(parts[i * n : (i + 1) * n], rows[i], keys[i]) for i in range(3)], K, h, halves=False)

        shapes = ((H // n * h, D), (max(K // n, 1) * h, D), (max(K // n, 1) * h, D))
        self._add(name, list(zip(keys, shapes, strict=True)), assemble, "q, k, v grouped by KV head")

    def _fused_gate_up(self, name: str, key: str, F: int, D: int) -> None:
        """Add a matrix with rows [gate | up] in each shard."""
        self._add(
            name,
            [(key, (2 * F // self._shards, D))],
            lambda parts: np.concatenate([part.reshape(2, -1, D) for part in parts], axis=1),
            "gate, up stacked",
        )

    def _gate_up(self, name: str, gate: str, up: str, F: int, D: int) -> None:
        n = self._shards

        def assemble(parts: Sequence[np.ndarray]) -> np.ndarray:
            joined = np.empty((2, F, D), np.result_type(*parts))
            for which in range(2):
                np.concatenate(parts[which * n : (which + 1) * n], out=joined[which])
            return joined

        self._add(
            name,
            [(gate, (F // n, D)), (up, (F // n, D))],
            assemble,
            "gate, up stacked",
        )

    def _whole(
        self,
        name: str,
        key: str,
        shape: tuple[int, ...],
        ours: tuple[int, ...] | None = None,
        turn: Callable[[np.ndarray], np.ndarray] = lambda w: w,
        said: str = "as it is",
    ) -> None:
        """Add a weight that is one tensor of this shape, replicated or cut along one dimension."""
        part = self._shape(0, key)
        cut = [i for i, (a, b) in enumerate(zip(part, shape, strict=False)) if a != b]
        if len(part) != len(shape) or len(cut) > 1 or (cut and part[cut[0]] * self._shards != shape[cut[0]]):
            raise CheckpointError(
                f"tensor {key} has shape {part} in each of {counted(self._shards, 'shard')}; params.json says {shape} in all; "
                "they do not match"
            )

        def assemble(parts: Sequence[np.ndarray]) -> np.ndarray:
            joined = np.concatenate(parts, axis=cut[0]) if cut else _replicated(parts, key)
            return turn(joined.reshape(ours or shape))

        self._add(name, [(key, part)], assemble, said)

    def _add(
        self, name: str, parts: Sequence[tuple[str, tuple[int, ...]]], assemble: Callable[[Sequence[np.ndarray]], np.ndarray], said: str
    ) -> None:
        """Add a weight made of all shards of some tensors: the first tensor's shards, then the second's, ..."""
        for key, shape in parts:
            for shard in range(self._shards):
                found = self._shape(shard, key)
                if found != shape:
                    raise CheckpointError(
                        f"tensor {key} of shard {shard} has shape {found}; params.json says {shape}; they are of different models"
                    )
        self.recipes[name] = Recipe(tuple(f"{shard}:{key}" for key, _ in parts for shard in range(self._shards)), assemble, said)

    def _shape(self, shard: int, key: str) -> tuple[int, ...]:
        if f"{shard}:{key}" not in self._tensors:
            raise CheckpointError(f"shard {shard} has no tensor {key}, which params.json asks for; they are of different models")
        return self._tensors[f"{shard}:{key}"].shape


def _replicated(parts: Sequence[np.ndarray], key: str) -> np.ndarray:
    for shard, part in enumerate(parts[1:], start=1):
        if not np.array_equal(part, parts[0]):
            raise CheckpointError(
                f"tensor {key} differs between shard 0 and shard {shard}, though each has all of it; fetch the shards again"
            )
    return parts[0]


def _joined_heads(parts: Sequence[np.ndarray], rows: int, key: str) -> np.ndarray:
    """Join the rows of all shards. Where there are more shards than KV heads, neighbours hold the same one."""
    copies = sum(len(part) for part in parts) // rows
    return np.concatenate([_replicated(parts[i : i + copies], key) for i in range(0, len(parts), copies)])
