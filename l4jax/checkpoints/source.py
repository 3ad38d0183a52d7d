"""What every checkpoint format gives the converter: a configuration, named tensors, and a recipe for each of our weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from l4jax.config import DrafterConfig, ModelConfig
from l4jax.files import FileError


class CheckpointError(FileError):
    """A checkpoint cannot be used; the message is one line: what was given, what was expected, what to do."""


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """A source tensor's shape and the dtype that :meth:`Source.read` returns it in."""

    shape: tuple[int, ...]
    dtype: np.dtype


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one of our weights is made: by ``assemble``, from the arrays of ``keys`` in that order.

    ``description``: the same in words, for ``--dry-run`` ("q, k, v grouped by KV head; q, k rows to interleaved pairs").
    """

    keys: tuple[str, ...]
    assemble: Callable[[Sequence[np.ndarray]], np.ndarray]
    description: str


@runtime_checkable
class Source(Protocol):
    """An opened checkpoint of some format. Opening it reads headers, and tensors only to compare what should be equal."""

    format: str
    """"hf", "meta", "gguf" or "eagle head (...)"."""

    @property
    def config(self) -> ModelConfig | DrafterConfig:
        """The configuration of the model or drafter."""
        ...

    tensors: Mapping[str, TensorInfo]
    """Every tensor in the files, by its own name."""
    ignored: frozenset[str]
    """Names among ``tensors`` that hold no weight of ours (``rope.freqs``, a copy of the tied embedding); all others are used once."""
    recipes: Mapping[str, Recipe]
    """A recipe for each of our weights (``l4jax.model.weights.weight_specs``), and each vision weight kept as it is (``vision.*``)."""

    fingerprint: Mapping[str, list[int]]
    """Size and modification time (ns) of each weight file: tells whether an interrupted conversion may go on."""
    notes: tuple[str, ...]
    """What the user should know about how the files were read, one line each."""

    def read(self, key: str) -> np.ndarray:
        """Return one tensor's values, of the shape and dtype in ``tensors``; nothing is kept."""
        ...

    def write_tokenizer(self, directory: Path) -> list[str]:
        """Copy or derive tokenizer and chat template files into ``directory``; return the names written."""
        ...

    def write_other_files(self, directory: Path) -> list[str]:
        """Copy all further files that belong to the checkpoint, licences among them, into ``directory``; return the names written."""
        ...


@runtime_checkable
class ModelSource(Source, Protocol):
    """An opened checkpoint of a model."""

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        ...
