"""``DEST.partial``: the folder in which a destination is made until it is complete."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from l4jax.checkpoints.source import CheckpointError

SUFFIX = ".partial"
LOCK = "lock"
"""A file in an unfinished destination. A process that writes the destination locks it; it names the kind of work."""

WEIGHTS = "weights"
"""The subfolder of a conversion's weights."""

Work = Literal["conversion", "export"]


def check_destination(destination: str | os.PathLike[str]) -> Path:
    """Return the destination's path. Raises :class:`CheckpointError` if it exists or has the name of an unfinished one."""
    target = Path(destination)
    if os.path.lexists(target):
        raise CheckpointError(f"{target} exists already; choose another destination, or remove it first")
    if target.name.endswith(SUFFIX):
        raise CheckpointError(f"{target} ends in {SUFFIX}, as unfinished destinations do; choose another name")
    return target


@contextmanager
def unfinished(target: Path, work: Work) -> Iterator[Path]:
    """Lock ``TARGET.partial`` while the context lasts; it is new, or left by an earlier run of the same work.

    If the context ends in an exception, it is removed, unless it has weights that a later conversion can continue from.

    Raises :class:`CheckpointError` if it is in use, was not made by this work or cannot be written, and for a full disk.
    """
    partial = target.with_name(target.name + SUFFIX)
    with writing(target, work, folder=partial):
        if partial.exists() and not (partial / LOCK).is_file() and (not partial.is_dir() or any(partial.iterdir())):
            raise CheckpointError(f"{partial} is in the way: it is not an unfinished {work}; move it or choose another destination")
        ours = not partial.exists() or (partial / LOCK).is_file()
        partial.mkdir(parents=True, exist_ok=True)
        with (partial / LOCK).open("a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CheckpointError(f"{partial} is being written by another process; wait for it to end") from None
            file.seek(0)
            earlier = file.read()
            if earlier not in ("", work):
                raise CheckpointError(f"{partial} is an unfinished {earlier}; finish or remove it, or choose another destination")
            if not earlier:
                file.write(work)
                file.flush()
            try:
                yield partial
            except BaseException:
                # Only weights that are converted are of use to a later run.
                if ours and not (partial / WEIGHTS).exists():
                    shutil.rmtree(partial, ignore_errors=True)
                raise


@contextmanager
def writing(destination: Path, work: str, *, folder: Path) -> Iterator[None]:
    """Turn an OSError of writing ``folder``, in which the destination is made, into a :class:`CheckpointError`.

    Every other OSError passes: that of another file, and of a stream or a connection, which name no file. Only a full disk, which names
    none either, is taken for the destination's.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT) and (error.filename is None or _concerns(error.filename, folder)):
            rest = f": what is written is kept in {folder}" if folder.exists() else ""
            raise CheckpointError(f"the disk of {destination} is full; free some space and run the same {work} again{rest}") from error
        if error.filename is None or not _concerns(error.filename, folder):
            raise
        raise CheckpointError(f"{error.filename} cannot be written ({error.strerror}); choose another destination") from error


def _concerns(file: str | bytes | int, folder: Path) -> bool:
    """Whether the file of an OSError is the folder, in it, or a folder that it is in."""
    if isinstance(file, int):
        return False
    path, own = Path(os.path.abspath(os.fsdecode(file))), Path(os.path.abspath(folder))
    return path.is_relative_to(own) or own.is_relative_to(path)


def write_atomically(path: Path, text: str) -> None:
    """Write a file, which appears complete or not at all."""
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
