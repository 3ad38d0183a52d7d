"""The tensors of a folder's safetensors files: one file, or shards with an index."""

from __future__ import annotations

import json
import math
import operator
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from l4jax.checkpoints.files import WeightFile, listed, not_read, weight_names
from l4jax.checkpoints.source import CheckpointError, TensorInfo
from l4jax.files import FileError, read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
_TABLES = {"I64": np.dtype(np.int64), "I32": np.dtype(np.int32), "BOOL": np.dtype(np.bool_)}  # of a drafter's vocabulary
_BLOCK = 1 << 22


class SafetensorsFiles:
    """The tensors of a folder's safetensors files.

    A ``model.safetensors`` is read alone, even if an index and its shards are in the folder too, as transformers does: saving a sharded
    model again in one file leaves the old shards there. ``notes`` says what is not read.
    """

    def __init__(self, directory: Path) -> None:
        self._entries: dict[str, _Entry] = {}
        self.fingerprint: dict[str, list[int]] = {}
        for path, expected in _weight_files(directory).items():
            file = WeightFile(path)
            entries = _read_header(file)
            if expected is not None and expected != entries.keys():
                key = min(expected ^ entries.keys())
                said = "lacks" if key in expected else "also has"
                where = "puts there" if key in expected else "does not put there"
                raise CheckpointError(f"{path} {said} tensor {key}, which the index {where}; fetch the index and the shard again")
            self._entries |= entries
            self.fingerprint[path.name] = file.fingerprint
        self.tensors: Mapping[str, TensorInfo] = {key: entry.info for key, entry in self._entries.items()}
        self.notes = not_read(directory, {*self.fingerprint, *(() if SINGLE in self.fingerprint else (INDEX,))})

    def read(self, key: str) -> np.ndarray:
        """Return the tensor."""
        entry = self._entries[key]
        return entry.file.read(entry.offset, entry.info.shape, entry.info.dtype)

    def same_values(self, a: str, b: str) -> bool:
        """Whether two tensors have the same shape and values, whatever their dtypes. Reads blocks of them at a time."""
        shape = self.tensors[a].shape
        if shape != self.tensors[b].shape:
            return False
        first, second, size = self._entries[a], self._entries[b], math.prod(shape)
        return all(np.array_equal(first.block(start, size), second.block(start, size)) for start in range(0, size, _BLOCK))


class _Entry:
    """A tensor, and where its bytes begin in which file."""

    def __init__(self, file: WeightFile, offset: int, info: TensorInfo) -> None:
        self.file = file
        self.offset = offset
        self.info = info

    def block(self, start: int, size: int) -> np.ndarray:
        """Return a block of the tensor's ``size`` values in C order, from value ``start`` on, as float32."""
        count = min(_BLOCK, size - start)
        return self.file.read(self.offset + start * self.info.dtype.itemsize, (count,), self.info.dtype).astype(np.float32)


def _weight_files(directory: Path) -> dict[Path, set[str] | None]:
    """Return the safetensors files of a folder, and the tensors that the index puts in each (None without an index)."""
    index, single = directory / INDEX, directory / SINGLE
    if single.exists() or single.is_symlink():
        return {single: None}
    if index.exists() or index.is_symlink():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(f"{index} has no weight_map from tensors to files; fetch it again")
        files: dict[Path, set[str]] = {}
        for key, name in weight_map.items():
            files.setdefault(directory / name, set()).add(key)
        absent = sorted(file.name for file in files if not file.exists() and not file.is_symlink())
        if absent or not files:
            raise CheckpointError(f"{directory} lacks {absent[0] if absent else 'shards'}, which {INDEX} names; fetch the missing shard")
        return {**files}
    others = weight_names(directory)
    if others:
        raise CheckpointError(
            f"{directory} has {listed(others)}; expected {SINGLE}, or {INDEX} and its shards: "
            "fetch those, or save the model as safetensors with transformers' save_pretrained"
        )
    raise CheckpointError(f"{directory} has no {SINGLE} and no {INDEX}; expected one of them beside config.json")


def _read_header(file: WeightFile) -> dict[str, _Entry]:
    """Return every tensor of a safetensors file; the values are not read.

    The rules are the safetensors library's: each name occurs once, and the tensors' bytes fill the file without gaps or overlaps.
    """
    prefix = file.read(0, (min(8, file.size),), np.dtype(np.uint8)).tobytes()
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else file.size
    header = file.read(8, (length,), np.dtype(np.uint8)).tobytes() if 8 + length <= file.size else b""
    try:
        described = json.loads(header, object_pairs_hook=lambda pairs: _once(file.path, pairs))
        spans = {key: _span(file.path, key, tensor) for key, tensor in described.items() if key != "__metadata__"}
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        if isinstance(error, FileError):
            raise
        raise CheckpointError(f"{file.path} is truncated or not a safetensors file: its header cannot be read; fetch it again") from error
    end = 0
    for key, (begin, stop, _) in sorted(spans.items(), key=lambda item: item[1][:2]):
        if begin != end:
            raise CheckpointError(f"{file.path}: the bytes of tensor {key} begin at {begin}; expected {end}, where those before end")
        end = stop
    if 8 + length + end > file.size:
        raise CheckpointError(
            f"{file.path} is cut off or damaged: it has {file.size} bytes and its tensors end at {8 + length + end}; fetch it again"
        )
    if 8 + length + end < file.size:
        raise CheckpointError(f"{file.path} has {file.size} bytes and its tensors end at {8 + length + end}; fetch it again")
    return {key: _Entry(file, 8 + length + begin, info) for key, (begin, _, info) in spans.items()}


def _once(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object of the header. Raises :class:`CheckpointError` for a name that occurs twice: ``dict`` would keep the last."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise CheckpointError(f"{path} describes {next(name for name in names if names.count(name) > 1)} twice; fetch it again")
    return values


def _span(path: Path, key: str, tensor: Mapping[str, Any]) -> tuple[int, int, TensorInfo]:
    """Return (begin, end) of a tensor's bytes, counted from the end of the header, and its shape and dtype."""
    name, shape, (begin, end) = tensor["dtype"], tuple(map(operator.index, tensor["shape"])), map(operator.index, tensor["data_offsets"])
    known = {**_DTYPES, **_TABLES}
    if name not in known:
        raise CheckpointError(
            f"{path.name}: tensor {key} has dtype {name}; expected {', '.join(_DTYPES)}: "
            "quantised weights are not supported, fetch the model in bfloat16"
        )
    if min((begin, *shape)) < 0 or end - begin != math.prod(shape) * known[name].itemsize:
        raise CheckpointError(
            f"{path.name}: tensor {key} has {end - begin} bytes; its shape and dtype need another number; fetch the file again"
        )
    return begin, end, TensorInfo(shape, known[name])
