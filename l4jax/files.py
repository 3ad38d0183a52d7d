"""Reading files that others made: each failure is one line that names the file."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FETCH_AGAIN = "check the file, or fetch it again"
"""What to do about a file of others that is damaged or cannot be read."""

_POINTER = b"version https://git-lfs.github.com/spec/"


class FileError(ValueError):
    """A file that cannot be read, or is not what it should be; the message is one line."""


@contextmanager
def reading(path: Path, advice: str = FETCH_AGAIN) -> Iterator[None]:
    """Turn an OSError into a :class:`FileError` that names the file and ends in ``advice``."""
    try:
        yield
    except OSError as error:
        dangling = error.errno == errno.ENOENT and path.is_symlink()
        what = "is a link to a file that does not exist" if dangling else f"cannot be read ({error.strerror})"
        raise FileError(f"{path} {what}; {advice}") from error


def is_there(path: Path) -> bool:
    """Whether a folder has an entry of this name. A link to nothing is one, which :func:`reading` then names."""
    with reading(path):
        try:
            path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return False
    return True


def refuse_pointer(path: Path) -> None:
    """Raise :class:`FileError` for a git-lfs pointer: the few lines that git leaves in place of a large file."""
    with reading(path), path.open("rb") as file:
        _refuse_pointer(path, file.read(len(_POINTER)))


def read_bytes(path: Path, advice: str = FETCH_AGAIN) -> bytes:
    """Return the contents of a file. Raises :class:`FileError` for a git-lfs pointer, and, ending in ``advice``, if it cannot be read."""
    with reading(path, advice):
        content = path.read_bytes()
    _refuse_pointer(path, content)
    return content


def read_text(path: Path, advice: str = FETCH_AGAIN) -> str:
    """Return the contents of a file of UTF-8 text. Raises :class:`FileError`, which ends in ``advice``, for any other file."""
    try:
        return read_bytes(path, advice).decode("utf-8")
    except UnicodeDecodeError as error:
        raise FileError(f"{path} is not UTF-8 text ({error}); {advice}") from error


def read_json(path: Path, advice: str = FETCH_AGAIN) -> dict[str, Any]:
    """Return the object in a JSON file. Raises :class:`FileError`, which ends in ``advice``, for any other file."""
    values = parse_json(read_text(path, advice), str(path), advice)
    if not isinstance(values, dict):
        raise FileError(f"{path} holds a {type(values).__name__}; expected a JSON object; {advice}")
    return values


def read_json_if_there(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, or an empty one if the file is absent. Raises :class:`FileError` for any other file."""
    return read_json(path) if is_there(path) else {}


def parse_json(text: str | bytes, what: str, advice: str) -> Any:
    """Return the value of a JSON text. Raises :class:`FileError` for any other text: a line from ``what`` to ``advice``."""
    try:
        return json.loads(text)
    # Beside other errors in the text: a number of too many digits, lists nested too deep.
    except (ValueError, RecursionError) as error:
        raise FileError(f"{what} is not valid JSON ({error}); {advice}") from error


def _refuse_pointer(path: Path, start: bytes) -> None:
    if start.startswith(_POINTER):
        raise FileError(f"{path} is a git-lfs pointer in place of the file; run `git lfs pull` in its folder, or fetch the file")
