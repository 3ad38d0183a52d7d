"""The checkpoint folder: what it holds, and loading it.

======================  ===============================================================================
``checkpoint.json``     the manifest: configuration; every weight's group, shape, dtype and checksum; sizes of all weight files
``weights/GROUP/``      an Orbax checkpoint of some consecutive weights, 256 MB of them or one that is larger
``source_config.json``  a Hugging Face source's ``config.json``, as it was
``tokenizer.json``      (or ``tokenizer.model``), ``chat_template.jinja`` and the like, as the source had them
======================  ===============================================================================

The manifest is written last and the whole folder takes its name in one step, so a folder that has a manifest is complete.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from l4jax.checkpoints.manifest import FORMAT_VERSION, MAKE_AGAIN, MANIFEST, model_config, read_manifest, reading_manifest
from l4jax.checkpoints.quiet import only_the_error
from l4jax.checkpoints.source import CheckpointError
from l4jax.config import DrafterConfig, ModelConfig, config_to_json, drafter_config_from_json
from l4jax.decoding.plan import UNMEASURED, TableJson
from l4jax.files import read_bytes, reading
from l4jax.interrupts import kept_interrupts
from l4jax.model.drafter import build_drafter
from l4jax.model.llama import Llama
from l4jax.model.weights import weight_specs
from l4jax.parallel.placement import Placement

SOURCE_CONFIG = "source_config.json"
"""A Hugging Face source's ``config.json``, kept as it was for the export."""
DTYPES: Mapping[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
TABLE_DTYPES = ("int32",)
"""Dtypes of tables, such as token ids, which are never cast."""


@dataclasses.dataclass(frozen=True)
class StoredWeight:
    """A weight in a checkpoint: its group, shape and dtype, and the CRC-32 of its bytes in C order."""

    group: str
    shape: tuple[int, ...]
    dtype: str
    crc32: int


GROUP_BYTES = 1 << 28
"""Weights are grouped up to this size. Few files load fast, and holding a group of this size takes no more memory than one large weight."""


CHUNK_BYTES = 1 << 26
"""Weights are stored in chunks of at most this size, so that reading a slice does not read the whole."""


def group_weights(nbytes: Mapping[str, int]) -> dict[str, list[str]]:
    """Return the names of the weights that each Orbax checkpoint holds, from the bytes of each weight.

    Consecutive weights share a group up to :data:`GROUP_BYTES`; a larger weight has its own. The image encoder's weights never
    share a group with the decoder's.
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
    """Return the CRC-32 of an array's bytes in C order."""
    return zlib.crc32(np.ascontiguousarray(array).view(np.uint8).reshape(-1))


def save_group(directory: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write one group as an Orbax checkpoint, atomically; ``directory`` must not exist. Raises OSError if the disk is full."""
    arguments = {name: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES) for name in arrays}
    try:
        with only_the_error():
            _checkpointer(type_handler_registry=_SAVED).save(directory.absolute(), dict(arrays), save_args=arguments)
    except ValueError as error:
        # tensorstore reports the system's error in this form.
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(directory)) from error


def load_group(directory: Path, names: Iterable[str], placement: Placement | None = None) -> dict[str, Any]:
    """Read the named weights of one group: each device's part directly to it, or, without a placement, numpy arrays.

    Raises :class:`CheckpointError` where a file is missing or damaged.
    """
    arguments: dict[str, ocp.RestoreArgs] = {}
    for name in names:
        if placement is None:
            arguments[name] = ocp.RestoreArgs(restore_type=np.ndarray)
        else:
            arguments[name] = ocp.ArrayRestoreArgs(sharding=placement.read_sharding(name))
    try:
        with only_the_error():
            restored: dict[str, Any] = _checkpointer().restore(directory.absolute(), restore_args=arguments)
    except Exception as error:
        # Orbax wraps whatever ends the reading of an array, an interruption too, in an Exception.
        cause = error.__cause__ if type(error) is Exception and error.__cause__ is not None else error
        if not isinstance(cause, ValueError | OSError | KeyError):
            raise cause from None
        reason = str(cause).split("\n", 1)[0][:200]
        raise CheckpointError(f"{directory} cannot be read ({reason}); the checkpoint is damaged, make it again") from error
    return restored


def load_verified(directory: Path, weights: Mapping[str, StoredWeight]) -> dict[str, np.ndarray]:
    """Read the weights of one group as numpy arrays. Raises :class:`CheckpointError` unless each is what was written."""
    arrays = load_group(directory, weights)
    for name, weight in weights.items():
        array = arrays[name]
        if (array.shape, array.dtype.name, checksum(array)) != (weight.shape, weight.dtype, weight.crc32):
            raise CheckpointError(f"weight {name} in {directory} is not what was written; the checkpoint is damaged, make it again")
    return arrays


# Orbax would copy each array first, in case it is changed during the writing.
_SAVED = ocp.type_handlers.create_type_handler_registry((np.ndarray, ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)))


def _checkpointer(**options: Any) -> Any:
    # Not compressed: weights hardly compress, and uncompressed ones load as fast as the disk. One file for each chunk: tensorstore's
    # database of files (OCDBT) holds a second copy of large arrays while it writes.
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False, use_ocdbt=False, **options))


def write_manifest(
    directory: Path,
    *,
    source_format: str,
    config: ModelConfig | DrafterConfig,
    weights: Mapping[str, StoredWeight],
    text_files: list[str],
    speculation: TableJson = UNMEASURED,
) -> None:
    """Write ``checkpoint.json``; ``speculation``: how to speculate with a drafter."""
    drafter = {"speculation": speculation} if isinstance(config, DrafterConfig) else {}
    manifest = {
        "format_version": FORMAT_VERSION,
        "source_format": source_format,
        "drafter" if drafter else "config": config_to_json(config),
        **drafter,
        "weights": {name: dataclasses.asdict(weight) for name, weight in weights.items()},
        "weight_files": _file_sizes(directory),
        "text_files": text_files,
    }
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def _file_sizes(directory: Path) -> dict[str, int]:
    """Return the size in bytes of every file in ``weights``, by its path in the checkpoint."""
    files = sorted(path for path in (directory / "weights").rglob("*") if path.is_file())
    return {path.relative_to(directory).as_posix(): path.stat().st_size for path in files}


@dataclasses.dataclass(frozen=True)
class Stored:
    """The weights of an opened checkpoint, none of which has been read yet."""

    directory: Path
    source_format: str
    weights: Mapping[str, StoredWeight]
    text_files: tuple[str, ...]

    @property
    def decoder_weights(self) -> list[str]:
        """The names of the weights that the decoder uses: all but the image encoder's."""
        return [name for name in self.weights if not is_vision(name)]

    @property
    def dtype(self) -> str:
        """The dtype of most bytes of the decoder's weights. (Norms in float32 beside matrices in bfloat16 are common.)"""
        nbytes: Counter[str] = Counter()
        for weight in map(self.weights.__getitem__, self.decoder_weights):
            if weight.dtype in TABLE_DTYPES:
                continue
            nbytes[weight.dtype] += math.prod(weight.shape) * DTYPES[weight.dtype].itemsize
        return nbytes.most_common(1)[0][0]

    @property
    def digest(self) -> str:
        """The SHA-256 of the manifest, which has a checksum of every weight, and of the text files."""
        digest = hashlib.sha256()
        for file in (MANIFEST, *self.text_files):
            digest.update(read_bytes(self.directory / file, MAKE_AGAIN))
        return digest.hexdigest()

    def groups(self, names: Iterable[str]) -> dict[str, list[str]]:
        """Return these weights by their group."""
        return groups_of({name: self.weights[name] for name in names})

    def read_group(self, group: str) -> dict[str, np.ndarray]:
        """Read the weights of a group as they are stored. Raises :class:`CheckpointError` if one is not what was written."""
        return load_verified(self.directory / "weights" / group, {n: w for n, w in self.weights.items() if w.group == group})

    def verify(self) -> None:
        """Read every weight. Raises :class:`CheckpointError` if one is not what was written."""
        with kept_interrupts() as check_interrupts:
            for group in self.groups(self.weights):
                self.read_group(group)
                check_interrupts()

    def restore(self, placement: Placement, dtype: np.dtype | None = None) -> dict[str, Any]:
        """Read the decoder's weights to the devices, cast to ``dtype`` (default: :attr:`dtype`).

        Raises :class:`CheckpointError` if a file is missing or damaged, or a shape is not the manifest's.
        """
        restored: dict[str, Any] = {}
        with kept_interrupts() as check_interrupts:
            for group, names in self.groups(self.decoder_weights).items():
                arrays = load_group(self.directory / "weights" / group, names, placement)
                for name in names:
                    if arrays[name].shape != self.weights[name].shape:
                        raise CheckpointError(
                            f"weight {name} in {self.directory} has shape {arrays[name].shape}; "
                            f"expected {self.weights[name].shape}; the checkpoint is damaged, make it again"
                        )
                    cast = arrays.pop(name)
                    if self.weights[name].dtype not in TABLE_DTYPES:
                        cast = cast.astype(DTYPES[self.dtype] if dtype is None else dtype)
                    restored[name] = placement.place(name, cast)
                check_interrupts()
        return restored


@dataclasses.dataclass(frozen=True)
class Checkpoint(Stored):
    """An opened model."""

    config: ModelConfig

    @property
    def tokenizer_digest(self) -> str | None:
        """The SHA-256 of the tokenizer's file, by which a drafter recognises its model's; None without one."""
        files = [self.directory / name for name in ("tokenizer.json", "tokenizer.model") if name in self.text_files]
        if not files:
            return None
        return hashlib.sha256(read_bytes(files[0], MAKE_AGAIN)).hexdigest()

    @property
    def drafter(self) -> Path | None:
        """The folder of the drafter in the checkpoint, if there is one."""
        folder = self.directory / "drafter"
        return folder if folder.is_dir() else None


@dataclasses.dataclass(frozen=True)
class DrafterCheckpoint(Stored):
    """An opened drafter; ``speculation``: how to speculate with it by default."""

    config: DrafterConfig
    speculation: TableJson


def groups_of(weights: Mapping[str, StoredWeight]) -> dict[str, list[str]]:
    """Return the names of weights by their group."""
    by_group: dict[str, list[str]] = {}
    for name, weight in weights.items():
        by_group.setdefault(weight.group, []).append(name)
    return by_group


def module_of(config: ModelConfig | DrafterConfig) -> nnx.Module:
    """Return the module that a checkpoint's weights are bound to."""
    return build_drafter(config) if isinstance(config, DrafterConfig) else Llama(config)


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a model's manifest. Raises :class:`CheckpointError` if ``path`` is not a complete checkpoint of one."""
    stored, manifest = _open(path)
    config = model_config(stored.directory, manifest)
    _check_weights(stored, module_of(config))
    return Checkpoint(**vars(stored), config=config)


def open_drafter(path: str | os.PathLike[str]) -> DrafterCheckpoint:
    """Read a drafter's manifest, as :func:`open_checkpoint` does a model's."""
    stored, manifest = _open(path)
    if "drafter" not in manifest:
        raise CheckpointError(f"{stored.directory} holds a model; expected a drafter, as `l4jax train-drafter` makes them")
    with reading_manifest(stored.directory / MANIFEST):
        config, speculation = drafter_config_from_json(manifest["drafter"]), dict(manifest["speculation"])
    _check_weights(stored, module_of(config))
    return DrafterCheckpoint(**vars(stored), config=config, speculation=speculation)


def _open(path: str | os.PathLike[str]) -> tuple[Stored, dict[str, Any]]:
    """Return what all checkpoints have, and the manifest."""
    directory = Path(path)
    manifest = read_manifest(directory)
    with reading_manifest(directory / MANIFEST):
        weights = {name: StoredWeight(**{**w, "shape": tuple(w["shape"])}) for name, w in manifest["weights"].items()}
        sizes: dict[str, int] = dict(manifest["weight_files"])
        stored = Stored(directory, manifest["source_format"], weights, tuple(manifest["text_files"]))
    for file in (*sizes, *stored.text_files):
        with reading(directory / file, MAKE_AGAIN):
            found = (directory / file).stat().st_size if (directory / file).is_file() else None
        if found is None or found != sizes.get(file, found):
            state = "is missing" if found is None else f"has {found} bytes; expected {sizes[file]}"
            raise CheckpointError(f"{directory / file} {state}; the checkpoint is damaged, make it again")
    return stored, manifest


def _check_weights(stored: Stored, module: nnx.Module) -> None:
    """Raise :class:`CheckpointError` unless each weight has an entry that fits it."""
    for name, spec in weight_specs(module).items():
        weight = stored.weights.get(name)
        dtypes = TABLE_DTYPES if spec.init == "numbers" else tuple(DTYPES)
        if weight is None or weight.shape != spec.shape or weight.dtype not in dtypes:
            raise CheckpointError(
                f"{stored.directory / MANIFEST} has no entry that fits weight {name}; "
                "it is damaged, or another version of l4jax made it: make it again"
            )
