"""Text to token ids and back.

Two kinds of file are read: Hugging Face's ``tokenizer.json`` (byte-level BPE) and Meta's ``tokenizer.model`` (tiktoken ranks).

Special tokens (``<|eot|>``) have power over a model: they end turns and open new ones. So text is encoded as text by default, and
``"<|eot|>"`` in a prompt becomes the characters; ``parse_special=True`` makes it the token. (transformers always parses them.)
"""

from __future__ import annotations

import abc
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from l4jax.files import FileError


class TokenizerError(FileError):
    """A tokenizer that is missing, damaged or of a kind that is not supported; the message is one line."""


class Tokenizer(abc.ABC):
    """A byte-level tokenizer: every token stands for some bytes, and text is their UTF-8.

    ``vocab_size``: the largest token id plus one. ``special_tokens``: the id of each special token, by its name. ``bos_id``: the
    token that begins a text, or None. ``prepends_bos``: whether the model expects it before a plain prompt. ``eos_ids``: the tokens
    that end an answer, as the tokenizer's own files name them.
    """

    def __init__(
        self, *, vocab_size: int, special_tokens: Mapping[str, int], bos_id: int | None, eos_ids: Sequence[int], prepends_bos: bool
    ) -> None:
        self.vocab_size = vocab_size
        self.bos_id = bos_id
        self.eos_ids = tuple(eos_ids)
        self.prepends_bos = prepends_bos
        self.special_tokens: dict[str, int] = {}
        self.make_special(special_tokens)

    def make_special(self, tokens: Mapping[str, int]) -> None:
        """Treat further tokens, by their names, as special: text never becomes them, and decoding leaves them out."""
        self.special_tokens |= tokens
        self._special_ids = frozenset(self.special_tokens.values())
        # Where two tokens start at the same place, the longer one is meant.
        longest_first = sorted(self.special_tokens, key=len, reverse=True)
        self._special_pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def make_markers_special(self, ids: Iterable[int]) -> None:
        """Treat those of these tokens as special that no text is encoded as. Others stay text: some files name "!" for padding."""
        texts = {self.token_bytes(token_id).decode("utf-8", errors="replace"): token_id for token_id in ids}
        self.make_special({text: token_id for text, token_id in texts.items() if text and self.marker_id(text) == token_id})

    def encode(self, text: str, *, add_bos: bool = True, parse_special: bool = False) -> list[int]:
        """Return the token ids of ``text``, after the BOS token where the model expects one and ``add_bos`` is set.

        With ``parse_special``, special tokens spelt out in ``text`` become those tokens; a BOS token at its start is then not
        doubled. Raises ValueError for text that is not Unicode (half of a surrogate pair), or that no tokens stand for: some
        vocabularies lack bytes.
        """
        check_unicode(text)
        ids: list[int] = []
        for piece in self.split_special(text) if parse_special else [text]:
            ids += [piece] if isinstance(piece, int) else self.encode_ordinary(piece)
        if add_bos and self.prepends_bos and self.bos_id is not None and not (parse_special and ids[:1] == [self.bos_id]):
            ids.insert(0, self.bos_id)
        return ids

    def split_special(self, text: str) -> list[str | int]:
        """Cut ``text`` at the special tokens spelt out in it: text pieces stay as they are, special tokens become ids."""
        pieces: list[str | int] = []
        end = 0
        for match in self._special_pattern.finditer(text):
            pieces += [text[end : match.start()], self.special_tokens[match[0]]]
            end = match.end()
        pieces.append(text[end:])
        return [piece for piece in pieces if piece != ""]

    def break_special(self, text: str, mark: str) -> str:
        """Return ``text`` with ``mark`` inside each special token that it spells out, and inside an unfinished one at its end."""
        text = self._special_pattern.sub(lambda match: match[0][0] + mark + match[0][1:], text)
        first_characters = {token[0] for token in self.special_tokens}
        longest = max(map(len, self.special_tokens), default=0)
        for start in range(max(0, len(text) - longest), len(text)):
            if text[start] in first_characters and any(token.startswith(text[start:]) for token in self.special_tokens):
                return text[: start + 1] + mark + text[start + 1 :]
        return text

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Return the text of ``ids``. Bytes that are not UTF-8 become U+FFFD; ids without a token are left out."""
        return b"".join(self.token_bytes(i) for i in ids if not (skip_special and self.is_special(i))).decode("utf-8", errors="replace")

    def is_special(self, token_id: int) -> bool:
        """Whether the token is a special one, which is not part of the text."""
        return token_id in self._special_ids

    @abc.abstractmethod
    def encode_ordinary(self, text: str) -> list[int]:
        """Return the token ids of ``text``; special tokens spelt out in it are plain text.

        Raises ValueError for text with a character that no tokens stand for.
        """

    @abc.abstractmethod
    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that the token stands for (a special token: its name); empty for an id without a token."""

    @abc.abstractmethod
    def token_id(self, token: str) -> int | None:
        """Return the id of the special token with this name, or of the ordinary token with this text; None if there is none."""

    @abc.abstractmethod
    def marker_id(self, text: str) -> int | None:
        """Return the id of the token spelt like this if encoding ordinary text never gives it, whatever its label; else None."""


def is_punctuation(character: str) -> bool:
    """Whether a character is neither letter, digit nor space. A marker begins and ends with one of these."""
    return not (character.isalnum() or character.isspace())


def check_unicode(text: str) -> None:
    """Raise ValueError for a value that is not text, or has a lone surrogate, which is what Python makes of bytes that are not UTF-8."""
    if not isinstance(text, str):
        raise ValueError(f"the text is of type {type(text).__name__}; expected a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text has {text[error.start]!r} at position {error.start}, which is not a Unicode character; expected UTF-8 text"
        ) from None


def token_text(value: Any) -> str | None:
    """Return the text of a token as Hugging Face's files name it: a text, or an object with the text as ``content``."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None
