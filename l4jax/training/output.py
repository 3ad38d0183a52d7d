"""The trained drafter as a checkpoint folder."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from l4jax.checkpoints.store import StoredWeight, checksum, save_group
from l4jax.config import DrafterConfig, config_to_json

MANIFEST = "drafter.json"


def save_drafter(folder: Path, config: DrafterConfig, weights: Mapping[str, np.ndarray], table: Mapping[str, str]) -> None:
    """Write a drafter, its folder appearing in one step; ``table``: how to speculate by number of rows."""
    partial = folder.with_name(folder.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir()
    save_group(partial / "weights" / "00000", weights)
    stored = {name: StoredWeight("00000", array.shape, array.dtype.name, checksum(array)) for name, array in weights.items()}
    manifest = {
        "format_version": 1,
        "config": config_to_json(config),
        "weights": {name: dataclasses.asdict(weight) for name, weight in stored.items()},
        "speculation": dict(table),
    }
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, folder)
