"""The trained drafter as a checkpoint folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from l4jax.checkpoints.store import StoredWeight, checksum, save_group, write_manifest
from l4jax.config import DrafterConfig


def save_drafter(folder: Path, config: DrafterConfig, weights: Mapping[str, np.ndarray]) -> None:
    """Write a drafter, its folder appearing in one step."""
    partial = folder.with_name(folder.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()
    save_group(partial / "weights" / "00000", weights)
    stored = {name: StoredWeight("00000", array.shape, array.dtype.name, checksum(array)) for name, array in weights.items()}
    write_manifest(partial, source_format="trained", config=config, weights=stored, text_files=[])
    os.replace(partial, folder)
