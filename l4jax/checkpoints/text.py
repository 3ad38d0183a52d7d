"""The text files of a source: looked at before a conversion writes anything, and by ``l4jax show``."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from l4jax.checkpoints.source import CheckpointError, Source
from l4jax.text.load import check_text


@contextmanager
def tokenizer_files_of(source: Source, path: Path) -> Iterator[Path]:
    """A folder, for as long as the context lasts, with the tokenizer files that a conversion of ``source`` writes.

    A ValueError that leaves the context names ``path``, from which the source was opened, in the folder's place.
    """
    with _folder_for(path) as directory:
        source.write_tokenizer(directory)
        yield directory


def check_text_of(source: Source, path: Path, *, tokenizer: bool) -> None:
    """Raise ValueError if text files of the source cannot be read.

    With ``tokenizer`` also if its tokenizer or chat template cannot be used (see :func:`l4jax.text.load.check_text`).
    """
    with _folder_for(path) as directory:
        source.write_other_files(directory)
    if not tokenizer:
        return
    try:
        with tokenizer_files_of(source, path) as directory:
            check_text(directory)
    except ValueError as error:
        raise CheckpointError(f"{error}; or convert the weights alone, for a model that takes token ids: --without-tokenizer") from error


@contextmanager
def _folder_for(path: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="l4jax-") as directory:
        try:
            yield Path(directory)
        except ValueError as error:
            if directory not in str(error):
                raise
            raise CheckpointError(str(error).replace(directory, str(path))) from error
