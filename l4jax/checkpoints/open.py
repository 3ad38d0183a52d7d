"""Finding out what a checkpoint is."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from l4jax.checkpoints.eagle import EagleSource, is_head
from l4jax.checkpoints.files import WeightFile, absent, listed, weight_names
from l4jax.checkpoints.manifest import MANIFEST
from l4jax.checkpoints.partial import SUFFIX
from l4jax.checkpoints.source import CheckpointError, ModelSource
from l4jax.checkpoints.store import open_checkpoint
from l4jax.config_formats.eagle import HeadAnswers

_EXPECTED = "a Hugging Face or Meta folder, or a .gguf file"


def open_source(path: str | os.PathLike[str]) -> ModelSource:
    """Open a Hugging Face folder, a Meta folder or a GGUF file. Raises :class:`CheckpointError` if it is none of them.

    A split GGUF file is given by any of its parts, or by a folder that holds nothing else of that kind.
    """
    source = Path(path)
    if not source.exists():
        raise absent(source, _EXPECTED)
    if source.is_file():
        return _open_file(source)
    _refuse_ours(source)
    if (source / "adapter_config.json").exists():
        raise CheckpointError(
            f"{source} has adapter_config.json: it is a LoRA adapter, not a model; merge it into its model (merge_and_unload of peft) and "
            "convert the result, or remove that file if the weights are merged already"
        )
    weights = {pattern: sorted(source.glob(pattern)) for pattern in ("*.safetensors*", "consolidated.*.pth", "*.gguf")}
    # Some folders have Meta's files and the configuration for Hugging Face's.
    if weights["consolidated.*.pth"] and not ((source / "config.json").exists() and weights["*.safetensors*"]):
        from l4jax.checkpoints.meta import MetaSource  # noqa: PLC0415 - each format is imported where it is met

        return MetaSource(source)
    if weights["*.gguf"] and not weights["*.safetensors*"]:
        return _open_gguf_folder(source, weights["*.gguf"])
    if (source / "config.json").exists():
        if is_head(source):
            raise CheckpointError(f"{source} is an EAGLE head, not a whole model; give its model to `l4jax convert` with --target")
        from l4jax.checkpoints.hf import HFSource  # noqa: PLC0415 - each format is imported where it is met

        return HFSource(source)
    raise CheckpointError(f"{source} has no config.json and no consolidated.*.pth; expected {_EXPECTED}")


def open_head(path: str | os.PathLike[str], target: str | os.PathLike[str], answers: HeadAnswers) -> EagleSource:
    """Open a published EAGLE head for a converted model. Raises :class:`CheckpointError` if either is something else."""
    source = Path(path)
    if not source.exists():
        raise absent(source, "the folder of an EAGLE head")
    if source.is_dir():
        _refuse_ours(source)
    there = (source / "config.json").exists()
    if not (there and is_head(source)) and _is_model(source):
        raise CheckpointError(f"{source} is a whole model, not an EAGLE head; leave --target out, or give the head")
    if not there:
        raise CheckpointError(f"{source} has no config.json; expected the folder of an EAGLE head")
    return EagleSource(source, open_checkpoint(target), answers)


def _is_model(path: Path) -> bool:
    try:
        open_source(path)
    except ValueError:
        return False
    return True


def _open_file(path: Path) -> ModelSource:
    file = WeightFile(path)
    magic = file.read(0, (min(4, file.size),), np.dtype(np.uint8)).tobytes()
    if b"GGUF".startswith(magic):  # where less is left of the file, its reader says so
        from l4jax.checkpoints.gguf import GGUFSource  # noqa: PLC0415 - the gguf package is slow to import

        return GGUFSource(path)
    raise CheckpointError(f"{path} is a file, and not a GGUF file; expected {_EXPECTED}: give the folder that it is in, {path.parent}")


def _open_gguf_folder(folder: Path, files: list[Path]) -> ModelSource:
    from l4jax.checkpoints.gguf_files import parts_of  # noqa: PLC0415 - the gguf package is slow to import

    others = sorted({*weight_names(folder)} - {file.name for file in files})
    if others:
        # transformers would read these, and llama.cpp the GGUF file, which is often quantised.
        raise CheckpointError(
            f"{folder} has {files[0].name} and {listed(others)}, either of which may be the model; give the GGUF file itself, or a folder "
            "with the model as safetensors"
        )
    firsts = sorted({parts_of(file)[0] for file in files})
    if len(firsts) > 1:
        raise CheckpointError(f"{folder} has {len(firsts)} GGUF files, {listed([file.name for file in firsts])}; give one of them")
    return _open_file(firsts[0])


def _refuse_ours(folder: Path) -> None:
    if (folder / MANIFEST).exists():
        raise CheckpointError(f"{folder} is converted already; load it as it is, or give the source that it was made from")
    if folder.resolve().name.endswith(SUFFIX):
        raise CheckpointError(f"{folder} is an unfinished conversion; give its source again, with the same destination, to finish it")
