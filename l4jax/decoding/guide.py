"""What an answer must look like: a request's guide. Imports neither JAX nor the library that follows it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from sharding.kinds import shown

GuideKind = Literal["json", "regex", "choice", "grammar"]
MAX_GUIDE_CHARACTERS = 1 << 18
"""The most characters of a guide's text."""


@dataclasses.dataclass(frozen=True)
class Guide:
    """A form that every answer has; made by one of the class methods. ``text``: a JSON schema, a regular expression, or the like.

    Tokens that would leave the form are forbidden, and so is an end token before the answer is complete. Cut off, at ``max_tokens`` or by a
    stop string, the answer is only a beginning.
    """

    kind: GuideKind
    text: str

    def __post_init__(self) -> None:
        """Raises ValueError for a guide that is too long."""
        if self.kind not in get_args(GuideKind):
            raise ValueError(f"a guide has kind {shown(self.kind)}; make guides with Guide.json, regex, choice or grammar")
        if not isinstance(self.text, str):
            raise ValueError(f"a guide's {self.kind} is {shown(self.text)}; expected a text")
        if len(self.text) > MAX_GUIDE_CHARACTERS:
            raise ValueError(f"guide has {len(self.text)} characters; expected at most {MAX_GUIDE_CHARACTERS}; make it simpler")

    @classmethod
    def json(cls, schema: Mapping[str, Any] | str | None = None) -> Guide:
        """JSON that a JSON schema describes; without a schema any JSON object."""
        if schema is None:
            schema = {"type": "object"}
        if not isinstance(schema, str):
            try:
                schema = json.dumps(schema, allow_nan=False)
            except (TypeError, ValueError, RecursionError) as error:
                raise ValueError(f"the schema is no JSON ({error}); give a JSON schema as Python's dicts and lists, or as text") from None
        return cls("json", schema)

    @classmethod
    def regex(cls, pattern: str) -> Guide:
        """Text that a regular expression matches as a whole. Its syntax is that of Rust's ``regex``, without anchors and look-around."""
        return cls("regex", pattern)

    @classmethod
    def choice(cls, texts: Sequence[str]) -> Guide:
        """One of these texts."""
        if isinstance(texts, str) or not texts or not all(isinstance(text, str) and text for text in texts):
            raise ValueError(f"choice is {shown(texts)}; expected a list of non-empty strings")
        return cls("choice", json.dumps(list(texts)))

    @classmethod
    def grammar(cls, text: str) -> Guide:
        """Text of a context-free grammar, in llguidance's form of Lark's syntax, beginning at its rule ``start``."""
        return cls("grammar", text)
