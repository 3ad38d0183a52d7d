"""Reading a source's files: each failure is one line, and a file that changes during a conversion is noticed."""

from __future__ import annotations

import errno
import fnmatch
import json
import math
import os
import re
import stat
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from l4jax.checkpoints.source import CheckpointError

LICENCES = ("license*", "use_policy*", "notice*")
"""Patterns, in lower case, for the names of the files that state the terms of use of the weights."""

_WEIGHTS = (
    *("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin", "pytorch_model*.bin.index.json"),
    *("consolidated.*.pth", "*.gguf", "tf_model*.h5", "flax_model*.msgpack"),
)
_POINTER = b"version https://git-lfs.github.com/spec/v1"


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


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an OSError into a :class:`CheckpointError` that names the file."""
    try:
        yield
    except OSError as error:
        dangling = error.errno == errno.ENOENT and path.is_symlink()
        what = "is a link to a file that does not exist" if dangling else f"cannot be read ({error.strerror})"
        raise CheckpointError(f"{path} {what}; check the file, or fetch it again") from error


def refuse_pointer(path: Path) -> None:
    """Raise :class:`CheckpointError` for a git-lfs pointer: the few lines that git leaves in place of a large file."""
    with reading(path), path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise CheckpointError(f"{path} is a git-lfs pointer, not the file itself; run `git lfs pull` in its folder, or fetch the file")


def absent(path: Path, expected: str) -> CheckpointError:
    """Return the error for a path that does not exist."""
    if re.fullmatch(r"(https?:/.*|[\w-][\w.-]*/[\w-][\w.-]*)", str(path)):
        return CheckpointError(
            f"{path} does not exist here; expected {expected}. If it is a model on the Hugging Face hub, fetch it first "
            "(`hf download NAME --local-dir FOLDER`) and convert that folder"
        )
    return CheckpointError(f"{path} does not exist; expected {expected}")


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object. Raises :class:`CheckpointError` for any other."""
    refuse_pointer(path)
    try:
        with reading(path):
            values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); fetch it again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a {type(values).__name__}; expected a JSON object; fetch it again")
    return values


def read_bytes(path: Path) -> bytes:
    """Read a small file whole. Raises :class:`CheckpointError` if it cannot be read."""
    with reading(path):
        return path.read_bytes()


def copy_files(source: Path, patterns: Sequence[str], destination: Path) -> list[str]:
    """Copy the files of a folder whose names, in lower case, match a pattern; return their names, sorted.

    Raises :class:`CheckpointError` for a file that cannot be read or is a git-lfs pointer, OSError if a copy cannot be written.
    """
    names = [name for name in _names(source, patterns) if not (source / name).is_dir()]
    for name in names:
        refuse_pointer(source / name)
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
