"""Follows guides token by token, with llguidance. Imports no JAX."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterable

import numpy as np
from llguidance import LLMatcher, LLTokenizer, TokenizerWrapper

from l4jax.decoding.guide import Guide
from l4jax.text.tokenizer import Tokenizer

_KEPT_CHARACTERS = 1 << 20
"""Compiled guides are kept up to this many characters of their texts together."""


class Guiding:
    """Compiles a model's guides. May be used from several threads."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """``vocab_size``: the model's, which may have more tokens than the tokenizer."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        text = [token < tokenizer.vocab_size and not tokenizer.is_special(token) for token in range(vocab_size)]
        self._ordinary_W = np.packbits(np.pad(text, (0, -vocab_size % 32)), bitorder="little").view(np.uint32)
        self._lock = threading.Lock()
        self._made: LLTokenizer | None = None
        self._kept: OrderedDict[Guide, LLMatcher] = OrderedDict()

    def compiled(self, guide: Guide, end_ids: Collection[int]) -> CompiledGuide:
        """A guide for answers that end at one of these tokens. Raises ValueError for one that cannot be followed exactly."""
        if not end_ids:
            raise ValueError("guide needs an end token, which ends a complete answer, and the request has none; give stop_token_ids")
        with self._lock:
            tokenizer = self._made = self._made or self._ll_tokenizer()
            matcher = self._kept.get(guide)
            if matcher is not None:
                self._kept.move_to_end(guide)
        if matcher is None:
            matcher = _compiled(tokenizer, guide)
            with self._lock:
                self._kept[guide] = matcher
                while sum(len(kept.text) for kept in self._kept) > _KEPT_CHARACTERS:
                    self._kept.popitem(last=False)
        compiled = CompiledGuide(matcher, frozenset(end_ids), self._ordinary_W)
        if not compiled.start().allowed().any():
            raise ValueError("guide cannot be followed: no token of the model's begins what it asks for; change it")
        return compiled

    def _ll_tokenizer(self) -> LLTokenizer:
        tokenizer = self._tokenizer
        return LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer)), n_vocab=max(self._vocab_size, tokenizer.vocab_size))


class _Vocabulary:
    """A tokenizer as llguidance wants it. Its end token is never used: a request's own end tokens are allowed by :class:`Matcher`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        everything = range(tokenizer.vocab_size)
        self.special_token_ids = [token for token in everything if tokenizer.is_special(token)]
        self.tokens = [tokenizer.token_bytes(token) for token in everything]
        self.bos_token_id: int | None = None
        self.eos_token_id = self.special_token_ids[0] if self.special_token_ids else 0
        self._tokenizer = tokenizer

    def __call__(self, text: str | bytes) -> list[int]:
        return self._tokenizer.encode_ordinary(text if isinstance(text, str) else text.decode("utf-8", errors="replace"))


def check_guide(guide: Guide) -> None:
    """Raise ValueError, with llguidance's reason, for a guide that it cannot follow, or only in part."""
    is_wrong, reasons = LLMatcher.validate_grammar_with_warnings(_grammar(guide))
    if is_wrong or reasons:
        raise _refused(guide, "; ".join(reasons))


def _compiled(tokenizer: LLTokenizer, guide: Guide) -> LLMatcher:
    """Raises ValueError as :func:`check_guide` does."""
    matcher = LLMatcher(tokenizer, _grammar(guide), log_level=0)
    if matcher.is_error():
        raise _refused(guide, matcher.get_error())
    if warnings := matcher.get_grammar_warnings():
        raise _refused(guide, "; ".join(warnings))
    return matcher


def _grammar(guide: Guide) -> str:
    match guide.kind:
        case "json":
            try:
                return LLMatcher.grammar_from_json_schema(guide.text)
            except ValueError as error:
                raise _refused(guide, str(error)) from None
        case "regex":
            return LLMatcher.grammar_from_regex(guide.text)
        case "choice":
            return LLMatcher.grammar_from_lark(f"start: {' | '.join(map(json.dumps, json.loads(guide.text)))}")
        case "grammar":
            return LLMatcher.grammar_from_lark(guide.text)


def _refused(guide: Guide, why: str) -> ValueError:
    name = {"json": "JSON schema", "regex": "regular expression", "choice": "choice", "grammar": "grammar"}[guide.kind]
    first = why.strip().split("\n", 1)[0][:300]
    return ValueError(f"guide cannot be followed: its {name} is wrong or has parts that are not supported ({first}); change it")


class CompiledGuide:
    """A guide that is ready to be followed, by any number of answers."""

    def __init__(self, matcher: LLMatcher, end_ids: frozenset[int], ordinary_W: np.ndarray) -> None:
        """``ordinary_W``: a bit for each token of the model's that is text."""
        self._matcher = matcher
        self._end_ids = end_ids
        self._ordinary_W = ordinary_W

    def start(self) -> Matcher:
        """The state of an answer that has no token yet."""
        return Matcher(self._matcher.deep_copy(), self._end_ids, self._ordinary_W)


class Matcher:
    """Follows one answer."""

    def __init__(self, matcher: LLMatcher, end_ids: frozenset[int], ordinary_W: np.ndarray) -> None:
        self._matcher = matcher
        self._end_ids = end_ids
        self._ordinary_W = ordinary_W

    def take(self, tokens: Iterable[int]) -> None:
        """The answer has these further tokens. An end token after the whole form is no part of the text."""
        for token in tokens:
            if not (token in self._end_ids and (self._matcher.is_stopped() or not _has(self._ordinary_W, token))):
                self._matcher.consume_token(token)

    def allowed(self) -> np.ndarray:
        """A bit for each token that may be next, as :class:`l4jax.decoding.sampling.SamplingRows` has them; none if there is no way on."""
        found_W = np.zeros_like(self._ordinary_W)
        if self._matcher.is_error():
            return found_W
        accepting = self._matcher.is_accepting()
        if not self._matcher.is_stopped():
            of_matcher = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[: len(found_W)]
            found_W[: len(of_matcher)] = of_matcher
            found_W &= self._ordinary_W  # llguidance also allows an end token of its own
        if accepting:
            for token in self._end_ids:
                found_W[token // 32] |= np.uint32(1 << token % 32)
        return found_W


def _has(words_W: np.ndarray, token: int) -> bool:
    return bool(words_W[token // 32] >> np.uint32(token % 32) & np.uint32(1))
