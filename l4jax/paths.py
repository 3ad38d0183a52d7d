"""Where l4jax keeps files that it can make again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path:
    """The user's cache directory for l4jax, which may not exist yet: ``$XDG_CACHE_HOME/l4jax``, or ``~/.cache/l4jax``."""
    configured = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG base directory specification says that relative paths are ignored.
    base = Path(configured) if os.path.isabs(configured) else Path.home() / ".cache"
    return base / "l4jax"
