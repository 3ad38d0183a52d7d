"""Follows guides token by token, with llguidance. Imports no JAX."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from l4jax.decoding.guide import Guide
from l4jax.text.tokenizer import Tokenizer

_LIMITS = LLParserLimits(step_max_items=2000, max_lexer_states=20_000)
"""What a mask may cost: in the first number's time, some 25 ms, all other answers wait; and 20,000 states take some 40 MB."""


class Guiding:
    """Compiles guides of a model's answers. May be used from several threads."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """``vocab_size``: the model's, which may have more tokens than the tokenizer. Takes 3 s for 200,000 tokens."""
        everything = range(tokenizer.vocab_size)
        self._vocab_size = vocab_size
        self._tokenizer = LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer)), n_vocab=max(vocab_size, tokenizer.vocab_size))
        text = [token in everything and not tokenizer.is_special(token) for token in range(vocab_size)]
        self._ordinary_W = np.packbits(np.pad(text, (0, -vocab_size % 32)), bitorder="little").view(np.uint32)

    def compiled(self, guide: Guide, end_ids: Collection[int]) -> CompiledGuide:
        """A guide for one answer, which ends at one of these tokens. Raises ValueError for one that cannot be followed exactly."""
        ends = frozenset(token for token in end_ids if token < self._vocab_size)
        if not ends:
            raise ValueError("guide needs an end token, which ends a complete answer, and the request has none; give stop_token_ids")
        matcher = LLMatcher(self._tokenizer, _grammar(guide), log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise _refused(guide, matcher.get_error())
        if warnings := matcher.get_grammar_warnings():
            raise _refused(guide, "; ".join(warnings))
        compiled = CompiledGuide(matcher, ends, self._ordinary_W, self._tokenizer.eos_token)
        if not compiled.start().allowed().any():
            raise ValueError("no token of the model's begins what the guide asks for; change it")
        return compiled


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
    is_wrong, reasons = LLMatcher.validate_grammar_with_warnings(_grammar(guide), limits=_LIMITS)
    if is_wrong or reasons:
        raise _refused(guide, "; ".join(reasons))


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
    return ValueError(f"the guide's {name} is wrong, or has parts that cannot be enforced ({first}); change it")


class CompiledGuide:
    """A guide that is ready to be followed by one answer: of several, one could use up what the others may take (:data:`_LIMITS`)."""

    def __init__(self, matcher: LLMatcher, end_ids: frozenset[int], ordinary_W: np.ndarray, own_end: int) -> None:
        """``ordinary_W``: a bit for each token of the model's that is text. ``own_end``: the token that llguidance takes for an end."""
        self._matcher = matcher
        self._end_ids = end_ids
        self._ordinary_W = ordinary_W
        self._own_end = own_end

    def start(self) -> Matcher:
        """The state of an answer that has no token yet."""
        return Matcher(self._matcher.deep_copy(), self._end_ids, self._ordinary_W, self._own_end)


class Matcher:
    """Follows one answer."""

    def __init__(self, matcher: LLMatcher, end_ids: frozenset[int], ordinary_W: np.ndarray, own_end: int) -> None:
        self._matcher = matcher
        self._end_ids = end_ids
        self._ordinary_W = ordinary_W
        self._own_end = own_end
        self._allowed_W: np.ndarray | None = None

    def take(self, tokens: Sequence[int]) -> None:
        """The answer has these further tokens, of which none ends it."""
        self._matcher.consume_tokens(list(tokens))
        self._allowed_W = None

    def allowed(self) -> np.ndarray:
        """A bit for each token that may be next, as :class:`l4jax.decoding.sampling.SamplingRows` has them; none if there is no way on.

        An end token may be next only where the answer is complete, even if it is one of the text.
        """
        if self._allowed_W is None:
            self._allowed_W = self._computed()
        return self._allowed_W

    def _computed(self) -> np.ndarray:
        found_W = np.zeros_like(self._ordinary_W)
        if self._matcher.is_error():
            return found_W
        accepting = self._matcher.is_accepting()
        if not self._matcher.is_stopped():
            of_matcher = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[: len(found_W)]
            found_W[: len(of_matcher)] = of_matcher
            found_W &= self._ordinary_W
        if self._matcher.is_error():  # the mask took too much
            return np.zeros_like(found_W)
        for token in (self._own_end, *self._end_ids):
            found_W[token // 32] &= ~np.uint32(1 << token % 32)
        if accepting:
            for token in self._end_ids:
                found_W[token // 32] |= np.uint32(1 << token % 32)
        return found_W
