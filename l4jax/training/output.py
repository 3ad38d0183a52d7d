"""The trained drafter as a checkpoint folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from l4jax.checkpoints.files import LICENCES, copy_files
from l4jax.checkpoints.store import StoredWeight, checksum, save_group, write_manifest
from l4jax.config import DrafterConfig
from l4jax.decoding.plan import TableJson


def save_drafter(
    folder: Path, config: DrafterConfig, weights: Mapping[str, np.ndarray], *, speculation: TableJson, licences: Sequence[Path]
) -> None:
    """Write a drafter; its folder appears in one step.

    ``licences``: folders. The licence files of the first folder that has any are copied.
    """
    partial = folder.with_name(folder.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()
    save_group(partial / "weights" / "00000", weights)
    stored = {name: StoredWeight("00000", array.shape, array.dtype.name, checksum(array)) for name, array in weights.items()}
    text_files: list[str] = []
    for directory in licences:
        text_files = text_files or copy_files(directory, LICENCES, partial)
    write_manifest(partial, source_format="trained", config=config, weights=stored, text_files=text_files, speculation=speculation)
    os.replace(partial, folder)
