"""Requests and completions: what callers ask for, checked before anything is computed, and what they get back. Imports no JAX."""

from __future__ import annotations

import dataclasses
import math
import secrets
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Literal

from l4jax import arguments
from l4jax.arguments import Prompt
from l4jax.config import ModelConfig
from l4jax.decoding.guide import Guide
from l4jax.decoding.params import MAX_STOP_IDS, SamplingParams
from l4jax.text.chat import ChatOptions
from l4jax.text.guiding import CompiledGuide, Guiding
from l4jax.text.load import Text
from l4jax.text.tokenizer import Tokenizer
from sharding.kinds import shown

Message = Mapping[str, object]
FinishReason = Literal["stop", "length"]


@dataclasses.dataclass(frozen=True)
class Request:
    """A checked prompt: its seed is drawn, its end tokens are collected, its ``max_tokens`` fits in the context.

    ``scope``: prefixes in the cache are shared only by requests of one scope. ``guide``: the guide in ``params``, ready to be followed.
    """

    token_ids: Sequence[int]
    params: SamplingParams
    seed: int
    stop_ids: Sequence[int]
    scope: bytes = b""
    guide: CompiledGuide | None = None


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """Log-probability of a token, and the likeliest alternatives as (token id, log-probability), best first."""

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class Stats:
    """Token counts of a completion, and wall-clock times.

    ``first_token_seconds``: from when the request was made until its first token was there; ``decode_seconds``: from then until its last
    token was there. Both include the compilation of programs that the call is the first to need; :meth:`l4jax.LLM.warmup` avoids that.
    ``decode_tokens_per_second``: the rate after the first burst, during which a program may have been compiled. If there was only one
    burst, it is the rate of that burst, compilation included; if there was none, 0.
    ``rounds``: rounds of speculation; ``drafted``: tokens drafted in them; ``accepted[i]``: rounds that accepted the draft at depth i + 1.
    They count what was computed: stop strings are checked once a burst, and rounds after the stop string are counted.
    """

    prompt_tokens: int
    output_tokens: int
    first_token_seconds: float
    decode_seconds: float
    decode_tokens_per_second: float
    rounds: int
    drafted: int
    accepted: tuple[int, ...]

    @property
    def acceptance_length(self) -> float:
        """Tokens of an average round, before stop tokens cut it short: 1 + accepted / rounds; 1 without speculation."""
        return 1.0 + sum(self.accepted) / self.rounds if self.rounds else 1.0


@dataclasses.dataclass(frozen=True)
class Completion:
    """The continuation of a prompt.

    ``token_ids`` includes the end token that stopped it, ``text`` does not; ``text`` is None if the checkpoint has no
    tokenizer. ``finish_reason``: "stop" (an end token or stop string) or "length" (``max_tokens`` or the context).
    ``logprobs`` has an entry for each token, if the request asked for them. ``seed`` reproduces the completion.
    """

    prompt_token_ids: list[int]
    token_ids: list[int]
    text: str | None
    finish_reason: FinishReason
    logprobs: list[TokenLogprob] | None
    seed: int
    stats: Stats


class RequestMaker:
    """Makes a model's requests from prompts, conversations and sampling params.

    All methods raise ValueError, with one line, for a request that the model cannot answer.
    """

    def __init__(self, config: ModelConfig, text: Text, *, drafts_up_to: float = math.inf, compiles: bool = True) -> None:
        """``drafts_up_to``: the most tokens that a prompt may have, if the user asked to speculate and the drafter stops there.

        ``compiles``: whether guides are compiled, for an engine in this process.
        """
        self._config = config
        self._text = text
        self._drafts_up_to = drafts_up_to
        self._lock = threading.Lock()
        self._compiles = compiles
        self._guiding: Guiding | None = None

    @property
    def stop_token_ids(self) -> frozenset[int]:
        """The tokens that end an answer: the configuration's, the tokenizer's and the chat template's."""
        tokenizer, chat_format = self._text.tokenizer, self._text.chat_format
        tokenizers = () if tokenizer is None else tokenizer.eos_ids
        chats = () if chat_format is None else chat_format.stop_token_ids
        return frozenset((*self._config.eos_token_ids, *tokenizers, *chats))

    def check_streams(self) -> None:
        """Raise ValueError if there is no tokenizer, because a stream is of text."""
        if self._text.tokenizer is None:
            raise ValueError(f"a stream is of text, but {self._text.no_tokenizer}; use generate, which returns token ids")

    def encode(self, prompt: Prompt) -> list[int]:
        """The token ids of a prompt, which is text or token ids."""
        if not isinstance(prompt, str):
            return self._checked(arguments.token_ids(prompt))
        tokenizer = self._text.tokenizer
        if tokenizer is None:
            raise ValueError(f"the prompt is text, but {self._text.no_tokenizer}; give token ids, or convert the model with its tokenizer")
        if not prompt:
            raise ValueError("the prompt is empty; expected at least one character")
        return self._checked(tokenizer.encode(prompt))

    def encode_chat(self, messages: Sequence[Message], options: ChatOptions) -> list[int]:
        """The token ids of a conversation, in the model's chat format."""
        if self._text.chat_format is None:
            raise ValueError(
                f"{self._text.no_chat}; use generate with token ids in the model's own format, as "
                "llm.tokenizer.encode(text, parse_special=True) makes them"
            )
        return self._checked(self._text.chat_format.encode(messages, **options))

    def request(self, token_ids: list[int], params: SamplingParams) -> Request:
        """A request to continue these tokens, as ``encode`` or ``encode_chat`` returned them; a seed is drawn unless one is given."""
        config = self._config
        room = config.max_position_embeddings - len(token_ids)
        if room < 1:
            raise ValueError(f"the prompt fills the model's context of {len(token_ids)} tokens; shorten it to leave room for an answer")
        if params.stop and self._text.tokenizer is None:
            raise ValueError(f"stop strings need a tokenizer, but {self._text.no_tokenizer}; use stop_token_ids")
        self._check_vocabulary(params.logit_bias, "logit_bias")
        self._check_vocabulary(params.stop_token_ids, "stop_token_ids")
        if len(token_ids) > self._drafts_up_to:
            raise ValueError(
                f"a prompt has {len(token_ids)} tokens, and the drafter was trained at lengths up to {self._drafts_up_to} and is told to "
                'stop there; load with speculation="off", or with beyond_training="window", which lets it look back that far'
            )
        ends = set(params.stop_token_ids)
        if not params.ignore_eos:
            ends |= self.stop_token_ids
        if len(ends) > MAX_STOP_IDS:
            raise ValueError(
                f"{len(ends)} tokens would end the answer, the model's own included; expected at most {MAX_STOP_IDS}; "
                "shorten stop_token_ids"
            )
        forbidden = {token for token, bias in params.logit_bias.items() if bias == -math.inf}
        if len(forbidden) == config.vocab_size:
            raise ValueError(f"logit_bias forbids all {config.vocab_size} tokens; leave at least one")
        if params.min_tokens > 0 and len(forbidden | ends) >= config.vocab_size:
            raise ValueError(
                f"min_tokens is {params.min_tokens}, and every token ends the answer or is forbidden by logit_bias; leave at least one "
                "other token"
            )
        seed = secrets.randbits(64) if params.seed is None else params.seed
        return Request(
            token_ids, params.limited_to(room), seed, sorted(ends), guide=self.compiled(params.guide, ends) if self._compiles else None
        )

    def compiled(self, guide: Guide | None, end_ids: Collection[int]) -> CompiledGuide | None:
        """The guide of an answer that ends at one of these tokens, ready to be followed."""
        if guide is None:
            return None
        if self._text.tokenizer is None:
            raise ValueError(f"guide needs a tokenizer, but {self._text.no_tokenizer}; leave it out")
        return self.prepare_guides(self._text.tokenizer).compiled(guide, end_ids)

    def prepare_guides(self, tokenizer: Tokenizer) -> Guiding:
        """Make what compiles guides, which may take seconds, unless it is there already."""
        with self._lock:
            if self._guiding is None:
                self._guiding = Guiding(tokenizer, self._config.vocab_size)
            return self._guiding

    def scoring(self, token_ids: list[int], top: int | None = None) -> Request:
        """A request for the logits of these tokens, as ``encode`` returned them; or for log-probabilities, with ``top`` alternatives."""
        return Request(token_ids, SamplingParams(logprobs=top), 0, ())

    def _checked(self, token_ids: list[int]) -> list[int]:
        context = self._config.max_position_embeddings
        if not token_ids:
            raise ValueError("the prompt has no tokens; expected at least one")
        self._check_vocabulary(token_ids, "the prompt")
        if len(token_ids) > context:
            raise ValueError(f"the prompt has {len(token_ids)} tokens; expected at most the model's context of {context}; shorten it")
        return token_ids

    def _check_vocabulary(self, token_ids: Iterable[int], where: str) -> None:
        for token in token_ids:
            if not 0 <= token < self._config.vocab_size:
                raise ValueError(
                    f"{where} has token id {shown(token)}; expected 0 to {self._config.vocab_size - 1}, the model's vocabulary"
                )
