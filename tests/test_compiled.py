"""Compiled programs kept on disk: damaged entries are replaced, and a folder that cannot be used costs no more than a warning."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from l4jax.compiled import keep_compiled_programs, remove_damaged

SETTINGS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs", "jax_persistent_cache_min_entry_size_bytes")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where compiled programs go: not to the folder that the other tests share."""
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", None)
    yield tmp_path / "l4jax" / "compiled"
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def compile_once(x: float) -> float:
    """As a process that has just started would."""
    compilation_cache.reset_cache()
    return float(jax.jit(lambda x: 3.0 * x + 1.0)(x))


def entries(folder: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in folder.glob("*-cache")}


def test_an_entry_that_was_cut_off_is_replaced_without_a_word(folder: Path) -> None:
    keep_compiled_programs()
    assert compile_once(2.0) == 7.0
    whole = entries(folder)
    assert whole
    for name, content in whole.items():
        (folder / name).write_bytes(content[: len(content) // 2])
    jax.config.update("jax_compilation_cache_dir", None)
    keep_compiled_programs()
    assert not entries(folder)
    assert compile_once(2.0) == 7.0  # JAX's warning of a damaged entry would be an error here
    assert entries(folder).keys() == whole.keys()


def test_an_entry_is_read_once_and_again_after_it_has_changed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[bytes] = []
    monkeypatch.setattr("l4jax.compiled.decompress_executable", read.append)
    folder.mkdir(parents=True)
    (folder / "old-cache").write_bytes(b"old")
    remove_damaged(folder)
    later = (folder / "old-cache").stat().st_mtime_ns + 10**9
    (folder / "new-cache").write_bytes(b"new")
    os.utime(folder / "new-cache", ns=(later, later))
    remove_damaged(folder)
    read.clear()
    remove_damaged(folder)
    assert read == [b"new"]  # as old as the last check: it may have been written during it


def test_without_a_folder_that_can_be_written_programs_are_not_kept(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    message = r"^programs are compiled at every start, because they cannot be kept \(.*Not a directory.*\); set XDG_CACHE_HOME to a folder"
    with pytest.warns(UserWarning, match=message):
        keep_compiled_programs()
    assert jax.config.jax_compilation_cache_dir is None
    assert compile_once(2.0) == 7.0


def test_a_user_without_a_home_goes_without(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.warns(UserWarning, match="they cannot be kept"):
        keep_compiled_programs()
    assert jax.config.jax_compilation_cache_dir is None
