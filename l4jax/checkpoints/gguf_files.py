"""The metadata and tensors of a GGUF file, or of all parts of one that ``gguf-split`` has split."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, override

import ml_dtypes
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType, GGUFEndian, GGUFReader, ReaderField, dequantize

from l4jax.checkpoints.files import WeightFile
from l4jax.checkpoints.source import CheckpointError, TensorInfo
from sharding.words import counted

_PLAIN = {
    GGMLQuantizationType.F32: np.dtype(np.float32),
    GGMLQuantizationType.F16: np.dtype(np.float16),
    GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}
_QUANTIZED = {getattr(GGMLQuantizationType, name) for name in ("Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K")}
_KNOWN = "one of " + ", ".join(sorted(kind.name for kind in (*_PLAIN, *_QUANTIZED)))
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


class _CutOffError(Exception):
    """A file ends before byte ``needed``: it is cut off, or a length in it is damaged."""

    def __init__(self, needed: int) -> None:
        super().__init__(needed)
        self.needed = needed


class _Reader(GGUFReader):
    """A GGUFReader that says where a file is cut off. The library reads on into empty arrays, and fails in numpy's words."""

    @override
    def _get(self, offset: int, dtype: npt.DTypeLike, count: int = 1, *arguments: Any, **options: Any) -> Any:
        end = int(offset) + int(count) * np.dtype(dtype).itemsize
        if end > len(self.data):
            raise _CutOffError(end)
        return super()._get(offset, dtype, count, *arguments, **options)


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """Where a tensor's bytes begin, and how they are stored: ``stored`` is the shape in bytes of a quantised tensor."""

    file: WeightFile
    offset: int
    kind: GGMLQuantizationType
    stored: tuple[int, ...]
    info: TensorInfo


class GGUFFiles:
    """An opened GGUF file, with the other parts that belong to it. Quantised tensors are read as float32.

    ``metadata``: of the first part, the only one that describes the model, as plain Python values. Raises :class:`CheckpointError` for
    a file that is damaged or big-endian, and for a part that is missing or of another split.
    """

    def __init__(self, path: Path) -> None:
        self._tensors: dict[str, _Tensor] = {}
        self.fingerprint: dict[str, list[int]] = {}
        self.metadata: Mapping[str, Any] = {}
        paths = parts_of(path)
        for number, part in enumerate(paths):
            file = WeightFile(part)
            metadata, tensors = _read(file)
            _check_part(part, metadata, number, len(paths))
            twice = sorted(self._tensors.keys() & tensors.keys())
            if twice:
                raise CheckpointError(f"{part} has tensor {twice[0]}, which an earlier part has too: they are not parts of one file")
            self._tensors |= tensors
            self.fingerprint[part.name] = file.fingerprint
            if number == 0:
                self.metadata = metadata
        expected = self.metadata.get("split.tensors.count", len(self._tensors))
        if len(self._tensors) != expected:
            raise CheckpointError(
                f"the parts of {paths[0]} have {counted(len(self._tensors), 'tensor')}; expected {expected}: not of one file"
            )
        self.tensors: Mapping[str, TensorInfo] = {name: tensor.info for name, tensor in self._tensors.items()}

    def read(self, key: str) -> np.ndarray:
        """Return the tensor, dequantised to float32 unless it is stored plainly."""
        tensor = self._tensors[key]
        if tensor.kind in _PLAIN:
            return tensor.file.read(tensor.offset, tensor.info.shape, tensor.info.dtype)
        return dequantize(tensor.file.read(tensor.offset, tensor.stored, np.dtype(np.uint8)), tensor.kind).reshape(tensor.info.shape)


def parts_of(path: Path) -> list[Path]:
    """Return all parts of the split file that ``path`` belongs to by its name; ``path`` alone if it is whole."""
    named = _PART.fullmatch(path.name)
    if named is None:
        return [path]
    parts = [path.with_name(f"{named[1]}-{number:05}-of-{named[3]}.gguf") for number in range(1, int(named[3]) + 1)]
    if path not in parts:
        raise CheckpointError(f"{path} is named as part {int(named[2])} of {len(parts)}, which cannot be; rename it")
    missing = [part.name for part in parts if not part.exists() and not part.is_symlink()]
    if missing:
        raise CheckpointError(f"{path} is one of {len(parts)} parts, and {', '.join(missing)} is not beside it; fetch every part")
    return parts


def _read(file: WeightFile) -> tuple[dict[str, Any], dict[str, _Tensor]]:
    """Read the metadata and the tensors' places of one file."""
    path = file.path
    try:
        reader = _Reader(path)
    except _CutOffError as error:
        raise CheckpointError(
            f"{path} is cut off or damaged: it has {counted(file.size, 'byte')}, and needs at least {error.needed:,}; fetch it again"
        ) from error
    except (ValueError, IndexError, KeyError, OSError) as error:
        unknown = re.search(r"(\d+)\)? is not a valid GGMLQuantizationType", str(error))
        if unknown:
            raise CheckpointError(f"{path}: a tensor is quantised as type {unknown[1]}, which is unknown; expected {_KNOWN}") from error
        raise CheckpointError(f"{path} is not a GGUF file, or is damaged ({error}); fetch it again") from error
    if reader.endianess is not GGUFEndian.LITTLE:
        # Writers of such files disagree on the byte order of BF16 and of block scales, so the values cannot be known.
        raise CheckpointError(
            f"{path} is a big-endian GGUF file; expected a little-endian one: fetch that, or convert the model again without --bigendian"
        )
    tensors = {}
    for tensor in reader.tensors:
        kind = tensor.tensor_type
        if kind not in _PLAIN and kind not in _QUANTIZED:
            raise CheckpointError(f"{path}: tensor {tensor.name} is quantised as {kind.name}; expected {_KNOWN}")
        info = TensorInfo(tuple(int(n) for n in reversed(tensor.shape)), _PLAIN.get(kind, np.dtype(np.float32)))
        assert kind not in _PLAIN or math.prod(info.shape) * info.dtype.itemsize == tensor.n_bytes
        tensors[tensor.name] = _Tensor(file, tensor.data_offset, kind, tensor.data.shape, info)
    return {name: _value(path, name, field) for name, field in reader.fields.items()}, tensors


def _value(path: Path, name: str, field: ReaderField) -> Any:
    try:
        return field.contents()
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{path}: its metadata {name} is not UTF-8 text ({error}); fetch it again, or convert the model again"
        ) from error


def _check_part(path: Path, metadata: Mapping[str, Any], number: int, count: int) -> None:
    """Raise :class:`CheckpointError` unless a file says that it is the part that its name says; parts count from 0."""
    own_number, own_count = metadata.get("split.no", 0), metadata.get("split.count") or 1
    if (own_number, own_count) == (number, count):
        return
    if own_count == 1:
        raise CheckpointError(f"{path} is a whole GGUF file, named as if it were a part; rename it")
    raise CheckpointError(
        f"{path} is part {own_number + 1} of {own_count} of a split file; "
        f"expected a name that ends in -{own_number + 1:05}-of-{own_count:05}.gguf, and the other parts beside it"
    )
