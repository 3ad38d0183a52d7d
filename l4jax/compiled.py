"""Programs, compiled once for each set of shapes, and kept on disk from one process to the next."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import importlib.metadata
import math
import os
import pickle
import stat
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any

import jax
from jax.experimental import serialize_executable, topologies

from l4jax.paths import cache_root
from l4jax.program_inputs import Burst, Piece, Weights
from sharding import hosts
from sharding.words import counted

_KEPT_BYTES = 4 * 2**30
"""The most bytes that a folder keeps; the programs that were used longest ago are removed first."""
_SUFFIX = ".program"
_BEGUN = "begun-"
"""How names of files begin that are being written. Those that a killed process has left are removed after an hour."""
_DIGEST_BYTES = 32
_PACKAGES = ("l4jax", "jax", "jaxlib", "flax", "numpy")
"""Those that decide what code a function is traced and compiled to."""
_ANOTHER = "set XDG_CACHE_HOME to a folder"


@dataclasses.dataclass(frozen=True)
class ProgramInfo:
    """A compiled program: its kind, its sizes (as "4 rows of 128 tokens"), and bytes on one device.

    ``code``: of the program itself, 0 where XLA does not say (CPUs); ``temporaries``: needed while it runs; ``arguments``: all of them;
    ``donated``: of arguments whose memory results reuse; ``results``: those that reuse no argument's memory.
    """

    kind: str
    sizes: str
    code: int
    temporaries: int
    arguments: int
    donated: int
    results: int


class Program:
    """A function, compiled for each set of shapes and static arguments when it is first called with them.

    ``context``: what the function depends on beside its arguments. ``folder``: compiled programs are kept there, and loaded from there.
    """

    def __init__(self, kind: str, function: jax.stages.Wrapped, context: str, devices: Sequence[jax.Device], folder: Folder | None) -> None:
        self.kind = kind
        self.context = context
        self._function, self._devices, self._folder = function, list(devices), folder
        self._compiled: dict[object, tuple[jax.stages.Compiled, str]] = {}
        self._loading: dict[object, tuple[str, Future[jax.stages.Compiled | None]]] = {}  # with the names that they are kept under

    def __call__(self, *arguments: Any, **static: Any) -> Any:
        """Run it. Every call must give as many arguments, of the same dtypes and shardings, and weights of the same shapes."""
        return self.prepare(*arguments, **static)(*arguments)

    def prepare(self, *arguments: Any, **static: Any) -> jax.stages.Compiled:
        """Return the compiled program for such arguments; compile or load it first if need be."""
        key = _key(arguments, static)
        if key not in self._compiled:
            self._compiled[key] = self._make(key, arguments, static), _sizes(arguments, static)
        return self._compiled[key][0]

    def load_early(self, pool: Executor, *arguments: Any, **static: Any) -> None:
        """Let the pool load the program for such arguments, if it is kept, for :meth:`prepare` to find."""
        key = _key(arguments, static)
        if self._folder is not None and key not in self._compiled and key not in self._loading:
            name = self._name(arguments, static)
            self._loading[key] = name, pool.submit(self._folder.load, name, self._devices)

    def lower(self, *arguments: Any, **static: Any) -> jax.stages.Lowered:
        """Trace it for these arguments, of which only shapes, dtypes and shardings matter, as ``jax.jit`` does."""
        return self._function.lower(*arguments, **static)

    def forget(self) -> None:
        """Drop what is compiled."""
        self._compiled.clear()
        self._loading.clear()

    def compiled(self) -> list[ProgramInfo]:
        """The programs that are compiled, or loaded, so far. Another thread may compile more meanwhile."""
        return [_info(self.kind, sizes, compiled) for compiled, sizes in list(self._compiled.values())]

    def _name(self, arguments: tuple[Any, ...], static: dict[str, Any]) -> str:
        """What the program for such arguments is kept under."""
        leaves, tree = jax.tree.flatten(arguments)
        shapes = [(leaf.shape, str(leaf.dtype)) for leaf in leaves]
        return _digest(self.kind, self.context, static, shapes, tree, _surroundings(self._devices))

    def _make(self, key: object, arguments: tuple[Any, ...], static: dict[str, Any]) -> jax.stages.Compiled:
        name, kept = "", None
        if self._folder is not None:
            name, loading = self._loading.pop(key, ("", None))
            name = name or self._name(arguments, static)
            # Cancelled unless it has begun: it may be the last of many, or its pool may be shut down meanwhile.
            kept = self._folder.load(name, self._devices) if loading is None or loading.cancel() else loading.result()
        # A process that compiles may wait for the others to compile too, so either all do or none, also where only some have a folder.
        if "none" in hosts.share("none" if kept is None else "kept", "programs") or kept is None:
            kept = self.lower(*arguments, **static).compile()
            if self._folder is not None:
                self._folder.save(name, kept)
        return kept


@dataclasses.dataclass(frozen=True)
class Call:
    """A program and its arguments: weights, what stays on the devices, and the small inputs that come from the host.

    Arrays may be abstract (``jax.ShapeDtypeStruct``), but not in a call that is run.
    """

    program: Program
    arguments: tuple[Any, ...]
    static: Mapping[str, Any]

    def run(self) -> Any:
        """Dispatch it; returns what the program returns."""
        return self.program(*self.arguments, **self.static)

    def prepare(self) -> jax.stages.Compiled:
        """Compile, or load, the program."""
        return self.program.prepare(*self.arguments, **self.static)

    def info(self) -> ProgramInfo:
        """What the program needs; it is compiled or loaded first if need be."""
        return _info(self.program.kind, _sizes(self.arguments, self.static), self.prepare())

    def load_early(self, pool: Executor) -> None:
        """Let the pool load the program, if it is kept."""
        self.program.load_early(pool, *self.arguments, **self.static)

    def lower(self) -> jax.stages.Lowered:
        """The program traced for these arguments."""
        return self.program.lower(*self.arguments, **self.static)

    @property
    def device_bytes(self) -> int:
        """Bytes of the abstract arrays on each device; small inputs that are arrays of the host are left out."""
        return device_bytes(self.arguments)


class Folder:
    """Compiled programs on disk. No other user may have permission to write there, because loading a program can run code.

    From a folder that even the user cannot write, programs are loaded. The first program that is not there brings a warning.
    """

    def __init__(self, path: Path) -> None:
        """Make the folder. Raises OSError if that fails, or if others could write in it."""
        self.path = path
        self._keeps = True
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_own(path, os.stat(path))

    @classmethod
    def of_user(cls) -> Folder | None:
        """The user's folder; None if JAX's own compilation cache is configured, or caching is off in JAX's settings.

        If the folder cannot be used, warns and returns None.
        """
        if jax.config.jax_compilation_cache_dir is not None or not jax.config.jax_enable_compilation_cache:
            return None
        try:
            path = cache_root() / "programs"
        except ValueError as error:
            _warn(str(error))
            return None
        try:
            return cls(path)
        except OSError as error:
            _warn(_why_not(path, error))
            return None

    def load(self, name: str, devices: Sequence[jax.Device]) -> jax.stages.Compiled | None:
        """The program of this name, for these devices; None if there is none, or if it is not what was saved."""
        path = self.path / (name + _SUFFIX)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            _check_own(path, os.fstat(descriptor))
            with open(descriptor, "rb", closefd=False) as file:
                content = file.read()
            payload = content[_DIGEST_BYTES:]
            if content[:_DIGEST_BYTES] != _checksum(name, payload):
                return None
            with contextlib.suppress(OSError):  # nothing can be written there
                os.utime(descriptor)
            serialized, in_tree, out_tree = pickle.loads(payload)
            return serialize_executable.deserialize_and_load(serialized, in_tree, out_tree, execution_devices=devices)
        except Exception:  # what it raises depends on JAX, XLA and the file
            return None
        finally:
            os.close(descriptor)

    def save(self, name: str, compiled: jax.stages.Compiled) -> None:
        """Keep a program. Warns of the first that cannot be written, and keeps no more; one that JAX cannot serialise is not kept."""
        if not self._keeps:
            return
        try:
            payload = pickle.dumps(serialize_executable.serialize(compiled))
        except Exception:  # what it raises depends on JAX, XLA and the program
            return
        try:
            descriptor, written = tempfile.mkstemp(dir=self.path, prefix=_BEGUN)
            try:
                with open(descriptor, "wb") as file:
                    file.write(_checksum(name, payload) + payload)
                os.replace(written, self.path / (name + _SUFFIX))
            except BaseException:
                Path(written).unlink(missing_ok=True)  # Ctrl-C may come after it got its name
                raise
            self._make_room()
        except OSError as error:
            self._keeps = False
            _warn(_why_not(self.path, error))

    def _make_room(self) -> None:
        """Remove unfinished files older than an hour and, while the files are too large, the programs that were used longest ago.

        What else lies in the folder is not ours.
        """
        found = []
        for path in (*self.path.glob(f"*{_SUFFIX}"), *self.path.glob(f"{_BEGUN}*")):
            with contextlib.suppress(FileNotFoundError):  # another process has removed it
                about = path.stat()
                found.append((about.st_mtime_ns, about.st_size, path))
        kept, an_hour_ago = 0, (time.time() - 3600) * 1e9
        for used, size, path in sorted(found, reverse=True):
            kept += size
            if kept > _KEPT_BYTES or (path.name.startswith(_BEGUN) and used < an_hour_ago):
                path.unlink(missing_ok=True)


def device_bytes(tree: Any) -> int:
    """Bytes of the abstract arrays of a tree on each device."""
    abstract = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.ShapeDtypeStruct)]
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in abstract)


def _key(arguments: tuple[Any, ...], static: Mapping[str, Any]) -> object:
    """What tells a kind's programs apart."""
    changing = [argument for argument in arguments if not isinstance(argument, Weights)]
    return (*static.values(), *[leaf.shape for leaf in jax.tree.leaves(changing)])


def _sizes(arguments: tuple[Any, ...], static: Mapping[str, Any]) -> str:
    """What distinguishes a program from others of its kind, in words."""
    inputs = next((argument for argument in arguments if isinstance(argument, Piece | Burst)), None)
    rows = counted(len(inputs.slot_B), "row") if inputs is not None else ""
    length = f" of {inputs.token_BT.shape[1]} tokens" if isinstance(inputs, Piece) else ""
    spread, plan = static.get("spread"), static.get("plan")
    ring = "" if spread is None else f", {spread.variant}{', whole chunks' if spread.aligned else ''}"
    return rows + length + ring + ("" if plan is None else f", {plan}")


def _info(kind: str, sizes: str, compiled: jax.stages.Compiled) -> ProgramInfo:
    about: Any = compiled.memory_analysis()
    return ProgramInfo(
        kind=kind,
        sizes=sizes,
        code=about.generated_code_size_in_bytes,
        temporaries=about.temp_size_in_bytes,
        arguments=about.argument_size_in_bytes,
        donated=about.alias_size_in_bytes,
        results=about.output_size_in_bytes - about.alias_size_in_bytes,
    )


def _check_own(path: Path, about: os.stat_result) -> None:
    """Raise PermissionError if another user owns a file or folder, or has permission to write it."""
    if about.st_uid != os.geteuid():
        raise PermissionError(f"{path} belongs to another user; {_ANOTHER} of your own")
    if about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"other users can write {path}; run chmod go-w {path}")


def _why_not(path: Path, error: OSError) -> str:
    """Why a folder cannot be used, and what to do."""
    if error.strerror is None:  # one of ours, which says so
        return str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        advice = "free some space there"
    elif error.errno in (errno.EEXIST, errno.ENOTDIR):
        advice = f"remove the file that is in its place, or {_ANOTHER}"
    elif error.errno in (errno.EACCES, errno.EPERM):
        advice = f"give yourself the right to write there, or {_ANOTHER} that you can write"
    else:
        advice = f"{_ANOTHER} that you can write"
    return f"{path} cannot be written ({error.strerror}); {advice}"


def _warn(why: str) -> None:
    warnings.warn(f"compiled programs are not kept for the next start: {why}", stacklevel=2)


def _checksum(name: str, payload: bytes) -> bytes:
    return hashlib.blake2b(name.encode() + payload, digest_size=_DIGEST_BYTES).digest()


def _digest(*of: object) -> str:
    return hashlib.blake2b(repr(of).encode(), digest_size=20).hexdigest()


def _surroundings(devices: Sequence[jax.Device]) -> object:
    """What compiled code depends on beside the function and its arguments: versions, settings, machine and devices."""
    settings = {name: getattr(jax.config, name, value) for name, value in jax.config.values.items()}
    return (
        [importlib.metadata.version(package) for package in _PACKAGES],
        _SOURCES,
        settings,
        os.environ.get("XLA_FLAGS"),
        devices[0].client.platform_version,
        topologies.TopologyDescription(list(devices)).serialize(),  # a CPU's has its instruction sets
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        jax.process_index(),
        devices,
    )


def _sources() -> str:
    """A digest of l4jax's source files, which may change while the version does not."""
    root = Path(__file__).parents[1]
    files = sorted(path for package in ("l4jax", "sharding", "pallas_kernels") for path in (root / package).rglob("*.py"))
    return _digest([(str(path.relative_to(root)), path.read_bytes()) for path in files])


_SOURCES = _sources()
"""Taken at import: the files may change before this process compiles."""
