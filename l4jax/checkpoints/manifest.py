"""A checkpoint's manifest: the file that says what its folder holds. Reading it needs no JAX."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from l4jax.checkpoints.files import absent
from l4jax.checkpoints.partial import SUFFIX
from l4jax.checkpoints.source import CheckpointError
from l4jax.config import ConfigError, ModelConfig, config_from_json
from l4jax.files import read_json

MANIFEST = "checkpoint.json"
FORMAT_VERSION = 1
MAKE_AGAIN = "check the file, or make the checkpoint again"
"""What to do about a file of a checkpoint, converted or trained, that is damaged or cannot be read: nobody but us has it."""


def read_manifest(directory: Path) -> dict[str, Any]:
    """Read a folder's manifest. Raises :class:`CheckpointError` if the folder is not a complete checkpoint of a version we read."""
    if not directory.exists():
        raise absent(directory, "a folder made by `l4jax convert`")
    if directory.resolve().name.endswith(SUFFIX):
        raise CheckpointError(f"{directory} is an unfinished conversion; run the same `l4jax convert` again to finish it")
    if not (directory / MANIFEST).is_file():
        model = directory.resolve().name  # "." has no name of its own
        raise CheckpointError(f"{directory} has no {MANIFEST}; expected a folder made by `l4jax convert`: convert {model} first")
    manifest = read_json(directory / MANIFEST, MAKE_AGAIN)
    if manifest.get("format_version") != FORMAT_VERSION:
        version = manifest.get("format_version")
        raise CheckpointError(f"{directory} has format version {version}; expected {FORMAT_VERSION}; make it again")
    return manifest


def model_config(directory: Path, manifest: Mapping[str, Any]) -> ModelConfig:
    """The configuration in a model's manifest. Raises :class:`CheckpointError` for a drafter's, and for one that is damaged."""
    if "drafter" in manifest:
        raise CheckpointError(f"{directory} holds a drafter; expected a model: give the model here, and the drafter as drafter")
    with reading_manifest(directory / MANIFEST):
        return config_from_json(manifest["config"])


@contextmanager
def reading_manifest(manifest: Path) -> Iterator[None]:
    """Turn the errors that a damaged manifest causes into CheckpointError."""
    try:
        yield
    except (AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{manifest} is damaged ({error!r}); make the checkpoint again") from error
    except ConfigError as error:
        raise CheckpointError(f"{manifest} is damaged, or another version of l4jax made it ({error}); make the checkpoint again") from error
