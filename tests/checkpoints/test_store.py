"""A stored checkpoint whose files go missing after it was opened; and what is said besides the error: nothing."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from l4jax.checkpoints import quiet
from l4jax.checkpoints.convert import convert
from l4jax.checkpoints.source import CheckpointError
from l4jax.checkpoints.store import open_checkpoint, save_group
from l4jax.files import FileError
from l4jax.parallel.placement import Placement
from sharding.mesh import ONE_DEVICE
from tests.checkpoints.folders import GOLDEN


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "ours"
    convert(GOLDEN / "llama3_tied", folder)
    return folder


@pytest.fixture
def ours(converted, tmp_path):
    return Path(shutil.copytree(converted, tmp_path / "ours"))


def chunks(folder: Path) -> list[Path]:
    return [file for file in sorted((folder / "weights").rglob("*")) if file.name[0].isdigit() and file.is_file()]


def linked_to_itself(file: Path) -> None:
    file.unlink()
    file.symlink_to(file)


DAMAGE = {
    "a chunk vanishes": lambda folder: chunks(folder)[5].unlink(),
    "every chunk vanishes": lambda folder: [file.unlink() for file in chunks(folder)],
    "a chunk shrinks": lambda folder: os.truncate(chunks(folder)[5], 10),
    "a chunk cannot be opened": lambda folder: linked_to_itself(chunks(folder)[5]),
    "an array's description is damaged": lambda folder: (chunks(folder)[5].parent / ".zarray").write_text("{"),
    "the group vanishes": lambda folder: shutil.rmtree(folder / "weights"),
}


@pytest.mark.parametrize("how", ["restore", "verify"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_files_that_go_missing_after_opening_are_one_line_and_nothing_else(damage, how, ours, capfd):
    checkpoint = open_checkpoint(ours)
    placement = Placement.on(checkpoint.config, ONE_DEVICE)
    before = sys.unraisablehook, logging.getLogger("asyncio").filters[:]
    DAMAGE[damage](ours)
    with pytest.raises(CheckpointError, match=r"^[^\n]+ cannot be read \([^\n]+\); the checkpoint is damaged, make it again$"):
        checkpoint.restore(placement) if how == "restore" else checkpoint.verify()
    gc.collect()  # a task that was left would be reported here, and fail this test
    assert capfd.readouterr().err == ""
    assert (sys.unraisablehook, logging.getLogger("asyncio").filters) == before
    assert_orbax_is_as_it_was()


def assert_orbax_is_as_it_was() -> None:
    assert asyncio.new_event_loop is asyncio.events.new_event_loop
    assert quiet._drop not in logging.getLogger("absl").filters


def test_an_interruption_while_an_array_is_read_is_not_damage(ours, monkeypatch):
    def interrupted(*_: object, **__: object) -> None:
        error = Exception("Encountered error while reading array index")
        error.__cause__ = KeyboardInterrupt()
        raise error

    checkpoint = open_checkpoint(ours)
    monkeypatch.setattr("orbax.checkpoint.Checkpointer.restore", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.verify()


def test_a_failed_write_leaves_nothing_running(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Not a directory"):
        save_group(tmp_path / "file" / "group", {f"a{i}": np.ones(9, np.float32) for i in range(40)})
    gc.collect()
    assert_orbax_is_as_it_was()


def test_a_text_file_that_is_missing_is_named(ours):
    (ours / "source_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"source_config\.json is missing; the checkpoint is damaged"):
        open_checkpoint(ours)


def test_a_text_file_that_vanishes_after_opening_is_one_line(ours):
    checkpoint = open_checkpoint(ours)
    (ours / "source_config.json").unlink()
    with pytest.raises(FileError, match=r"source_config\.json cannot be read \(No such file or directory\)"):
        _ = checkpoint.digest
