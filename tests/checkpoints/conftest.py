"""Fixtures of the checkpoint tests."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from l4jax.checkpoints import store
from tests.checkpoints.folders import GOLDEN, SMALL_GROUP
from tests.checkpoints.published import save_target, target_config


@pytest.fixture
def many_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups small enough that the small models have several."""
    monkeypatch.setattr(store, "GROUP_BYTES", SMALL_GROUP)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A copy of a small Llama 4 folder, to be damaged."""
    folder = tmp_path / "source"
    shutil.copytree(GOLDEN / "maverick", folder)
    return folder


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model that the heads of ``published`` are for."""
    return save_target(tmp_path_factory.mktemp("target"), target_config())
