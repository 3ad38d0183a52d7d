"""The text of an answer as it grows: whole characters, up to its first stop string. Imports no JAX."""

from __future__ import annotations

import codecs
from collections.abc import Collection, Iterable, Sequence

from l4jax.text.tokenizer import Tokenizer


class StreamDecoder:
    """Turns tokens into text piece by piece. The pieces joined are ``tokenizer.decode`` of all the tokens.

    A character whose bytes are spread over several tokens is returned once it is complete.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Iterable[int]) -> str:
        """Return the text that these further tokens complete."""
        tokenizer = self._tokenizer
        shown = [i for i in ids if not (self._skip_special and tokenizer.is_special(i))]
        return self._utf8.decode(b"".join(map(tokenizer.token_bytes, shown)))

    def finish(self) -> str:
        """Return what is left at the end: U+FFFD for a character that was never completed."""
        return self._utf8.decode(b"", final=True)


class StopStringFilter:
    """Passes text on up to the first stop string, which is left out; ``stopped_by`` is then that string.

    Text that may be the start of a stop string is held back. The first stop string is the one that is complete first or, of two that
    are complete at the same character, the longer. What is passed on does not depend on how the text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if "" in stops:
            raise ValueError("a stop string is empty; expected at least one character")
        self._stops = sorted(stops, key=len, reverse=True)
        self._held = ""
        self.stopped_by: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop string has appeared."""
        return self.stopped_by is not None

    def push(self, text: str) -> str:
        """Return the text that may be shown after ``text`` has been added."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            _, at, self.stopped_by = min(found)
            self._held = ""
            return text[:at]
        kept = len(text) - self._partial(text)
        self._held = text[kept:]
        return text[:kept]

    def finish(self) -> str:
        """Return what was held back, at the end of the text."""
        held, self._held = self._held, ""
        return held

    def _partial(self, text: str) -> int:
        """Return the length of the longest end of ``text`` that is the start of a stop string."""
        lengths = (n for stop in self._stops for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n]))
        return max(lengths, default=0)


class OutputText:
    """Turns the tokens of one answer into its text: end tokens are left out, and so is everything from the first stop string on.

    Stop strings are looked for after the first ``min_tokens`` tokens. Without a tokenizer there is no text.
    """

    def __init__(self, tokenizer: Tokenizer | None, stops: Sequence[str], end_ids: Collection[int], min_tokens: int = 0) -> None:
        self._decoder = None if tokenizer is None else StreamDecoder(tokenizer)
        self._filter = StopStringFilter(stops)
        self._end_ids = end_ids
        self._unfiltered = min_tokens
        self._pieces: list[str] = []

    @property
    def stopped(self) -> bool:
        """Whether a stop string has appeared."""
        return self._filter.stopped

    @property
    def stopped_by(self) -> str | None:
        """The stop string that has appeared."""
        return self._filter.stopped_by

    @property
    def text(self) -> str | None:
        """All text that was returned; None without a tokenizer."""
        return None if self._decoder is None else "".join(self._pieces)

    def extend(self, token_ids: Sequence[int], *, done: bool) -> tuple[int, str]:
        """Take in further tokens; ``done``: they are the last.

        Returns the number of tokens that belong to the answer, up to the one that completes a stop string, and the text that may be shown.
        """
        if self._decoder is None:
            return len(token_ids), ""
        kept, text = 0, ""
        for token in token_ids:
            if self.stopped:
                break
            kept += 1
            new = "" if token in self._end_ids else self._decoder.push([token])
            text += new if self._unfiltered > 0 else self._filter.push(new)
            self._unfiltered -= 1
        if done and not self.stopped:
            text += self._filter.push(self._decoder.finish())
            text += self._filter.finish()
        self._pieces.append(text)
        return kept, text
