"""What a server's front imports: rooms that take requests and write text, without JAX."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("module", ["l4jax", "l4jax.request", "l4jax.text.output", "l4jax.answer"])
def test_it_imports_no_jax(module: str) -> None:
    code = f"import sys, {module}\nprint(sorted(name for name in sys.modules if name.split('.')[0] in ('jax', 'jaxlib', 'flax')))"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "[]\n"
