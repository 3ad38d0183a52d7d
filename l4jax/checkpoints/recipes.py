"""What the formats' recipes share: shapes checked against the configuration, and the fused layouts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from l4jax.checkpoints.source import CheckpointError, Recipe, TensorInfo

Assemble = Callable[[Sequence[np.ndarray]], np.ndarray]


class Wanted:
    """Collects recipes. Every source tensor in a recipe must exist and have the shape that the configuration implies."""

    def __init__(self, tensors: Mapping[str, TensorInfo]) -> None:
        self._tensors = tensors
        self.recipes: dict[str, Recipe] = {}

    def has(self, key: str) -> bool:
        """Whether the source has this tensor."""
        return key in self._tensors

    def add(self, name: str, parts: Sequence[tuple[str, tuple[int, ...]]], assemble: Assemble, description: str) -> None:
        """Add the recipe of weight ``name``: ``assemble`` makes it of the tensors ``parts``, given as (key, expected shape)."""
        for key, shape in parts:
            if key not in self._tensors:
                raise CheckpointError(f"the checkpoint has no tensor {key}, which the configuration asks for; they are of different models")
            found = self._tensors[key].shape
            if found != shape:
                raise CheckpointError(f"tensor {key} has shape {found}; the configuration says {shape}; they are of different models")
        self.recipes[name] = Recipe(tuple(key for key, _ in parts), assemble, description)

    def same(self, name: str, key: str, shape: tuple[int, ...]) -> None:
        """Weight ``name`` is tensor ``key`` as it is."""
        self.add(name, [(key, shape)], lambda parts: parts[0], "as it is")

    def reshaped(self, name: str, key: str, shape: tuple[int, ...], ours: tuple[int, ...]) -> None:
        """Weight ``name`` is tensor ``key`` with its axes split."""
        self.add(name, [(key, shape)], lambda parts: parts[0].reshape(ours), f"as {list(ours)}")


def fuse_qkv(parts: Sequence[np.ndarray], num_kv_heads: int, head_dim: int, *, halves: bool) -> np.ndarray:
    """Return [K, G + 2, h, D] from q [H h, D], k and v [K h, D]; ``halves``: q and k rows are in half-split RoPE order."""
    D = parts[0].shape[1]
    q, k, v = (part.reshape(num_kv_heads, -1, head_dim, D) for part in parts)
    fused = np.empty((num_kv_heads, q.shape[1] + 2, head_dim, D), np.result_type(*parts))
    fused[:, :-2] = interleave(q) if halves else q
    fused[:, -2:-1] = interleave(k) if halves else k
    fused[:, -1:] = v
    return fused


def interleave(rows: np.ndarray) -> np.ndarray:
    """Reorder the rows of [..., h, D] from half-split RoPE order to pairs: 0, h/2, 1, h/2 + 1, ..."""
    *leading, h, D = rows.shape
    return rows.reshape(*leading, 2, h // 2, D).swapaxes(-3, -2).reshape(rows.shape)


def halve(rows: np.ndarray) -> np.ndarray:
    """The inverse of :func:`interleave`."""
    *leading, h, D = rows.shape
    return rows.reshape(*leading, h // 2, 2, D).swapaxes(-3, -2).reshape(rows.shape)


def transposed(matrices: np.ndarray) -> np.ndarray:
    """Return a copy of [E, i, o] as [E, o, i]."""
    return np.ascontiguousarray(matrices.swapaxes(1, 2))


def stack_gate_up(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Return [2, F, D]: the gate projection, then the up projection."""
    return np.stack(parts)
