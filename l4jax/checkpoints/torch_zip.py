"""Tensors of a ``torch.save`` file, without torch and without ever running code from it.

The file is an uncompressed zip archive: a pickle that describes the tensors, and an entry of raw bytes for each storage. The
unpickler knows a short list of names, refuses all others, and only records where each tensor's bytes are.
"""

from __future__ import annotations

import collections
import dataclasses
import io
import operator
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from l4jax.checkpoints.files import WeightFile
from l4jax.checkpoints.source import CheckpointError, TensorInfo
from l4jax.files import FileError, reading

_STORAGES = {
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    # Not weights, but statistics and the like that some files have besides.
    "DoubleStorage": np.dtype(np.float64),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}


class _Sealed:
    """An object whose state a pickle cannot set. It can set the state of every other object that it is given."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("it sets the state of an object that has none")


class _Known(_Sealed):
    """The callable that a name in the pickle refers to. A function or class itself would have a state to set."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)


class _StorageType(_Sealed):
    """The name of a storage class."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name


class _Opaque:
    """Replaces an object that is never used: an ``_extra_state`` buffer. The only class given to pickles, which create it by NEWOBJ."""

    __slots__ = ()

    def __new__(cls, *_: Any) -> _Opaque:
        return super().__new__(cls)

    def __setstate__(self, _: Any) -> None:
        pass


@dataclasses.dataclass(frozen=True)
class _Storage(_Sealed):
    key: str
    dtype: np.dtype
    size: int


@dataclasses.dataclass(frozen=True)
class TorchTensor(_Sealed):
    """A tensor's place in the archive; offset and strides are in elements of its storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def info(self) -> TensorInfo:
        """Shape and dtype."""
        return TensorInfo(self.shape, self.storage.dtype)

    @property
    def last(self) -> int:
        """The last element of the storage that it reaches, for a tensor that is not empty."""
        return self.offset + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> TorchTensor:
    # requires_grad, hooks and, third, bits that change the meaning of the bytes: negated, conjugated.
    if any(rest[2:]):
        raise pickle.UnpicklingError("a tensor is a negated or conjugated view")
    tensor = TorchTensor(storage, operator.index(offset), tuple(map(operator.index, shape)), tuple(map(operator.index, strides)))
    if not isinstance(storage, _Storage) or len(tensor.shape) != len(tensor.strides) or min((0, *tensor.shape)) < 0:
        raise pickle.UnpicklingError("a tensor has no storage, or a shape that does not fit its strides")
    return tensor


def _rebuild_parameter(tensor: Any, *_: Any) -> Any:
    return tensor


_KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("_io", "BytesIO"): _Opaque,
    ("_codecs", "encode"): _Opaque,  # how pickle's protocol 2 writes the bytes of such a buffer
}


_ENCRYPTED = 0x41
"""The flags of zip entries for the two kinds of encryption."""

_QUANTISED = ("_rebuild_tensor_v3", "_rebuild_qtensor")
"""What torch rebuilds tensors of float8 and of its own quantised types with."""


class _Unpickler(pickle.Unpickler):
    """Looks up only the names above."""

    def __init__(self, stream: io.BytesIO, path: Path) -> None:
        super().__init__(stream, encoding="utf-8")
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _STORAGES:
            return _StorageType(name)
        if module == "torch._utils" and name in _QUANTISED:
            raise CheckpointError(f"{self._path} holds quantised weights ({name}), which are not supported; fetch the model in bfloat16")
        if (module, name) not in _KNOWN:
            raise CheckpointError(
                f"{self._path}: its pickle asks for {module}.{name}; expected only tensors: do not trust this file (nothing was run)"
            )
        known = _KNOWN[module, name]
        return known if known is _Opaque else _Known(known)

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage_type, key, _, size = pid
        if kind != "storage" or not isinstance(storage_type, _StorageType):
            raise CheckpointError(f"{self._path}: its pickle refers to {kind!r}; expected a storage of {', '.join(_STORAGES)}")
        return _Storage(str(key), _STORAGES[storage_type.name], operator.index(size))


_BROKEN = (
    *(pickle.UnpicklingError, EOFError, AttributeError, LookupError, TypeError, ValueError),
    *(MemoryError, OverflowError, RecursionError),
)
"""What unpickling raises for a meaningless stream of bytes."""


class TorchFile:
    """An opened ``torch.save`` file that holds a dictionary of tensors. Raises :class:`CheckpointError` for any other file."""

    def __init__(self, path: Path) -> None:
        self._file = WeightFile(path)
        self.fingerprint = self._file.fingerprint
        try:
            with reading(path), zipfile.ZipFile(path) as archive:
                _check_stored(archive, path)
                self._offsets = _storage_offsets(archive, path)
                pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
                if len(pickles) != 1:
                    raise CheckpointError(f"{path} has {len(pickles)} entries named data.pkl; expected one, as torch.save writes")
                loaded = _Unpickler(io.BytesIO(archive.read(pickles[0])), path).load()
        except (zipfile.BadZipFile, struct.error, NotImplementedError) as error:
            raise CheckpointError(f"{path} is truncated or was not written by torch.save since 1.6 ({error}); fetch it again") from error
        except _BROKEN as error:
            if isinstance(error, FileError):
                raise
            raise CheckpointError(f"{path}: its pickle does not describe tensors ({error!r}); expected a state dictionary") from error
        if not isinstance(loaded, dict):
            raise CheckpointError(f"{path} holds a {type(loaded).__name__}; expected a dictionary of tensors")
        self.tensors = {str(key): value for key, value in loaded.items() if isinstance(value, TorchTensor)}
        self.others = frozenset(str(key) for key, value in loaded.items() if not isinstance(value, TorchTensor))
        for key, tensor in self.tensors.items():
            self._check(key, tensor)

    @property
    def path(self) -> Path:
        """The file's path."""
        return self._file.path

    def read(self, key: str) -> np.ndarray:
        """Return the tensor."""
        tensor = self.tensors[key]
        dtype = tensor.storage.dtype
        if 0 in tensor.shape:
            return np.zeros(tensor.shape, dtype)
        start, _ = self._offsets[tensor.storage.key]
        span = self._file.read(start + tensor.offset * dtype.itemsize, (tensor.last + 1 - tensor.offset,), dtype)
        return np.lib.stride_tricks.as_strided(span, tensor.shape, [stride * dtype.itemsize for stride in tensor.strides], writeable=False)

    def _check(self, key: str, tensor: TorchTensor) -> None:
        _, nbytes = self._offsets.get(tensor.storage.key, (0, -1))
        inside = tensor.offset >= 0 and min(tensor.strides, default=0) >= 0 and tensor.last < tensor.storage.size
        if 0 not in tensor.shape and not (inside and tensor.storage.size * tensor.storage.dtype.itemsize <= nbytes):
            raise CheckpointError(f"{self.path}: tensor {key} reaches outside its storage; the file is damaged, fetch it again")


def _check_stored(archive: zipfile.ZipFile, path: Path) -> None:
    """Raise :class:`CheckpointError` unless the bytes of every entry are in the file as they are."""
    for entry in archive.infolist():
        changed = "compressed" if entry.compress_type != zipfile.ZIP_STORED else "encrypted" if entry.flag_bits & _ENCRYPTED else ""
        if changed:
            raise CheckpointError(f"{path} is {changed}; expected an archive as torch.save writes it: fetch it again")


def _storage_offsets(archive: zipfile.ZipFile, path: Path) -> dict[str, tuple[int, int]]:
    """Return (position of the bytes in the file, number of bytes) of each storage."""
    offsets = {}
    with path.open("rb") as file:
        for entry in archive.infolist():
            folder, _, key = entry.filename.rpartition("/")
            if entry.filename.endswith("/byteorder") and archive.read(entry) != b"little":
                raise CheckpointError(f"{path} was written big-endian; expected little-endian: save it again on a common machine")
            if not folder.endswith("/data"):
                continue
            # The local header's name and extra field may be longer than the directory's: torch pads them to align the data.
            file.seek(entry.header_offset + 26)
            name_length, extra_length = struct.unpack("<HH", file.read(4))
            offsets[key] = (entry.header_offset + 30 + name_length + extra_length, entry.file_size)
    return offsets
