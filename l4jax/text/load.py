"""The tokenizer and chat format of a folder, and whether they can be used."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

from l4jax.config import ModelConfig
from l4jax.files import FileError, is_there
from l4jax.text.chat import ChatFormat, load_chat_format
from l4jax.text.hf_tokenizer import load_hf_tokenizer
from l4jax.text.template import ChatError
from l4jax.text.tiktoken_tokenizer import load_tiktoken_tokenizer
from l4jax.text.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Text:
    """A folder's tokenizer and chat format. ``no_tokenizer``, ``no_chat``: why one of them is None, as a clause of an error message."""

    tokenizer: Tokenizer | None
    chat_format: ChatFormat | None
    no_tokenizer: str = "this checkpoint has no tokenizer"
    no_chat: str = "this checkpoint has no chat template"


def load_text(directory: Path, config: ModelConfig | None = None) -> Text:
    """Load the tokenizer and chat format of a checkpoint's folder; one that cannot be used is None, and the model still takes token ids.

    Begin, end and padding tokens that the model's ``config`` names are special in the tokenizer.
    """
    try:
        tokenizer = _read_tokenizer(directory)
        if tokenizer is not None and config is not None:
            named = (config.bos_token_id, config.pad_token_id, *config.eos_token_ids)
            tokenizer.make_markers_special([token_id for token_id in named if token_id is not None])
    except FileError as error:
        reason = f"this checkpoint's tokenizer cannot be used ({error})"
        return Text(None, None, no_tokenizer=reason, no_chat=reason)
    if tokenizer is None:
        return Text(None, None)
    try:
        return Text(tokenizer, load_chat_format(directory, tokenizer))
    except (ChatError, FileError) as error:
        return Text(tokenizer, None, no_chat=f"this checkpoint's chat template cannot be used ({error})")


def load_tokenizer(directory: Path) -> Tokenizer | None:
    """Load the tokenizer in ``directory``: its ``tokenizer.json``, else its ``tokenizer.model``; None if it has neither.

    The tokens that the folder's chat template writes around turns are special in it, whatever the files label them. Raises
    :class:`l4jax.text.tokenizer.TokenizerError` for a file that is damaged or of another kind.
    """
    tokenizer = _read_tokenizer(directory)
    if tokenizer is not None:
        with contextlib.suppress(ChatError, FileError):
            load_chat_format(directory, tokenizer)
    return tokenizer


def check_text(directory: Path) -> None:
    """Read the tokenizer and chat template in ``directory`` as :func:`load_text` will, and format a message.

    Raises :class:`l4jax.text.tokenizer.TokenizerError` or :class:`l4jax.text.template.ChatError` for files that are damaged, git-lfs
    pointers or not supported. A folder without them passes.
    """
    tokenizer = _read_tokenizer(directory)
    chat_format = None if tokenizer is None else load_chat_format(directory, tokenizer)
    if chat_format is not None:
        chat_format.check()


def _read_tokenizer(directory: Path) -> Tokenizer | None:
    if is_there(directory / "tokenizer.json"):
        return load_hf_tokenizer(directory)
    if is_there(directory / "tokenizer.model"):
        return load_tiktoken_tokenizer(directory / "tokenizer.model")
    return None
