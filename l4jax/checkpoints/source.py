"""What every checkpoint format gives the converter: a configuration, named tensors, and a recipe for each of our weights."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from l4jax.config import DrafterConfig, ModelConfig


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is one line: what was given, what was expected, what to do."""


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """A source tensor's shape and the dtype that :meth:`Source.read` returns it in."""

    shape: tuple[int, ...]
    dtype: np.dtype


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one of our weights is made: ``assemble`` of the arrays of ``keys``, in that order.

    ``description`` says it in words for ``--dry-run`` ("q, k, v grouped by KV head; q, k rows to interleaved pairs").
    """

    keys: tuple[str, ...]
    assemble: Callable[[Sequence[np.ndarray]], np.ndarray]
    description: str


class Source(Protocol):
    """An opened checkpoint of some format. Opening it reads headers only."""

    format: str
    """"hf", "meta", "gguf" or "eagle head (...)"."""

    @property
    def config(self) -> ModelConfig | DrafterConfig:
        """What it is a checkpoint of."""
        ...

    tensors: Mapping[str, TensorInfo]
    """Every tensor in the files, by its own name."""
    ignored: frozenset[str]
    """Names among ``tensors`` that carry no weight of ours by design (``rope.freqs``); all others must be used once."""
    recipes: Mapping[str, Recipe]
    """For each of our weights (``l4jax.model.weights.weight_specs``), and each vision weight kept as it is (``vision.*``)."""

    fingerprint: Mapping[str, list[int]]
    """Size and modification time (ns) of each weight file: tells whether an interrupted conversion may go on."""

    def read(self, key: str) -> np.ndarray:
        """One tensor's values, memory-mapped where the file allows, else read for this call only."""
        ...

    def write_text_files(self, directory: Path) -> list[str]:
        """Copy or derive tokenizer and chat template (and licence files) into ``directory``; the names written."""
        ...


class ModelSource(Source, Protocol):
    """An opened checkpoint of a model."""

    @property
    def config(self) -> ModelConfig:
        """The model's configuration."""
        ...


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds a JSON object. Raises :class:`CheckpointError` for any other."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); fetch it again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a {type(values).__name__}; expected a JSON object; fetch it again")
    return values


LICENCES = ("license*", "use_policy*", "notice*")
"""Names of the files, in lower case, that say under what terms weights are given."""


def copy_files(source: Path, patterns: Sequence[str], destination: Path) -> list[str]:
    """Copy the files of a folder whose names, in lower case, match a pattern; the names, sorted."""
    names = sorted(
        file.name
        for file in source.iterdir()
        if file.is_file() and any(fnmatch.fnmatchcase(file.name.lower(), pattern) for pattern in patterns)
    )
    for name in names:
        shutil.copyfile(source / name, destination / name)
    return names
