"""Conversion: any supported source, streamed group by group into a checkpoint folder, resumable and verified."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from l4jax.checkpoints.licences import write_notice
from l4jax.checkpoints.open import open_head, open_source
from l4jax.checkpoints.partial import LOCK, WEIGHTS, check_destination, unfinished, write_atomically
from l4jax.checkpoints.source import CheckpointError, Recipe, Source
from l4jax.checkpoints.store import (
    DTYPES,
    TABLE_DTYPES,
    StoredWeight,
    checksum,
    group_weights,
    groups_of,
    load_verified,
    module_of,
    save_group,
    write_manifest,
)
from l4jax.checkpoints.text import check_text_of
from l4jax.config import decoder_of, flat_fields
from l4jax.config_formats.eagle import NO_ANSWERS, HeadAnswers
from l4jax.decoding.plan import UNMEASURED, TableJson
from l4jax.files import FileError
from l4jax.interrupts import kept_interrupts
from l4jax.model.weights import weight_specs
from sharding.words import counted

DType = Literal["float32", "bfloat16", "float16"]
Progress = Callable[[Literal["converting", "verifying"], int, int], None]
"""Called with the stage, how much of it is done and its total: in bytes of weights, then in groups."""


def convert(
    source_path: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    dtype: DType | None = None,
    target: str | os.PathLike[str] | None = None,
    answers: HeadAnswers = NO_ANSWERS,
    without_tokenizer: bool = False,
    speculation: TableJson = UNMEASURED,
    progress: Progress | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> None:
    """Convert a Hugging Face, Meta or GGUF checkpoint, or an EAGLE head, into a folder that ``l4jax.load`` reads.

    With ``target``, a converted model, the source is a head that was trained for it; ``answers`` are for what its files leave open,
    ``speculation`` says how to speculate with it by default. ``note`` is called, before weights are converted, with each line that the
    user should know about how the source is read, and about what an interrupted conversion has left.

    ``without_tokenizer``: leave tokenizer and chat template out, so that a model whose own are not supported takes token ids.

    ``dtype`` None keeps what the source has (quantised GGUF tensors become float32). Everything is made in ``DEST.partial``,
    verified there, and renamed to ``DEST`` at the end. A conversion that is interrupted among the weights continues there when the same
    call is made again; one that ends earlier leaves nothing. Raises :class:`CheckpointError` for a source that cannot be used, a
    destination that exists, is being written or cannot be written, and a full disk; KeyboardInterrupt for every Ctrl-C.
    """
    result = check_destination(destination)
    source = open_checked(source_path, target, answers, without_tokenizer=without_tokenizer)
    for line in source.notes:
        note(line)
    with unfinished(result, "conversion") as partial, kept_interrupts() as check_interrupts:
        nbytes = {name: _nbytes(source, recipe, dtype) for name, recipe in source.recipes.items()}
        groups = group_weights(nbytes)
        shapes = {name: spec.shape for name, spec in weight_specs(module_of(source.config)).items()}
        made = _resume(partial, _identity(source, dtype), groups, shapes, note)
        text_files = source.write_other_files(partial)
        if not without_tokenizer:
            text_files += source.write_tokenizer(partial)
        architecture = decoder_of(source.config).architecture
        text_files += write_notice(partial, text_files, architecture=architecture, source_format=source.format)
        weights = _write_groups(source, partial, dtype, nbytes, groups, made, progress, check_interrupts)
        _verify(partial, weights, progress, check_interrupts)
        write_manifest(
            partial, source_format=source.format, config=source.config, weights=weights, text_files=text_files, speculation=speculation
        )
        check_interrupts()
        partial.replace(result)
        # These are removed last: a conversion that is killed before the renaming can continue, and after the renaming it is complete.
        (result / _PROGRESS).unlink()
        (result / LOCK).unlink()


def open_checked(
    source_path: str | os.PathLike[str], target: str | os.PathLike[str] | None, answers: HeadAnswers, *, without_tokenizer: bool
) -> Source:
    """Open the source of :func:`convert`, with its arguments, and check all that can be checked without reading the weights."""
    if target is not None and without_tokenizer:
        raise CheckpointError("an EAGLE head has no tokenizer to convert it without; leave --without-tokenizer out")
    source: Source = open_source(source_path) if target is None else open_head(source_path, target, answers)
    check_complete(source)
    # Before the weights: an unusable tokenizer or template should not be found hours later.
    check_text_of(source, Path(source_path), tokenizer=not without_tokenizer)
    return source


def check_complete(source: Source) -> None:
    """Raise :class:`CheckpointError` unless every source tensor is used exactly once, or ignored by design."""
    used = Counter(key for recipe in source.recipes.values() for key in recipe.keys)
    assert source.recipes.keys() >= weight_specs(module_of(source.config)).keys() and source.tensors.keys() >= used.keys()
    twice = sorted(key for key, times in used.items() if times > 1)
    unused = sorted(source.tensors.keys() - used.keys() - source.ignored)
    if twice or unused:
        key = (twice or unused)[0]
        raise CheckpointError(
            f"source tensor {key} would be used {used[key]} times; expected once: this is not a checkpoint of the architecture it names"
        )


_PROGRESS = "progress.json"
_BLOCK = 1 << 24


@dataclasses.dataclass(frozen=True)
class _Made:
    """What ``progress.json`` holds: all that decides the result, and the weights of the groups that are whole."""

    source: Mapping[str, Any]
    weights: Mapping[str, StoredWeight]


def _resume(
    partial: Path,
    identity: Mapping[str, Any],
    groups: Mapping[str, Collection[str]],
    shapes: Mapping[str, tuple[int, ...]],
    note: Callable[[str], None],
) -> _Made:
    """Return what an earlier conversion of the same source to the same dtype has done; remove everything else from the folder.

    ``note`` is told what has become of an earlier conversion's weights; ``groups``: the names of the weights in each group;
    ``shapes``: those of the model's weights.
    """
    file, directory = partial / _PROGRESS, partial / WEIGHTS
    made, is_damaged = _read_made(file), False
    if made is None:
        made, is_damaged = _Made(identity, {}), file.exists()
    differing = [name for name in identity if made.source.get(name) != identity[name]]
    # A group that was not what had been written is removed, and other versions of l4jax may group or lay out weights otherwise.
    found = groups_of({} if differing else {n: w for n, w in made.weights.items() if shapes.get(n, tuple(w.shape)) == tuple(w.shape)})
    whole = {group for group, names in groups.items() if set(names) == set(found.get(group, ())) and (directory / group).is_dir()}
    made = _Made(identity, {name: weight for name, weight in made.weights.items() if weight.group in whole})
    if directory.exists():
        other = "of a source that differs or has changed, with other options, or by another version of l4jax"
        why = "to another dtype" if differing == ["dtype"] else other
        if is_damaged:
            said = f"cannot be continued, because its {_PROGRESS} is damaged: its weights are removed, and all are converted anew"
        elif differing:
            said = f"is of a conversion {why}: its weights are removed, and all are converted anew"
        elif not whole:
            said = "has no weights that can be used: all are converted anew"
        else:
            said = f"is continued: {len(made.weights)} of {counted(sum(map(len, groups.values())), 'weight')} were converted before"
        note(f"{partial} {said}")
    _remove_all_but({LOCK, _PROGRESS, WEIGHTS} if whole else {LOCK}, partial)
    if whole:
        _remove_all_but(whole, directory)
    return made


def _remove_all_but(kept: Collection[str], folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.name not in kept:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def _write_groups(
    source: Source,
    partial: Path,
    dtype: DType | None,
    nbytes: Mapping[str, int],
    groups: Mapping[str, Collection[str]],
    made: _Made,
    progress: Progress | None,
    check_interrupts: Callable[[], None],
) -> dict[str, StoredWeight]:
    """Write the groups that are missing; return the entries of all weights."""
    weights = dict(made.weights)
    specs = weight_specs(module_of(source.config))
    tables = {name for name, spec in specs.items() if spec.init == "numbers"}
    _check_space(partial, sum(nbytes[name] for name in nbytes if name not in weights))
    done, total = 0, sum(nbytes.values())
    if progress is not None:
        progress("converting", done, total)
    for group, names in groups.items():
        if not weights.keys() >= set(names):
            arrays = {}
            for name in names:
                check_interrupts()
                arrays[name] = _make(source, name, source.recipes[name], dtype, is_table=name in tables)
            for name, array in arrays.items():
                if name in specs and array.shape != specs[name].shape:
                    raise CheckpointError(
                        f"weight {name} would have shape {array.shape}; expected {specs[name].shape} by the configuration"
                    )
                weights[name] = StoredWeight(group, array.shape, array.dtype.name, checksum(array))
            save_group(partial / WEIGHTS / group, arrays)
            del array, arrays
            entries = {name: dataclasses.asdict(weight) for name, weight in weights.items()}
            write_atomically(partial / _PROGRESS, json.dumps({"source": made.source, "weights": entries}))
        done += sum(nbytes[name] for name in names)
        if progress is not None:
            progress("converting", done, total)
    return weights


def _check_space(partial: Path, needed: int) -> None:
    free = shutil.disk_usage(partial).free
    if needed > free:
        raise CheckpointError(
            f"{partial} needs {needed / 1e9:.2f} GB more and its disk has {free / 1e9:.2f} GB free; "
            "free some space and run the same conversion again"
        )


def _make(source: Source, name: str, recipe: Recipe, dtype: DType | None, *, is_table: bool) -> np.ndarray:
    """Make a weight; cast it to ``dtype``, unless it is a table of token ids."""
    made_of = f"weight {name}, made of {', '.join(recipe.keys)},"
    array = np.ascontiguousarray(recipe.assemble([_read(source, key) for key in recipe.keys]))
    expected = [np.dtype(table) for table in TABLE_DTYPES] if is_table else [*DTYPES.values(), np.dtype(np.float64)]
    if array.dtype not in expected:
        raise CheckpointError(f"{made_of} is {array.dtype.name}; expected {', '.join(kind.name for kind in expected)}")
    if is_table:
        return array
    if not _all_finite(array):
        raise CheckpointError(f"{made_of} has values that are not finite; the source is damaged")
    if dtype is None and array.dtype not in DTYPES.values():
        raise CheckpointError(f"weight {name} is {array.dtype.name}; expected {', '.join(DTYPES)}; choose a dtype to convert to")
    if dtype is not None and array.dtype != DTYPES[dtype]:
        with np.errstate(over="ignore"):
            array = array.astype(DTYPES[dtype])
        if not _all_finite(array):
            raise CheckpointError(f"weight {name} has values too large for {dtype}; choose another dtype")
    return array


def _read(source: Source, key: str) -> np.ndarray:
    """Read a tensor, which has the stated shape and dtype, byte order included: values are never reinterpreted."""
    array = source.read(key)
    assert (array.shape, array.dtype) == (source.tensors[key].shape, source.tensors[key].dtype)
    return array


def _all_finite(array: np.ndarray) -> bool:
    """Whether all values are finite. Looks at a block at a time: a mask of a whole expert tensor would take half the tensor's memory."""
    flat = array.reshape(-1)
    return all(np.isfinite(flat[start : start + _BLOCK]).all() for start in range(0, flat.size, _BLOCK))


def _verify(partial: Path, weights: Mapping[str, StoredWeight], progress: Progress | None, check_interrupts: Callable[[], None]) -> None:
    """Read every group back from disk and compare shapes, dtypes and checksums with what was written."""
    groups = groups_of(weights)
    for done, (group, names) in enumerate(groups.items(), start=1):
        directory = partial / WEIGHTS / group
        check_interrupts()
        try:
            load_verified(directory, {name: weights[name] for name in names})
        except FileError as error:
            shutil.rmtree(directory)  # so that the next run writes it again
            raise CheckpointError(
                f"{directory} reads back differently from what was written; check the disk and run the conversion again"
            ) from error
        if progress is not None:
            progress("verifying", done, len(groups))


def _identity(source: Source, dtype: DType | None) -> dict[str, Any]:
    """Everything that must be the same for a conversion to continue an interrupted one."""
    tensors = {key: [list(info.shape), info.dtype.name] for key, info in source.tensors.items()}
    # Not where the configuration's values were read: other versions of l4jax may word that otherwise.
    values: dict[str, Any] = {"format": source.format, "dtype": dtype, "config": flat_fields(source.config), "tensors": tensors}
    return json.loads(json.dumps({**values, "files": source.fingerprint}))


def _read_made(file: Path) -> _Made | None:
    """Read ``progress.json``; None if it is absent, as it is until a first group is whole, or damaged."""
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
        weights = {name: StoredWeight(**{**entry, "shape": tuple(entry["shape"])}) for name, entry in state["weights"].items()}
        return _Made(dict(state["source"]), weights)
    except (FileNotFoundError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return None


def _nbytes(source: Source, recipe: Recipe, dtype: DType | None) -> int:
    """Return the bytes of the weight that a recipe makes."""
    infos = [source.tensors[key] for key in recipe.keys]
    return sum(math.prod(info.shape) * (info.dtype if dtype is None else DTYPES[dtype]).itemsize for info in infos)
