"""What values depend on beside the machine: the code that was measured, and the packages that it was compared with."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[2]
PARTS = ("l4jax", "sharding", "pallas_kernels", "benchmarks/h100", "configs")


def digest(root: Path = ROOT) -> str:
    """Eight digits of the SHA-256 of all that measured times depend on: names and contents of Python files and configurations."""
    hashed = hashlib.sha256()
    for part in PARTS:
        for path in sorted(path for path in (root / part).rglob("*") if path.suffix in (".py", ".json")):
            content = path.read_bytes()
            hashed.update(f"{path.relative_to(root)} {len(content)}\n".encode())
            hashed.update(content)
    return hashed.hexdigest()[:8]


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The version of each of these packages that is installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
