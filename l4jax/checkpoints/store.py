"""The checkpoint folder: what it holds, and loading it.

======================  ===============================================================================
``checkpoint.json``     the manifest: configuration and, for every weight, its group, shape, dtype and checksum
``weights/GROUP/``      an Orbax checkpoint of some consecutive weights, 256 MB of them or one that is larger
``source_config.json``  a Hugging Face source's ``config.json``, as it was
``tokenizer.json``      (or ``tokenizer.model``), ``chat_template.jinja`` and the like, as the source had them
======================  ===============================================================================

The manifest is written last and the whole folder takes its name in one step, so a folder that has a manifest is complete.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp

from l4jax.checkpoints.source import CheckpointError
from l4jax.config import ModelConfig, config_from_json, config_to_json

MANIFEST = "checkpoint.json"
SOURCE_CONFIG = "source_config.json"
"""A Hugging Face source's ``config.json``, kept as it was for the export."""
FORMAT_VERSION = 1
DTYPES: Mapping[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}


@dataclasses.dataclass(frozen=True)
class StoredWeight:
    """A weight in a checkpoint: where it lies, and what its bytes must be (``crc32`` of them in C order)."""

    group: str
    shape: tuple[int, ...]
    dtype: str
    crc32: int


GROUP_BYTES = 1 << 28
"""Weights are grouped up to this size: few enough files to load fast, small enough groups that memory is that of one weight."""


def group_weights(nbytes: Mapping[str, int]) -> dict[str, list[str]]:
    """Names of the weights that each Orbax checkpoint holds, from the bytes of each weight.

    Consecutive weights go together up to :data:`GROUP_BYTES`; a larger one is alone. The image encoder's never share a group
    with the decoder's.
    """
    groups: list[list[str]] = []
    size = 0
    for name, weight_bytes in nbytes.items():
        if not groups or size + weight_bytes > GROUP_BYTES or is_vision(name) != is_vision(groups[-1][0]):
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += weight_bytes
    return {f"{index:05}": names for index, names in enumerate(groups)}


def is_vision(name: str) -> bool:
    """True for a weight of the image encoder, False for one of the decoder."""
    return name.startswith("vision.")


def checksum(array: np.ndarray) -> int:
    """CRC-32 of an array's bytes in C order."""
    return zlib.crc32(np.ascontiguousarray(array).view(np.uint8).reshape(-1))


def save_group(directory: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write one group as an Orbax checkpoint, atomically; ``directory`` must not exist. Raises OSError if the disk is full."""
    try:
        _checkpointer().save(directory.absolute(), dict(arrays))
    except ValueError as error:
        # So tensorstore reports what the system told it.
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(directory)) from error


def load_group(directory: Path, names: Iterable[str], sharding: jax.sharding.Sharding | None = None) -> dict[str, Any]:
    """Read one group's named weights: as device arrays laid out by ``sharding``, or as numpy arrays without one."""
    restore = ocp.RestoreArgs(restore_type=np.ndarray) if sharding is None else ocp.ArrayRestoreArgs(sharding=sharding)
    try:
        restored: dict[str, Any] = _checkpointer().restore(directory.absolute(), restore_args=dict.fromkeys(names, restore))
    except (ValueError, OSError, KeyError) as error:
        reason = str(error).split("\n", 1)[0][:200]
        raise CheckpointError(f"{directory} cannot be read ({reason}); the checkpoint is damaged, convert it again") from error
    return restored


def _checkpointer() -> Any:
    # Not compressed: weights hardly compress, and so they load as fast as the disk.
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False))


def write_manifest(
    directory: Path, *, source_format: str, config: ModelConfig, weights: Mapping[str, StoredWeight], text_files: list[str]
) -> None:
    """Write ``checkpoint.json``."""
    manifest = {
        "format_version": FORMAT_VERSION,
        "source_format": source_format,
        "config": config_to_json(config),
        "weights": {name: dataclasses.asdict(weight) for name, weight in weights.items()},
        "text_files": text_files,
    }
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint; nothing of the weights has been read yet."""

    directory: Path
    source_format: str
    config: ModelConfig
    weights: Mapping[str, StoredWeight]
    text_files: tuple[str, ...]

    @property
    def decoder_weights(self) -> list[str]:
        """Names of the weights that the decoder uses: all but the image encoder's."""
        return [name for name in self.weights if not is_vision(name)]

    def groups(self, names: Iterable[str]) -> dict[str, list[str]]:
        """These weights by the group they lie in."""
        by_group: dict[str, list[str]] = {}
        for name in names:
            by_group.setdefault(self.weights[name].group, []).append(name)
        return by_group

    def restore(self, dtype: np.dtype | None = None) -> dict[str, Any]:
        """The decoder's weights as arrays on the default device, cast to ``dtype`` if one is given.

        Raises :class:`CheckpointError` if a file is missing or damaged, or a shape is not the manifest's.
        """
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        restored: dict[str, Any] = {}
        for group, names in self.groups(self.decoder_weights).items():
            arrays = load_group(self.directory / "weights" / group, names, device)
            for name in names:
                if arrays[name].shape != self.weights[name].shape:
                    raise CheckpointError(
                        f"weight {name} in {self.directory} has shape {arrays[name].shape}; "
                        f"expected {self.weights[name].shape}; the checkpoint is damaged, convert it again"
                    )
                restored[name] = arrays[name] if dtype is None else arrays[name].astype(dtype)
        return restored


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint's manifest. Raises :class:`CheckpointError` if ``path`` is not a complete checkpoint."""
    directory = Path(path)
    if not directory.exists():
        raise CheckpointError(f"{directory} does not exist; expected a folder made by `l4jax convert`")
    if directory.name.endswith(".partial"):
        raise CheckpointError(f"{directory} is an unfinished conversion; run the same `l4jax convert` again to finish it")
    if not (directory / MANIFEST).is_file():
        raise CheckpointError(f"{directory} has no {MANIFEST}; expected a folder made by `l4jax convert`: convert {directory.name} first")
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        version = manifest["format_version"]
        if version != FORMAT_VERSION:
            raise CheckpointError(f"{directory} has format version {version}; expected {FORMAT_VERSION}; convert it again")
        weights = {name: StoredWeight(**{**w, "shape": tuple(w["shape"])}) for name, w in manifest["weights"].items()}
        checkpoint = Checkpoint(
            directory, manifest["source_format"], config_from_json(manifest["config"]), weights, tuple(manifest["text_files"])
        )
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise CheckpointError(f"{directory / MANIFEST} is damaged ({error!r}); convert the checkpoint again") from error
    for group in checkpoint.groups(weights):
        if not (directory / "weights" / group).is_dir():
            raise CheckpointError(f"{directory} lacks weights/{group}; the checkpoint is damaged, convert it again")
    return checkpoint
