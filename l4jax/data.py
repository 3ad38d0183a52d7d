"""Finds the data in the repository's ``configs/``: models, meshes, hardware, trees, drafters."""

from __future__ import annotations

from pathlib import Path


def configs_path() -> Path:
    """The directory with the shipped configurations, in a wheel or in a checkout."""
    package = Path(__file__).parent
    # A wheel carries configs/ inside the package; an editable install uses the checkout's.
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"
