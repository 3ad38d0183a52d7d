"""Finding out what a checkpoint is."""

from __future__ import annotations

import os
from pathlib import Path

from l4jax.checkpoints.source import CheckpointError, ModelSource


def open_source(path: str | os.PathLike[str]) -> ModelSource:
    """Open a Hugging Face folder, a Meta folder or a GGUF file. Raises :class:`CheckpointError` if it is none of them."""
    source = Path(path)
    if not source.exists():
        raise CheckpointError(f"{source} does not exist; expected a Hugging Face or Meta folder, or a .gguf file")
    if source.is_file():
        with source.open("rb") as file:
            if file.read(4) == b"GGUF":
                from l4jax.checkpoints.gguf import GGUFSource  # noqa: PLC0415 - the gguf package is slow to import

                return GGUFSource(source)
        raise CheckpointError(f"{source} is no GGUF file; expected one, or a Hugging Face or Meta folder")
    if (source / "config.json").exists():
        from l4jax.checkpoints.hf import HFSource  # noqa: PLC0415 - as above

        return HFSource(source)
    if any(source.glob("consolidated.*.pth")):
        from l4jax.checkpoints.meta import MetaSource  # noqa: PLC0415 - as above

        return MetaSource(source)
    raise CheckpointError(f"{source} has no config.json and no consolidated.*.pth; expected a Hugging Face or Meta folder, or a .gguf file")
