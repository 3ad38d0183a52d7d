"""A source's files: a weight file that changes during a conversion is noticed, and files are copied and named."""

from __future__ import annotations

import fnmatch
import math
import os
import re
import stat
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np

from l4jax.checkpoints.source import CheckpointError
from l4jax.files import read_bytes, reading, refuse_pointer

LICENCES = ("license*", "use_policy*", "notice*")
"""Patterns, in lower case, for the names of the files that state the terms of use of the weights."""

_WEIGHTS = (
    *("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json"),
    *("consolidated.*.pth", "*.gguf", "tf_model*.h5", "flax_model*.msgpack"),
)


class WeightFile:
    """A file of weights. It must stay as it was when it was opened: :meth:`read` raises :class:`CheckpointError` once it differs.

    Values are read, not memory-mapped: a process that touches a map of a file that has shrunk is killed by the system.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with reading(path):
            status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path} is not a regular file; expected a file of weights")
        refuse_pointer(path)
        if status.st_size == 0:
            raise CheckpointError(f"{path} is empty (0 bytes); fetch it again")
        self.size = status.st_size
        self._modified = status.st_mtime_ns

    @property
    def fingerprint(self) -> list[int]:
        """Size in bytes and modification time in nanoseconds."""
        return [self.size, self._modified]

    def read(self, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Return the array whose bytes, in C order, begin at byte ``offset`` of the file."""
        array = np.empty(math.prod(shape), dtype)
        with reading(self.path), self.path.open("rb") as file:
            status = os.fstat(file.fileno())
            file.seek(offset)
            read = file.readinto(array.view(np.uint8).data) if array.size else 0
        if [status.st_size, status.st_mtime_ns] != self.fingerprint or read != array.nbytes:
            raise CheckpointError(f"{self.path} changed after it was opened; run the same command again once nothing writes to it")
        return array.reshape(shape)


def absent(path: Path, expected: str) -> CheckpointError:
    """Return the error for a path that does not exist."""
    if re.fullmatch(r"(https?:/.*|[\w-][\w.-]*/[\w-][\w.-]*)", str(path)):
        return CheckpointError(
            f"{path} does not exist here; expected {expected}. If it is a model on the Hugging Face hub, fetch it first "
            "(`hf download NAME --local-dir FOLDER`) and convert that folder"
        )
    return CheckpointError(f"{path} does not exist; expected {expected}")


def copy_files(source: Path, patterns: Sequence[str], destination: Path) -> list[str]:
    """Copy the files of a folder whose names, in lower case, match a pattern; return their names, sorted.

    Raises :class:`l4jax.files.FileError` for a file that cannot be read or is a git-lfs pointer, OSError if a copy cannot be written.
    """
    names = [name for name in _names(source, patterns) if not (source / name).is_dir()]
    for name in names:
        (destination / name).write_bytes(read_bytes(source / name))
    return names


def weight_names(directory: Path) -> list[str]:
    """Return the names of a folder's files that look like weights of any format, or like an index of them."""
    return _names(directory, _WEIGHTS)


def listed(names: Sequence[str]) -> str:
    """Return the first three names, and how many more there are, as text."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def not_read(directory: Path, read: Collection[str]) -> tuple[str, ...]:
    """Return a note that names the weight files of a folder that are not among those ``read``; empty if there are none."""
    others = [name for name in weight_names(directory) if name not in read]
    return (f"{directory} holds other weights besides: {listed(sorted(read))} is read, {listed(others)} is not",) if others else ()


def _names(directory: Path, patterns: Sequence[str]) -> list[str]:
    with reading(directory):
        names = sorted(entry.name for entry in directory.iterdir())
    return [name for name in names if any(fnmatch.fnmatchcase(name.lower(), pattern) for pattern in patterns)]
