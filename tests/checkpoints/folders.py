"""Copies of the golden folders to be changed, and what a refused conversion says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from l4jax.checkpoints.convert import convert

GOLDEN = Path(__file__).parent.parent / "golden" / "data"
SMALL_GROUP = 1 << 16
"""Bytes of a group of weights, so few that the small models have several groups."""


def golden(model: str, folder: Path) -> Path:
    """A copy of a golden model's folder."""
    return Path(shutil.copytree(GOLDEN / model, folder))


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    return {key: array for file in sorted(folder.glob("*.safetensors")) for key, array in load_file(file).items()}


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def rewrite(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    """Apply ``change`` to the tensors of a folder with one file."""
    tensors = tensors_of(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def reconfigure(folder: Path, **values: Any) -> None:
    """Change fields of a folder's ``config.json``."""
    (folder / "config.json").write_text(json.dumps({**config_of(folder), **values}))


def refused(source: Path | str, tmp_path: Path, **options: Any) -> str:
    """The one line that a conversion ends with; nothing is left of it."""
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        convert(source, tmp_path / "ours", **options)
    assert not (tmp_path / "ours").exists()
    assert not (tmp_path / "ours.partial").exists()
    assert "ours.partial" not in str(error.value)
    return str(error.value)
