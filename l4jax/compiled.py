"""Compiled programs, kept on disk from one process to the next: JAX's cache, in a folder that works and without damaged entries."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import jax

# JAX has no public way to read an entry.
from jax._src.compilation_cache import decompress_executable

from l4jax.paths import cache_root


def keep_compiled_programs() -> None:
    """Keep what JAX compiles in the user's cache, unless JAX's own setting already says where.

    Warns and does without if that folder cannot be used.
    """
    if jax.config.jax_compilation_cache_dir is not None:
        return
    try:
        folder = cache_root() / "compiled"
        folder.mkdir(parents=True, exist_ok=True)
        remove_damaged(folder)
    except (OSError, RuntimeError, ValueError) as error:
        warnings.warn(
            f"programs are compiled at every start, because they cannot be kept ({error}); set XDG_CACHE_HOME to a folder that can be "
            "written, with space left",
            stacklevel=3,
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # JAX's defaults leave out programs that compile within a second, which on a CPU are most of ours.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def remove_damaged(folder: Path) -> None:
    """Remove entries that were written in part: by a process that was killed, or on a disk that was full.

    JAX would warn of them at every start and never replace them. Entries older than the last check are not read again. Raises OSError if
    the folder cannot be written.
    """
    checked = folder / "checked"
    since = checked.stat().st_mtime_ns if checked.exists() else 0
    newest = since
    for entry in folder.glob("*-cache"):
        try:
            written = entry.stat().st_mtime_ns
            if written < since:
                continue
            content = entry.read_bytes()
        except FileNotFoundError:  # another process has removed it
            continue
        newest = max(newest, written)
        try:
            decompress_executable(content)
        except Exception:  # what it raises depends on the compressor
            entry.unlink(missing_ok=True)
    checked.touch()
    os.utime(checked, ns=(newest, newest))
