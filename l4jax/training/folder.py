"""A training run's folder: its settings, its metrics, and the states that an interrupted run continues from.

====================  ==========================================================================
``run.json``          the settings that decide the outcome; a run with other settings is refused
``answers.jsonl``     the target's answers, as they arrive
``metrics.jsonl``     an object for each report
``states/STEP/``      the state after STEP steps, an Orbax checkpoint; the last two are kept
``drafter/``          the trained drafter: once it exists, the run is complete
====================  ==========================================================================
"""

from __future__ import annotations

import fcntl
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from l4jax.checkpoints.partial import write_atomically, writing
from l4jax.checkpoints.store import load_group, save_group
from l4jax.files import FileError

ANSWERS_DEPEND_ON = ("target", "data", "dtype", "length", "temperature", "max_tokens", "seed")
"""Settings that decide a run's answers; the others may change until a state has been saved."""
_STATES_KEPT = 2


class RunFolder:
    """The folder of one run; see :func:`claim`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answers, self.metrics, self.drafter = path / "answers.jsonl", path / "metrics.jsonl", path / "drafter"
        self._states = path / "states"

    def save_state(self, step: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Save the state after ``step`` steps, and keep the last two."""
        directory = self._states / f"{step:08}"
        if not directory.exists():
            save_group(directory, arrays)
        for old in self._saved()[:-_STATES_KEPT]:
            shutil.rmtree(self._states / f"{old:08}")

    def load_state(self, names: Sequence[str]) -> tuple[int, dict[str, np.ndarray]] | None:
        """The last saved state, of these arrays, and its step; None if there is none. Cuts later reports off the metrics."""
        saved = self._saved()
        if not saved:
            self.metrics.write_text("", encoding="utf-8")
            return None
        directory = self._states / f"{saved[-1]:08}"
        try:
            arrays = load_group(directory, names)
        except FileError as error:
            raise ValueError(f"the state in {directory} cannot be read; remove it, and the run continues from the one before") from error
        with reading_own(self.metrics):
            lines = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= saved[-1]]
        write_atomically(self.metrics, "".join(kept))
        return saved[-1], arrays

    def _saved(self) -> list[int]:
        if not self._states.is_dir():
            return []
        return sorted(int(entry.name) for entry in self._states.iterdir() if re.fullmatch("[0-9]{8,}", entry.name))

    def report(self, values: Mapping[str, Any]) -> None:
        """Add an object to the metrics."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dict(values)) + "\n")


@contextmanager
def reading_own(file: Path) -> Iterator[None]:
    """Turn what reading a damaged file of a run's folder raises into a ValueError that names the file."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror}); restore it, or give another folder for the run") from error
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({error}); restore it, or give another folder for the run") from error


@contextmanager
def claim(path: Path, settings: Mapping[str, Any]) -> Iterator[RunFolder]:
    """Create or reopen a run's folder, for this process alone while the context lasts.

    Raises ValueError if it is in use, belongs to another run, is not a run's folder or cannot be written, and for a full disk.
    """
    if path.exists() and not (path.is_dir() and ((path / "lock").is_file() or not any(path.iterdir()))):
        raise ValueError(f"{path} is not the folder of a training run; choose another, or remove it")
    with writing(path, "training", folder=path):
        path.mkdir(parents=True, exist_ok=True)
        with (path / "lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"{path} is being written by another process; wait for it to end") from None
            _check_settings(path, settings)
            write_atomically(path / "run.json", json.dumps(dict(settings), indent=1) + "\n")
            for unfinished in (path / "states").glob("*tmp*"):
                shutil.rmtree(unfinished)
            yield RunFolder(path)


def _check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Raise ValueError if the folder is of a run with other settings that have decided what is in it."""
    run = path / "run.json"
    with reading_own(run):
        earlier = dict(json.loads(run.read_text(encoding="utf-8"))) if run.exists() else settings
    started = (path / "states").is_dir()
    for name in sorted(earlier.keys() | settings.keys()):
        if earlier.get(name) != settings.get(name) and (started or name in ANSWERS_DEPEND_ON):
            raise ValueError(
                f"{path} belongs to another run: its {name} is {earlier.get(name)!r}, and this one's is {settings.get(name)!r}; "
                "give the same settings to continue it, or another folder"
            )
