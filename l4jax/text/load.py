"""Finding out what tokenizer a checkpoint has."""

from __future__ import annotations

from pathlib import Path

from l4jax.text.hf_tokenizer import load_hf_tokenizer
from l4jax.text.tiktoken_tokenizer import load_tiktoken_tokenizer
from l4jax.text.tokenizer import Tokenizer


def load_tokenizer(directory: Path) -> Tokenizer | None:
    """The tokenizer in ``directory``: its ``tokenizer.json``, else its ``tokenizer.model``; None if it has neither.

    Raises :class:`l4jax.text.tokenizer.TokenizerError` for a file that is damaged or of another kind.
    """
    if (directory / "tokenizer.json").exists():
        return load_hf_tokenizer(directory)
    if (directory / "tokenizer.model").exists():
        return load_tiktoken_tokenizer(directory / "tokenizer.model")
    return None
