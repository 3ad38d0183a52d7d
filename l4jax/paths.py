"""Where l4jax keeps what it can make again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """Return the user's cache directory for l4jax, which may not exist yet: ``$XDG_CACHE_HOME/l4jax``, or ``~/.cache/l4jax``.

    Raises ValueError for a user without a home directory, unless ``XDG_CACHE_HOME`` is set.
    """
    configured = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG base directory specification has relative paths ignored.
    if os.path.isabs(configured):
        return Path(configured) / "l4jax"
    try:
        return Path.home() / ".cache" / "l4jax"
    except RuntimeError as error:
        raise ValueError("this user has no home directory to keep a cache in; set XDG_CACHE_HOME to a folder for it") from error
