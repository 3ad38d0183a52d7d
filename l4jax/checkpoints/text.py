"""The text files of a source that is not converted: tokenizer, chat template and licences."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from l4jax.checkpoints.source import CheckpointError, Source
from l4jax.text.load import check_text


@contextmanager
def text_files_of(source: Source, path: Path) -> Iterator[Path]:
    """A folder, for as long as the context lasts, with the text files that a conversion of ``source`` writes.

    A ValueError that leaves the context names ``path``, from which the source was opened, in the folder's place.
    """
    with tempfile.TemporaryDirectory(prefix="l4jax-") as directory:
        try:
            source.write_text_files(Path(directory))
            yield Path(directory)
        except ValueError as error:
            if directory not in str(error):
                raise
            raise CheckpointError(str(error).replace(directory, str(path))) from error


def check_text_of(source: Source, path: Path) -> None:
    """Raise ValueError if the source's tokenizer or chat template cannot be used (see :func:`l4jax.text.load.check_text`)."""
    with text_files_of(source, path) as directory:
        check_text(directory)
