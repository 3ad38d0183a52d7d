"""Conversion: any supported source, streamed group by group into a checkpoint folder, resumable and verified."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from l4jax.checkpoints.licences import write_notice
from l4jax.checkpoints.open import open_source
from l4jax.checkpoints.source import CheckpointError, Recipe, Source
from l4jax.checkpoints.store import DTYPES, StoredWeight, checksum, group_weights, load_group, save_group, write_manifest
from l4jax.config import config_to_json
from l4jax.model.llama import Llama
from l4jax.model.weights import weight_specs

DType = Literal["float32", "bfloat16", "float16"]
Progress = Callable[[int, int, str], None]
"""Called with (bytes of weights done, bytes in all, the weight just done)."""


def convert(
    source_path: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    dtype: DType | None = None,
    progress: Progress | None = None,
) -> None:
    """Convert a Hugging Face, Meta or GGUF checkpoint into a folder that ``l4jax.load`` reads.

    ``dtype`` None keeps what the source has (quantised GGUF tensors become float32). Everything is made in
    ``DEST.partial``, verified there, and renamed to ``DEST`` at the end; an interrupted conversion goes on where it stopped
    when the same call is made again. Raises :class:`CheckpointError` for a source that cannot be used, a destination that
    exists or is being written, and a full disk.
    """
    target = Path(destination)
    if target.exists():
        raise CheckpointError(f"{target} exists already; choose another destination, or remove it first")
    source = open_source(source_path)
    check_complete(source)
    partial = target.with_name(target.name + ".partial")
    try:
        with _locked(partial):
            weights = _write_groups(source, partial, dtype, progress)
            text_files = source.write_text_files(partial)
            text_files += write_notice(partial, architecture=source.config.architecture, source_format=source.format)
            _verify(partial, weights)
            write_manifest(partial, source_format=source.format, config=source.config, weights=weights, text_files=text_files)
            partial.replace(target)
            # Last: a conversion killed before this line can go on, one killed after it is complete.
            (target / _PROGRESS).unlink()
            (target / _LOCK).unlink()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(
                f"the disk of {target} is full; free some space and run the same conversion again, it goes on where it stopped"
            ) from error
        raise


def check_complete(source: Source) -> None:
    """Every weight has a recipe, every source tensor is used exactly once or ignored by design."""
    wanted = set(weight_specs(Llama(source.config)))
    missing = sorted(wanted - source.recipes.keys())
    if missing:
        raise CheckpointError(f"the source has no tensors for {len(missing)} weights, {missing[0]} the first; is a shard missing?")
    used = Counter(key for recipe in source.recipes.values() for key in recipe.keys)
    absent = sorted(used.keys() - source.tensors.keys())
    if absent:
        raise CheckpointError(f"the source lacks {len(absent)} tensors, {absent[0]} the first; is a shard missing?")
    twice = sorted(key for key, times in used.items() if times > 1)
    unused = sorted(source.tensors.keys() - used.keys() - source.ignored)
    if twice or unused:
        key = (twice or unused)[0]
        raise CheckpointError(
            f"source tensor {key} would be used {used[key]} times; expected once: this is not a checkpoint of the architecture it names"
        )


_PROGRESS = "progress.json"
_BLOCK = 1 << 24
_LOCK = "lock"


@contextmanager
def _locked(partial: Path) -> Iterator[None]:
    """Have the unfinished destination to oneself."""
    partial.mkdir(parents=True, exist_ok=True)
    with (partial / _LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{partial} is being written by another conversion; wait for it to end") from None
        yield


def _write_groups(source: Source, partial: Path, dtype: DType | None, progress: Progress | None) -> dict[str, StoredWeight]:
    """Write the groups that are not there yet; what is known of all weights."""
    identity = _identity(source, dtype)
    state = _read_progress(partial / _PROGRESS)
    if state is None or state["source"] != identity:
        # Another source or dtype, or nothing usable: start anew.
        _empty(partial)
        state = {"source": identity, "weights": {}}
    weights = {name: StoredWeight(**{**w, "shape": tuple(w["shape"])}) for name, w in state["weights"].items()}
    nbytes = {name: _nbytes(source, recipe, dtype) for name, recipe in source.recipes.items()}
    specs = weight_specs(Llama(source.config))
    done, total = 0, sum(nbytes.values())
    for group, names in group_weights(nbytes).items():
        directory = partial / "weights" / group
        if not (weights.keys() >= set(names) and directory.is_dir()):
            for unfinished in (partial / "weights").glob(f"{group}*"):
                shutil.rmtree(unfinished)
            arrays = {name: _make(source, name, source.recipes[name], dtype) for name in names}
            for name, array in arrays.items():
                if name in specs and array.shape != specs[name].shape:
                    raise CheckpointError(
                        f"weight {name} would have shape {array.shape}; expected {specs[name].shape} by the configuration"
                    )
                weights[name] = StoredWeight(group, array.shape, array.dtype.name, checksum(array))
            save_group(directory, arrays)
            del arrays
            state["weights"] = {name: dataclasses.asdict(weight) for name, weight in weights.items()}
            _write_atomically(partial / _PROGRESS, json.dumps(state))
        done += sum(nbytes[name] for name in names)
        if progress is not None:
            progress(done, total, names[-1])
    return weights


def _empty(partial: Path) -> None:
    """Remove what an earlier conversion left, but for the lock."""
    for entry in partial.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != _LOCK:
            entry.unlink()


def _make(source: Source, name: str, recipe: Recipe, dtype: DType | None) -> np.ndarray:
    array = np.ascontiguousarray(recipe.assemble([source.read(key) for key in recipe.keys]))
    if not _all_finite(array):
        raise CheckpointError(f"weight {name}, made of {', '.join(recipe.keys)}, has values that are not finite; the source is damaged")
    if dtype is not None and array.dtype != DTYPES[dtype]:
        with np.errstate(over="ignore"):
            array = array.astype(DTYPES[dtype])
        if not _all_finite(array):
            raise CheckpointError(f"weight {name} has values too large for {dtype}; choose another dtype")
    if array.dtype.name not in DTYPES:
        raise CheckpointError(f"weight {name} is {array.dtype.name}; expected {', '.join(DTYPES)}; choose a dtype to convert to")
    return array


def _all_finite(array: np.ndarray) -> bool:
    """In blocks: a mask of a whole expert tensor would be half its size again."""
    flat = array.reshape(-1)
    return all(np.isfinite(flat[start : start + _BLOCK]).all() for start in range(0, flat.size, _BLOCK))


def _verify(partial: Path, weights: Mapping[str, StoredWeight]) -> None:
    """Read every group back from disk and compare shapes, dtypes and checksums with what was written."""
    groups: dict[str, list[str]] = {}
    for name, weight in weights.items():
        groups.setdefault(weight.group, []).append(name)
    for group, names in groups.items():
        arrays = load_group(partial / "weights" / group, names)
        for name in names:
            array, weight = arrays[name], weights[name]
            if (array.shape, array.dtype.name, checksum(array)) != (weight.shape, weight.dtype, weight.crc32):
                shutil.rmtree(partial / "weights" / group)
                raise CheckpointError(
                    f"weight {name} reads back from {partial} other than it was written; check the disk and run the conversion again"
                )


def _identity(source: Source, dtype: DType | None) -> dict[str, Any]:
    """What a resumed conversion must have in common with the interrupted one."""
    tensors = {key: [list(info.shape), info.dtype.name] for key, info in source.tensors.items()}
    values: dict[str, Any] = {"format": source.format, "dtype": dtype, "config": config_to_json(source.config), "tensors": tensors}
    return json.loads(json.dumps({**values, "files": source.fingerprint}))


def _read_progress(path: Path) -> dict[str, Any] | None:
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return state


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _nbytes(source: Source, recipe: Recipe, dtype: DType | None) -> int:
    """Bytes of the weight that a recipe makes."""
    infos = [source.tensors[key] for key in recipe.keys]
    return sum(math.prod(info.shape) * (info.dtype if dtype is None else DTYPES[dtype]).itemsize for info in infos)
